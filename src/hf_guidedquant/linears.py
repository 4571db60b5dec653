"""What counts as a linear layer, and what its weight looks like."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a plain linear layer: ``nn.Linear`` or GPT-2's transposed ``Conv1D``.

    Subclasses are left alone: their owners may use the weight in ways of their own.
    """
    return type(module) in (nn.Linear, Conv1D)


def scaled_rows(module: nn.Module) -> bool:
    """Whether the module is an embedding that gives its rows, or, as Gemma's, gives them times ``embed_scale``."""
    return (
        isinstance(module, nn.Embedding)
        and module.max_norm is None
        and (type(module) is nn.Embedding or hasattr(module, "embed_scale"))
    )


def stored_weight(module: nn.Module) -> Tensor:
    """The weight of a linear or embedding layer, detached, in the layout that the module stores it in."""
    weight: Any = module.weight
    return weight.detach()


def vocabulary_layers(model: nn.Module) -> tuple[str | None, str | None]:
    """Names of the input embeddings and of the output head; None for what the model does not have."""
    names = {id(module): name for name, module in model.named_modules()}
    found = (getattr(model, f"get_{which}_embeddings", lambda: None)() for which in ("input", "output"))
    embeddings, head = (None if module is None else names.get(id(module)) for module in found)
    return embeddings, head


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """``(out_features, in_features)`` of a linear layer."""
    rows, columns = stored_weight(module).shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers of a module and all below it, each once."""
    return chain(module.parameters(), module.buffers())


def size_of(module: nn.Module) -> int:
    """Bytes of all parameters and buffers of a module."""
    return sum(tensor.nbytes for tensor in tensors_of(module))


def dense_weight(module: nn.Module) -> Tensor:
    """The weight of a linear layer as ``[out_features, in_features]``."""
    weight = stored_weight(module)
    return weight.T if isinstance(module, Conv1D) else weight


def swap_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` where ``name`` is; accelerate's hooks, which place activations on devices, move along."""
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    old = getattr(parent, child)
    hook = getattr(old, "_hf_hook", None)
    new.train(old.training)
    if hook is not None:
        remove_hook_from_module(old)
        add_hook_to_module(new, hook)
    setattr(parent, child, new)
