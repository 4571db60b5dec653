"""Quantized embeddings and output heads as parts of a Transformers model: tied or not, and of a fixed size."""

from types import MethodType
from typing import Any

from torch import nn

from ..errors import ModelError
from ..linears import vocabulary_layers
from .guided_embedding import GuidedEmbedding
from .guided_linear import GuidedLinear
from .surgery import quantized_modules
from .tie import Tie


def tied_pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Names of the modules whose weights Transformers ties: where the weight is saved, and who else has it."""
    keys: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    weights = [(source, target) for target, source in keys.items() if target.endswith(".weight")]
    return [(source.removesuffix(".weight"), target.removesuffix(".weight")) for source, target in weights]


def tie_codes(model: Any, loaded: bool = False) -> None:
    """Make one copy of what a quantized head and quantized embeddings have in common, and have it saved once.

    Args:
        model: Of which Transformers ties the embeddings' and the head's weights.
        loaded: Whether Transformers has tied what it found in a file, which may hold two copies that differ.
    """
    for module in quantized_modules(model).values():
        module.tie = None
    for source, target in tied_pairs(model):
        modules = [model.get_submodule(name) for name in (source, target)]
        modules.sort(key=lambda module: not isinstance(module, GuidedEmbedding))
        embedding, head = modules
        if not (isinstance(embedding, GuidedEmbedding) and isinstance(head, GuidedLinear)):
            continue
        if loaded and not (embedding.weight is head.weight and embedding.lut is head.lut):
            continue
        Tie(embedding, head)
        codebooks = {f"{target}.lut": f"{source}.lut"}
        model._tied_weights_keys = {**(model._tied_weights_keys or {}), **codebooks}
        model.all_tied_weights_keys.update(codebooks)


def untie_codebooks(model: Any) -> None:
    """Forget about codebooks of models that have become dense."""
    vars(model).pop("_tied_weights_keys", None)
    keys = getattr(model, "all_tied_weights_keys", None) or {}
    for key in [key for key in keys if key.endswith(".lut")]:
        del keys[key]


def refuse_resizing(model: Any) -> None:
    """Make ``resize_token_embeddings`` of a model with quantized embeddings or a quantized head say why it cannot."""
    if any(isinstance(model.get_submodule(name), GuidedLinear) for name in vocabulary_layers(model) if name):
        model.resize_token_embeddings = MethodType(resize_token_embeddings, model)


# Named like the method that it wraps: that is how a bound method is pickled, so that a model read back from a pickle
# has the plain method again.


def resize_token_embeddings(self: Any, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
    """``PreTrainedModel.resize_token_embeddings``, if there is nothing to do or if the model is dense by now.

    Raises:
        ModelError: Entries would have to be added to codes, or taken away.
    """
    layers = [self.get_submodule(name) for name in vocabulary_layers(self) if name]
    if not any(isinstance(layer, GuidedLinear) for layer in layers):
        return type(self).resize_token_embeddings(self, new_num_tokens, *args, **kwargs)
    embeddings = self.get_input_embeddings()
    count = getattr(embeddings, "num_embeddings", None)
    if new_num_tokens in (None, count) and not args and kwargs.get("pad_to_multiple_of") is None:
        return embeddings
    raise ModelError(
        f"The embeddings or the output head are quantized, with {count} entries, and cannot be resized. Resize the "
        "original before it is quantized, or make the model dense: model.dequantize()."
    )


__all__ = ["refuse_resizing", "tie_codes", "tied_pairs", "untie_codebooks"]
