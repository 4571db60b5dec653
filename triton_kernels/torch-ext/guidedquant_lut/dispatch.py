"""From an op's arguments to the kernel that computes it."""

import torch
from torch import Tensor

from . import reference
from .backend import backend_for
from .reference import Overlay
from .tiles import unpack_tiles

_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_TENSOR_CORE_DTYPES = (torch.float16, torch.bfloat16)


def linear(x: Tensor, weight: Tensor, lut: Tensor, bias: Tensor | None, overlay: Overlay) -> Tensor:
    """``x @ W.T + bias`` with the codes of W as bit-planes, and maybe an overlay."""
    if x.dtype in _KERNEL_DTYPES and x.numel() and backend_for(x.device) != "torch":
        from . import portable

        return add_sparse_product(portable.lut_linear(x, weight, lut, bias), x, overlay)
    return reference.lut_linear(x, weight, lut, bias, overlay)


def add_sparse_product(y: Tensor, x: Tensor, overlay: Overlay) -> Tensor:
    """``y``, to which the product with the overlay is added in place; for activations that have kernels."""
    if overlay is not None:
        from . import sparse

        sparse.add_product(y, x, *overlay)
    return y


def add_to_dense(dense: Tensor, overlay: Overlay) -> Tensor:
    """``dense [N, K]``, to which the overlay is added in place; every sum is rounded once."""
    if overlay is not None and dense.dtype in _KERNEL_DTYPES and backend_for(dense.device) != "torch":
        from . import portable, sparse

        # The interpreter cuts off what it stores as bf16.
        if not (portable.INTERPRETED and dense.dtype == torch.bfloat16):
            sparse.add_to_dense(dense, *overlay)
            return dense
    return reference.add_overlay(dense, overlay)


def dequantize(weight: Tensor, lut: Tensor, in_features: int, dtype: torch.dtype, overlay: Overlay = None) -> Tensor:
    """W with its codes as bit-planes, and maybe an overlay."""
    return add_to_dense(_dequantize(weight, lut, in_features, dtype), overlay)


def _dequantize(weight: Tensor, lut: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    if dtype in _KERNEL_DTYPES and weight.numel() and backend_for(weight.device) != "torch":
        from . import portable

        return portable.lut_dequantize(weight, lut, in_features, dtype)
    return reference.lut_dequantize(weight, lut, in_features, dtype)


def linear_tiled(x: Tensor, tiles: Tensor, lut: Tensor, bias: Tensor | None, overlay: Overlay) -> Tensor:
    """``x @ W.T + bias`` with the codes of W as tiles, and maybe an overlay."""
    if x.dtype in _TENSOR_CORE_DTYPES and x.numel() and tiles.numel() and backend_for(x.device) == "tensor_core":
        from . import tensor_core

        return tensor_core.linear(x, tiles, lut, bias, overlay)
    dense = dequantize_tiled(tiles, lut, x.shape[-1], x.dtype, overlay)
    return torch.nn.functional.linear(x, dense, None if bias is None else bias.to(x.dtype))


def dequantize_tiled(
    tiles: Tensor, lut: Tensor, in_features: int, dtype: torch.dtype, overlay: Overlay = None
) -> Tensor:
    """W with its codes as tiles, and maybe an overlay."""
    return add_to_dense(_dequantize_tiled(tiles, lut, in_features, dtype), overlay)


def _dequantize_tiled(tiles: Tensor, lut: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    if tiles.numel() and backend_for(tiles.device) == "tensor_core":
        from . import tensor_core

        if dtype in _TENSOR_CORE_DTYPES:
            return tensor_core.dequantize(tiles, lut, in_features, dtype)
        if lut.dtype in _TENSOR_CORE_DTYPES:
            return tensor_core.dequantize(tiles, lut, in_features, lut.dtype).to(dtype)
    return _dequantize(unpack_tiles(tiles, lut.shape[0], in_features), lut, in_features, dtype)


def decode_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of one query per row."""
    if query.dtype in _TENSOR_CORE_DTYPES and query.numel() and backend_for(query.device) != "torch":
        from . import attention

        return attention.decode_attention(query, key, value, mask, scale)
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=True
    )
