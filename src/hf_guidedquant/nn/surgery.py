"""Put quantized layers in a model where linear ones are, and back."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import ModelError
from ..linears import swap_module
from .fusion import fuse
from .guided_embedding import GuidedEmbedding, ScaledEmbedding
from .guided_linear import GuidedLinear


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` where ``name`` is, and undo the fusion of a quantized layer that was there."""
    old = model.get_submodule(name)
    if isinstance(old, GuidedLinear) and old.fusion is not None:
        old.fusion.dissolve()
    if isinstance(old, Conv1D) or getattr(old, "is_conv1d", False):
        # For whoever makes the model dense again: GPT-2's layers are transposed then.
        new.is_conv1d = True  # type: ignore[assignment]
    swap_module(model, name, new)


def quantized_modules(model: nn.Module) -> dict[str, GuidedLinear]:
    """All quantized layers of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, GuidedLinear)}


def without_copies(model: nn.Module) -> dict[str, GuidedLinear]:
    """:func:`quantized_modules`; of embeddings and a head with one copy of their codes, the first."""
    found: dict[int, tuple[str, GuidedLinear]] = {}
    for name, module in quantized_modules(model).items():
        found.setdefault(id(module.weight), (name, module))
    return dict(found.values())


def prepare_layers(model: nn.Module, fuse_layers: bool, dense: bool) -> None:
    """Get the quantized layers of a model ready for their devices.

    Args:
        model: A model that holds its weights.
        fuse_layers: Whether layers that read the same activations share a product.
        dense: Whether layers keep dense copies of their weights.
    """
    for module in quantized_modules(model).values():
        module.prepare()
    if fuse_layers:
        fuse(model)
    cache_dequantized(model, dense)


def cache_dequantized(model: nn.Module, enabled: bool = True) -> None:
    """Keep dense copies of all quantized weights in memory (or drop them).

    Generation on a CPU then runs at the dense model's speed. It costs the dense model's memory besides the packed one,
    taken layer by layer during the first forward pass. What is saved does not change.
    """
    for module in quantized_modules(model).values():
        module.cache_dequantized(enabled)


def dequantize_model(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace every quantized layer by a dense one in ``dtype``, of the class that it had; ties stay.

    The weights require gradients where those of the model's other layers do: they do not beside adapters.

    Raises:
        ModelError: Layers are offloaded.
    """
    layers = quantized_modules(model)
    offloaded = next((name for name, module in layers.items() if module.weight.is_meta), None)
    if offloaded is not None:
        raise ModelError(f"{offloaded} is offloaded, so it cannot be made dense. Load the model without offloading.")
    packed = {id(p) for module in layers.values() for p in module.parameters()}
    trained = all(p.requires_grad for p in model.parameters() if id(p) not in packed)
    weights: dict[int, nn.Parameter] = {}
    for name, module in layers.items():
        codes = id(module.weight)
        if codes not in weights:
            weight = module.dequantize(dtype)
            transposed = getattr(module, "is_conv1d", False)
            weights[codes] = nn.Parameter(weight.mT.contiguous() if transposed else weight, requires_grad=trained)
        replace_module(model, name, _dense(module, weights[codes], dtype))


def _dense(module: GuidedLinear, weight: nn.Parameter, dtype: torch.dtype) -> nn.Module:
    """The dense layer with that weight."""
    if isinstance(module, GuidedEmbedding):
        return ScaledEmbedding(weight, module.scale, module.padding_idx)
    dense: nn.Module
    with torch.device("meta"):
        if getattr(module, "is_conv1d", False):
            dense = Conv1D(module.out_features, module.in_features)
        else:
            dense = nn.Linear(module.in_features, module.out_features, module.bias is not None)
    dense.weight = weight
    if module.bias is not None:
        dense.bias = nn.Parameter(module.bias.to(dtype), requires_grad=weight.requires_grad)
    return dense
