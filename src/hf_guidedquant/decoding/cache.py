"""The static cache of a decode step."""

from typing import Any

from torch import Tensor
from transformers import Cache, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer


class DecodeLayer(StaticLayer):
    """A static layer that does not count while steps are taken, but writes to a column that all layers share."""

    keys: Tensor
    values: Tensor
    column: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.column is None:
            return super().update(key_states, value_states, *args, **kwargs)
        self.keys.index_copy_(2, self.column, key_states)
        self.values.index_copy_(2, self.column, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> Any:
        return super().get_seq_length() if self.column is None else self.column[0]


def static_cache(model: Any, length: int) -> StaticCache:
    """A static cache whose layers hold all tokens.

    Those that hold no more than a sliding window count in Python, so they cannot be captured. The window itself is the
    attention mask's concern in any case.
    """
    cache = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=length)
    plain = (StaticLayer, StaticSlidingWindowLayer)
    cache.layers = [DecodeLayer(length) if type(layer) in plain else layer for layer in cache.layers]
    return cache


def share_column(cache: Cache, column: Tensor | None) -> None:
    """From now on write to ``column`` (int64 ``[1]``), or (None) count again."""
    for layer in cache.layers:
        if isinstance(layer, DecodeLayer):
            layer.column = column


__all__ = ["DecodeLayer", "share_column", "static_cache"]
