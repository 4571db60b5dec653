"""The decode step's attention, one query per row over a static cache, as an implementation that Transformers knows."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..triton_kernels import backend_for, decode_attention

NAME = "guidedquant_decode"
# What sdpa_attention_forward knows too and is none of this implementation's business.
_OTHER_SCORES = ("position_bias", "softcap", "s_aux", "cache")
# Keys and values of a block are held in shared memory and registers.
_WIDEST_HEAD = 256
_DTYPES = (torch.float16, torch.bfloat16)


def decode_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' ``sdpa`` attention, with a kernel of its own for one query per row.

    Args:
        module: The attention layer.
        query: ``[batch, heads, queries, K]``.
        key, value: ``[batch, key heads, length, K or V]``.
        attention_mask: bool ``[batch, 1, queries, length]`` or None.
        dropout: Of the weights.
        scaling: Of the scores; ``K**-0.5`` by default.
        **kwargs: As for ``sdpa``.

    Returns:
        ``[batch, queries, heads, V]``, and None for the weights.
    """
    special = dropout or any(kwargs.get(name) is not None for name in _OTHER_SCORES)
    if special or not _suits(query, value, attention_mask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return decode_attention(query, key, value, attention_mask, scale).transpose(1, 2).contiguous(), None


def _suits(query: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    narrow = max(query.shape[-1], value.shape[-1]) <= _WIDEST_HEAD
    plain_mask = mask is None or (mask.dtype == torch.bool and mask.shape[1] == 1)
    return query.shape[2] == 1 and query.dtype in _DTYPES and narrow and plain_mask


def decode_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Transformers' mask for ``sdpa``, never left out: to look whether it could be, the host must wait."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


AttentionInterface.register(NAME, decode_attention_forward)
AttentionMaskInterface.register(NAME, decode_mask)


@contextmanager
def attention_for_decoding(model: nn.Module, queries: int = 1) -> Iterator[None]:
    """Let the layers that use ``sdpa`` use :func:`decode_attention_forward` meanwhile, if there is a kernel for it.

    Masks are made by :func:`decode_mask` then. Of several queries per row that is all that is different.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    configs = _configs_with_sdpa(model) if queries > 1 or _has_kernel(device) else []
    # Not the property: it would set the configs inside as well, whatever they use.
    for config in configs:
        config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        for config in configs:
            config._attn_implementation_internal = "sdpa"


def _has_kernel(device: torch.device) -> bool:
    """Whether the kernel suits a device. For NVIDIA GPUs before sm_80, its registers spill kilobytes a thread."""
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    return backend_for(device) != "torch" and not old


def _configs_with_sdpa(model: nn.Module) -> list[Any]:
    found = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and config._attn_implementation == "sdpa":
            found[id(config)] = config
    return list(found.values())


__all__ = ["attention_for_decoding", "decode_attention_forward"]
