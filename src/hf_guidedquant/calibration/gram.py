"""Sums of outer products: ``H += xᵀ x`` with fp32 sums, on tensor cores where the activations allow it."""

import functools

import torch
from torch import Tensor

# Inputs of a stripe at least, and stripes at most: H is symmetric, so of every stripe of rows only what lies on and
# left of the diagonal is computed. Four stripes save 37 % of the work.
_STRIPE, _STRIPES = 2048, 4


def product_dtype(x: Tensor, weighted: bool) -> torch.dtype:
    """What the factors of the products are rounded to.

    16-bit activations on a GPU stay 16-bit. Scaled by the root of a token's weight they do not fit fp16's range, so
    they are bf16 then; both factors are the same rounded numbers, so the sum stays positive semidefinite.
    """
    if x.device.type != "cuda" or x.dtype not in (torch.float16, torch.bfloat16) or not _mixed_addmm():
        return torch.float32
    return torch.bfloat16 if weighted else x.dtype


def add_gram(total: Tensor, x: Tensor) -> None:
    """``total [K, K] += xᵀ x`` of ``x [T, K]``, on and below the diagonal; :func:`mirror` fills in what lies above."""
    for start, stop in _stripes(total.shape[0]):
        part, left, right = total[start:stop, :stop], x[:, start:stop].mT, x[:, :stop]
        if x.dtype == torch.float32:
            part.addmm_(left, right)
        else:
            torch.addmm(part, left, right, out_dtype=torch.float32, out=part)


def mirror(total: Tensor) -> None:
    """Copy what lies below the diagonal of ``[..., K, K]`` to above it, in place."""
    for start, stop in _stripes(total.shape[-1]):
        total[..., :start, start:stop] = total[..., start:stop, :start].mT


def _stripes(size: int) -> list[tuple[int, int]]:
    count = max(1, min(_STRIPES, size // _STRIPE))
    # Tensor cores like multiples of 128.
    step = -(-size // (128 * count)) * 128
    return [(start, min(start + step, size)) for start in range(0, size, step)]


@functools.cache
def _mixed_addmm() -> bool:
    """Whether torch adds 16-bit products to an fp32 matrix; it can since 2.8."""
    return "dtype_out" in torch.ops.aten.addmm.overloads()
