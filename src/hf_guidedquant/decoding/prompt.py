"""Reading a short prompt as one CUDA graph: to launch its kernels takes the host longer than they take the GPU."""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from ..replay import Replay
from .attention import attention_for_decoding
from .cache import DecodeLayer, share_column
from .capture import facts

# Tokens of all rows, padding included. With more, the GPU is not kept waiting.
_MOST_TOKENS = 256
_FEWEST_COLUMNS = 16
_PADDED = ("input_ids", "position_ids", "attention_mask")


class PromptReader:
    """Forward passes over short prompts into a static cache.

    Prompts are padded on the right to a power of two columns, and each of these lengths is captured after it has come
    up a few times. What padding leaves in the cache is overwritten, token by token, before any mask lets it be read.
    """

    def __init__(self, cache: Cache, cache_length: int, device: torch.device) -> None:
        self._cache, self._cache_length, self._device = cache, cache_length, device
        self.reset()

    def reset(self) -> None:
        """Drop the graphs."""
        self._passes: dict[int, _Pass] = {}
        self._capturable = True

    def inputs(self, model: Any, input_ids: Tensor, model_kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """What the model takes to read a prompt, or None if it had better be read without padding and graph.

        That is a long one, one that is not made of tokens alone, and one whose padding the cache would remember.
        """
        if input_ids.dim() != 2 or len(input_ids) * _columns(input_ids.shape[1]) > _MOST_TOKENS:
            return None
        mask = model_kwargs.get("attention_mask")
        if input_ids.device != self._device or (mask is not None and mask.shape != input_ids.shape):
            return None
        # The first prompt of all makes the layers' tensors.
        static = all(type(layer) is DecodeLayer and layer.is_initialized for layer in self._cache.layers)
        if not static or not self._capturable:
            return None
        # Without the cache, for which it would make masks of four dimensions here and now.
        inputs = model.prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=input_ids.shape[1],
            is_first_iteration=True,
            **model_kwargs | {"past_key_values": None},
        )
        inputs = {name: value for name, value in inputs.items() if name not in ("attention_mask", "past_key_values")}
        inputs["attention_mask"] = torch.ones_like(input_ids) if mask is None else mask
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                if name not in _PADDED or value.dim() != 2:
                    return None
                inputs[name] = value.to(input_ids.device)
            elif value and not isinstance(value, bool | int | float | str):
                return None
        # Positions that the model counts for itself could go beyond those that it has.
        plain = inputs.get("input_ids") is not None and inputs.get("position_ids") is not None
        return inputs if plain else None

    def read(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, bool]:
        """Fill the cache with a prompt, given as :meth:`inputs`, and with nothing else.

        Returns:
            What the model says of the first new token, ``[batch, vocabulary]``, valid until the next call; and whether
            that came from a graph, so that no code of the model has run.
        """
        columns = _columns(inputs["input_ids"].shape[1])
        layout = facts(inputs, lambda tensor: (len(tensor), tensor.dtype))
        reading = self._passes.get(columns)
        if reading is None or reading.layout != layout:
            reading = self._passes[columns] = _Pass(self._cache, self._cache_length, columns, inputs, layout)
        found = reading.run(model, inputs)
        if not reading.capturable:
            # Nor would others be.
            self.reset()
            self._capturable = False
        return found


class _Pass:
    """The forward pass over prompts of up to so many columns, on buffers that stay where they are."""

    def __init__(self, cache: Cache, cache_length: int, columns: int, inputs: dict[str, Any], layout: Hashable) -> None:
        self.layout = layout
        self._cache = cache
        self._inputs = {**inputs, "past_key_values": cache}
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                width = cache_length if name == "attention_mask" else columns
                self._inputs[name] = value.new_zeros(len(value), width)
        ids = self._inputs["input_ids"]
        self._columns = torch.arange(columns, device=ids.device)
        # The column of the last token.
        self._last = ids.new_zeros(1)
        if inputs.get("logits_to_keep"):
            self._inputs["logits_to_keep"] = self._last
        self._replay = Replay(ids.device, "Reading a prompt")

    @property
    def capturable(self) -> bool:
        return self._replay.capturable

    def run(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, bool]:
        length = inputs["input_ids"].shape[1]
        # With tokens of its own: what another one gives might be NaN, which no mask keeps out.
        self._inputs["input_ids"].copy_(inputs["input_ids"][:, -1:])
        self._inputs["attention_mask"].zero_()
        for name in _PADDED:
            self._inputs[name][:, :length] = inputs[name]
        self._last.fill_(length - 1)
        share_column(self._cache, self._columns)
        self._ran = False
        self._replay(lambda: self._forward(model))
        return self._scores, not self._ran

    def _forward(self, model: nn.Module) -> None:
        self._ran = True
        self._cache.reset()
        with attention_for_decoding(model, queries=len(self._columns)):
            logits = model(**self._inputs, return_dict=True).logits
        if logits.shape[1] != 1:
            # A model that cannot keep one column's.
            logits = logits.index_select(1, self._last)
        self._scores = logits[:, -1]


def _columns(length: int) -> int:
    """Padded length of a prompt."""
    return max(_FEWEST_COLUMNS, 1 << (length - 1).bit_length())


__all__ = ["PromptReader"]
