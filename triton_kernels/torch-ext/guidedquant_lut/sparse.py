"""Overlays in plain Triton, as products and in dense matrices: for any GPU that Triton knows, and for CPU tests."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backend import launching_on
from .overlap import follow, launch_options, overlaps
from .portable import INTERPRETED

# Up to so many tokens, copying them so that those of an input are neighbours costs more than it spares.
_FEW = 4
# Of a program for few tokens: products at a time, and outliers and rows at most.
_PRODUCTS, _OUTLIERS, _ROWS = 2048, 32, 16
# Of a program for many: tokens at most, and outliers whose activations are under way together.
_TOKENS, _UNDER_WAY = 64, 8
# Outliers that a program adds to a dense matrix.
_ADDED = 512


@triton.jit(do_not_specialize=["tokens"])
def _few_tokens_kernel(
    y, x, values, columns, tokens, rows, token_stride, input_stride,
    COUNT: tl.constexpr, TOKENS: tl.constexpr, OUTLIERS: tl.constexpr, ROWS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """``ROWS`` rows times all tokens, OUTLIERS at a time, multiplied and summed in fp32, always in the same order.

    OVERLAP: The overlay is fetched while the kernel before still runs.
    """
    column = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    line = tl.arange(0, TOKENS)
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
        if OVERLAP:
            follow()
        pointers = x + k[:, :, None] * input_stride + token[None, None, :] * token_stride
        # Where there is no outlier, an infinite activation must not meet the zero.
        activations = tl.load(pointers, mask=inside[:, :, None], other=0.0).to(tl.float32)
        sums += tl.sum(value[:, :, None] * activations, axis=1)
    _add(y, sums, column, line, tokens, rows)


@triton.jit(do_not_specialize=["tokens"])
def _many_tokens_kernel(
    y, x, values, columns, tokens, rows, stride_8,
    COUNT: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, UNDER_WAY: tl.constexpr,
):  # fmt: skip
    """``ROWS`` rows times ``TOKENS`` tokens, outlier after outlier, in fp32.

    ``x[K, 8 * stride_8]`` holds the tokens of an input side by side, in whole tiles, so that 16 bytes are read at once.
    """
    column = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    line = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    # Rows past the end repeat the last one and are not stored.
    first = tl.minimum(column, rows - 1).to(tl.int64) * COUNT
    sums = tl.zeros([ROWS, TOKENS], tl.float32)
    for start in range(0, COUNT - COUNT % UNDER_WAY, UNDER_WAY):
        for i in tl.static_range(UNDER_WAY):
            sums += _product(x, values, columns, first + start + i, line, stride_8)
    for i in tl.static_range(COUNT % UNDER_WAY):
        sums += _product(x, values, columns, first + COUNT - COUNT % UNDER_WAY + i, line, stride_8)
    _add(y, sums, column, line, tokens, rows)


@triton.jit
def _product(x, values, columns, place, line, stride_8):
    """An outlier of every row times all tokens of its input."""
    k = tl.load(columns + place).to(tl.int64)
    value = tl.load(values + place).to(tl.float32)
    return value[:, None] * tl.load(x + k[:, None] * (stride_8 * 8) + line[None, :]).to(tl.float32)


@triton.jit
def _dense_kernel(dense, values, columns, entries, stride, COUNT: tl.constexpr, ENTRIES: tl.constexpr):
    """``ENTRIES`` outliers, summed in fp32 and rounded once."""
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    inside = entry < entries
    value = tl.load(values + entry, mask=inside, other=0.0).to(tl.float32)
    # No column stands twice in a row, so nothing is written twice.
    places = dense + entry // COUNT * stride + tl.load(columns + entry, mask=inside, other=0)
    total = tl.load(places, mask=inside, other=0.0).to(tl.float32) + value
    tl.store(places, total.to(dense.dtype.element_ty), mask=inside)


@triton.jit
def _add(y, sums, column, line, tokens, rows):
    """``y[tokens, rows] += sums``, rounded once."""
    stored = (column < rows)[:, None] & (line < tokens)[None, :]
    pointers = y + line[None, :].to(tl.int64) * rows + column[:, None]
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
    launch = _launch_few if tokens <= _FEW else _launch_many
    with launching_on(x.device):
        launch(y, x.reshape(tokens, x.shape[-1]), values, columns)


def add_to_dense(dense: Tensor, values: Tensor, columns: Tensor) -> None:
    """``dense += overlay``, every sum in fp32 and rounded once.

    Args:
        dense: ``[N, K]``, fp16, bf16 or fp32; the inputs of a row are neighbours. On a CPU only if the kernels are
            interpreted, and then not bf16.
        values, columns: As for :func:`add_product`; no column stands twice in a row.
    """
    entries, count = values.numel(), values.shape[1]
    if entries:
        with launching_on(dense.device):
            _dense_kernel[(triton.cdiv(entries, _ADDED),)](
                dense, values.contiguous(), columns.contiguous(), entries, dense.stride(0),
                COUNT=count, ENTRIES=_ADDED, num_warps=4,
            )  # fmt: skip


def _launch_few(y: Tensor, x: Tensor, values: Tensor, columns: Tensor) -> None:
    (rows, count), tokens = values.shape, x.shape[0]
    width = triton.next_power_of_2(tokens)
    outliers = min(_OUTLIERS, triton.next_power_of_2(count))
    height = min(_ROWS, _PRODUCTS // (width * outliers))
    # A copy made a moment ago must not be read ahead of its end.
    overlap = overlaps(x.device) and values.is_contiguous() and columns.is_contiguous()
    _few_tokens_kernel[(triton.cdiv(rows, height),)](
        y, x, values.contiguous(), columns.contiguous(), tokens, rows, *x.stride(),
        COUNT=count, TOKENS=width, OUTLIERS=outliers, ROWS=height, OVERLAP=overlap,
        num_warps=4, **launch_options(overlap),
    )  # fmt: skip


def _launch_many(y: Tensor, x: Tensor, values: Tensor, columns: Tensor) -> None:
    (rows, count), (tokens, inputs) = values.shape, x.shape
    width = min(_TOKENS, triton.next_power_of_2(tokens))
    tiles = triton.cdiv(tokens, width)
    # What fills up the last tile is read and not stored, so it may be anything.
    turned = x.new_empty(inputs, tiles * width)
    turned[:, :tokens] = x.mT
    # Eight tokens a thread.
    height = 16 if width == _TOKENS else 32
    _many_tokens_kernel[(triton.cdiv(rows, height), tiles)](
        y, turned, values.contiguous(), columns.contiguous(), tokens, rows, tiles * width // 8,
        COUNT=count, TOKENS=width, ROWS=height, UNDER_WAY=_UNDER_WAY, num_warps=height * width // 256,
    )  # fmt: skip
