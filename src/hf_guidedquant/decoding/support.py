"""What the decode step can run, and what it leaves to Transformers' own loop."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.generation import GenerationMode

from ..errors import DecodingError
from .cache import static_cache

# Layers of a static cache that count their tokens on the device.
_STATIC_LAYERS = {
    "DecodeLayer",
    "DummyLayer",
    "LinearAttentionAndStaticFullAttentionLayer",
    "LinearAttentionLayer",
    "StaticIndexedLayer",
}
_OTHER_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


def check_mode(generation_config: GenerationConfig, assistant_model: Any) -> None:
    """Refuse anything but greedy search and sampling.

    Raises:
        DecodingError: Beams, an assistant, or another mode.
    """
    mode = generation_config.get_generation_mode(assistant_model)
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise DecodingError(mode.value.replace("_", " "))


def check_outputs(generation_config: GenerationConfig) -> None:
    """Refuse outputs besides the sequences.

    Raises:
        DecodingError: Scores, logits, attentions or hidden states are asked for.
    """
    asked = [name for name in _OTHER_OUTPUTS if getattr(generation_config, name, False)]
    if generation_config.return_dict_in_generate and asked:
        raise DecodingError(", ".join(asked))


def obstacle(model: Any, cache: Any) -> str | None:
    """Why a model with this cache must decode with Transformers' own loop, if it must."""
    if model.config.is_encoder_decoder:
        return "it has an encoder"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "its weights are on several devices"
    if model.device.type == "meta":
        return "its weights are offloaded"
    if (model.tp_size or 1) > 1:
        return "its weights are split between processes"
    if not getattr(model, "_can_compile_fullgraph", False) or model.is_remote_code():
        return "it is not known to work with a static cache"
    if "prepare_inputs_for_generation" in vars(model):
        return "something else prepares its inputs"  # as adapters do that put tokens before the prompt
    if getattr(model.config.get_text_config(), "alibi", False):
        return "its attention depends on the length"
    if {"dynamic", "longrope"} & set(_rope_types(model)):
        return "its position embedding changes with the length"
    if torch.is_autocast_enabled(model.device.type):
        return "autocast is on"
    if type(cache) not in (DynamicCache, StaticCache) or cache.offloading:
        return "it was asked to use another kind of cache" if cache is not None else "it runs without a cache"
    if getattr(cache, "_is_user_defined", False) or cache.get_seq_length() > 0:
        return "its cache is the caller's own"
    kinds = {type(layer).__name__ for layer in static_cache(model, 1).layers}
    if kinds - _STATIC_LAYERS:
        return f"it has cache layers of kind {', '.join(sorted(kinds - _STATIC_LAYERS))}"
    return None


def _rope_types(model: nn.Module) -> Iterator[str]:
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, dict):
            yield from kind.values()
        elif isinstance(kind, str):
            yield kind


__all__ = ["check_mode", "check_outputs", "obstacle"]
