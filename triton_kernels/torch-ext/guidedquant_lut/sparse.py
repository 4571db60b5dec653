"""The product with an overlay, in plain Triton: for any GPU that Triton knows, and for tests on a CPU."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backend import launching_on
from .portable import INTERPRETED

_WARPS = 4
# Products of a program at a time, and tokens, outliers and rows that it takes at most.
_PRODUCTS, _TOKENS, _OUTLIERS, _ROWS = 2048, 64, 32, 16
# Up to so many tokens, copying them so that those of an input are neighbours costs more than it spares.
_FEW = 4


@triton.jit(do_not_specialize=["tokens"])
def _sparse_kernel(
    y, x, values, columns, tokens, rows, token_stride, input_stride,
    COUNT: tl.constexpr, TOKENS: tl.constexpr, OUTLIERS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """``ROWS`` rows times ``TOKENS`` tokens, multiplied and summed in fp32, always in the same order."""
    column = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    line = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    # What lies past the end repeats the last row or token and is not stored.
    row = tl.minimum(column, rows - 1).to(tl.int64)
    token = tl.minimum(line, tokens - 1).to(tl.int64)
    sums = tl.zeros([ROWS, TOKENS], tl.float32)
    for start in range(0, COUNT, OUTLIERS):
        outlier = start + tl.arange(0, OUTLIERS)
        place = row[:, None] * COUNT + outlier[None, :]
        inside = (outlier < COUNT)[None, :]
        k = tl.load(columns + place, mask=inside, other=0).to(tl.int64)
        value = tl.load(values + place, mask=inside, other=0.0).to(tl.float32)
        pointers = x + k[:, :, None] * input_stride + token[None, None, :] * token_stride
        # Where there is no outlier, an infinite activation must not meet the zero.
        activations = tl.load(pointers, mask=inside[:, :, None], other=0.0).to(tl.float32)
        sums += tl.sum(value[:, :, None] * activations, axis=1)
    stored = (column < rows)[:, None] & (line < tokens)[None, :]
    pointers = y + token[None, :] * rows + row[:, None]
    total = tl.load(pointers, mask=stored, other=0.0).to(tl.float32) + sums
    tl.store(pointers, total.to(y.dtype.element_ty), mask=stored)


def add_product(y: Tensor, x: Tensor, values: Tensor, columns: Tensor) -> None:
    """``y += x @ overlay.T``, summed in fp32 and rounded once, the same bits at every call.

    Args:
        y: ``[..., N]`` in x's dtype, contiguous. On a CPU only if the kernels are interpreted.
        x: ``[..., K]``, fp16, bf16 or fp32, any strides.
        values: Of the outliers of every row, ``[N, n]``, fp16, bf16 or fp32.
        columns: Their inputs, int16 or int32 ``[N, n]``, each from 0 to K - 1: they are not checked here.
    """
    rows, count = values.shape
    tokens = math.prod(x.shape[:-1])
    if not (tokens and rows and count):
        return
    if INTERPRETED and x.dtype == torch.bfloat16:
        # The interpreter cuts off what it stores as bf16.
        wide = y.float()
        add_product(wide, x.float(), values.float(), columns)
        y.copy_(wide)
        return
    flat = x.reshape(tokens, x.shape[-1])
    if tokens > _FEW:
        flat = flat.mT.contiguous().mT
    width = min(_TOKENS, triton.next_power_of_2(tokens))
    outliers = min(_OUTLIERS, triton.next_power_of_2(count), max(1, _PRODUCTS // width))
    height = min(_ROWS, max(1, _PRODUCTS // (width * outliers)))
    with launching_on(x.device):
        _sparse_kernel[triton.cdiv(rows, height), triton.cdiv(tokens, width)](
            y, flat, values.contiguous(), columns.contiguous(), tokens, rows, *flat.stride(),
            COUNT=count, TOKENS=width, OUTLIERS=outliers, ROWS=height, num_warps=_WARPS,
        )  # fmt: skip
