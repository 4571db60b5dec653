"""From an op's arguments to the kernel that computes it."""

import torch
from torch import Tensor

from . import reference
from .backend import backend_for
from .tiles import unpack_tiles

_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_TENSOR_CORE_DTYPES = (torch.float16, torch.bfloat16)


def linear(x: Tensor, weight: Tensor, lut: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ W.T + bias`` with the codes of W as bit-planes."""
    if x.dtype in _KERNEL_DTYPES and x.numel() and backend_for(x.device) != "torch":
        from . import portable

        return portable.lut_linear(x, weight, lut, bias)
    return reference.lut_linear(x, weight, lut, bias)


def dequantize(weight: Tensor, lut: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    """W with its codes as bit-planes."""
    if dtype in _KERNEL_DTYPES and weight.numel() and backend_for(weight.device) != "torch":
        from . import portable

        return portable.lut_dequantize(weight, lut, in_features, dtype)
    return reference.lut_dequantize(weight, lut, in_features, dtype)


def linear_tiled(x: Tensor, tiles: Tensor, lut: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ W.T + bias`` with the codes of W as tiles."""
    if x.dtype in _TENSOR_CORE_DTYPES and x.numel() and tiles.numel() and backend_for(x.device) == "tensor_core":
        from . import tensor_core

        return tensor_core.linear(x, tiles, lut, bias)
    dense = dequantize_tiled(tiles, lut, x.shape[-1], x.dtype)
    return torch.nn.functional.linear(x, dense, None if bias is None else bias.to(x.dtype))


def dequantize_tiled(tiles: Tensor, lut: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    """W with its codes as tiles."""
    if tiles.numel() and backend_for(tiles.device) == "tensor_core":
        from . import tensor_core

        if dtype in _TENSOR_CORE_DTYPES:
            return tensor_core.dequantize(tiles, lut, in_features, dtype)
        if lut.dtype in _TENSOR_CORE_DTYPES:
            return tensor_core.dequantize(tiles, lut, in_features, lut.dtype).to(dtype)
    return dequantize(unpack_tiles(tiles, lut.shape[0], in_features), lut, in_features, dtype)


def decode_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of one query per row."""
    if query.dtype in _TENSOR_CORE_DTYPES and query.numel() and backend_for(query.device) != "torch":
        from . import attention

        return attention.decode_attention(query, key, value, mask, scale)
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=True
    )
