"""One block of LNQ's coordinate descent as a single launch, in Triton.

Steps follow each other, and a few thousand rows are all there is to keep a GPU busy, so a step must be short: within 16
inputs it is arithmetic on registers alone, a row per lane, without a word between threads. After these 16 one small
fp32 product brings the rest of the block up to date, which costs 16 times fewer exchanges than doing it in every step.
"""
# mypy: ignore-errors
# (Triton's compiler, not Python, runs most of this file.)

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_kernels.backend import launching_on
from .quadratic import BLOCK

# Inputs between two products, rows of a program and its warps.
_STEPS, _ROWS, _WARPS = 16, 32, 4


@triton.jit
def _columns(matrix):
    """``[n, m]``, m a power of two -> its m columns, in order."""
    if matrix.shape[1] == 1:
        return (tl.reshape(matrix, [matrix.shape[0]]),)
    else:
        halves = tl.reshape(matrix, [matrix.shape[0], 2, matrix.shape[1] // 2])
        first, second = tl.split(tl.permute(halves, (0, 2, 1)))
        return _columns(first) + _columns(second)


@triton.jit
def _load_codebook(codebook, rows, BITS: tl.constexpr):
    """The ascending entries of every row and the midpoints between them; nothing where they are too many to hold."""
    entries = ()
    midpoints = ()
    if BITS <= 4:
        for level in tl.static_range(2**BITS):
            entries = entries + (tl.load(codebook + level * rows),)
        for level in tl.static_range(2**BITS - 1):
            midpoints = midpoints + ((entries[level + 1] + entries[level]) / 2,)
    return entries, midpoints


@triton.jit
def _nearest(target, codebook, rows, entries, midpoints, BITS: tl.constexpr):
    """The entry nearest to the target, the lower one of two; ``codebook [L, rows]`` is searched if not held."""
    if BITS <= 4:
        value = entries[0]
        for level in tl.static_range(2**BITS - 1):
            value = tl.where(target > midpoints[level], entries[level + 1], value)
        return value
    else:
        code = tl.zeros(target.shape, tl.int64)
        # A loop at run time: unrolled, it takes the compiler minutes.
        for bit in range(BITS):
            upper = code + (2 ** (BITS - 1) >> bit)
            midpoint = (tl.load(codebook + upper * rows) + tl.load(codebook + (upper - 1) * rows)) / 2
            code = tl.where(target > midpoint, upper, code)
        return tl.load(codebook + code * rows)


@triton.jit(do_not_specialize=["start", "offset", "count"])
def descent_kernel(
    hessian, inverse, pull, quantized, codebook, outliers, change, start, offset, count, inputs, rows, panel,
    BITS: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Inputs ``start .. start + count - 1`` of ``ROWS`` rows of a group. Arguments as those of :func:`descend`."""
    group = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    # Rows past the end repeat the last one and are not stored.
    lane = tl.minimum(row, rows - 1)
    place = tl.arange(0, BLOCK)
    step = tl.arange(0, STEPS)
    # The block's own piece of the Hessian, and the parts of the other arrays that begin with the block.
    hessian += (group * inputs + start) * inputs + start
    inverse += group * inputs + start
    pull += (group * panel + offset) * rows
    quantized += (group * inputs + start) * rows
    if outliers is not None:
        outliers += (group * inputs + start) * rows
    change += group * count * rows
    codebook += group * rows * 2**BITS + lane
    entries, midpoints = _load_codebook(codebook, rows, BITS)

    # What lies past the block's end is read from its last input, never changes and is not stored.
    at = tl.minimum(place, count - 1)
    slopes = tl.load(pull + at[:, None] * rows + lane[None, :])  # H e, kept up to date
    for first in range(0, count, STEPS):
        own = tl.minimum(first + step, count - 1)
        beside = tl.load(hessian + at.to(tl.int64)[:, None] * inputs + own[None, :])  # [BLOCK, STEPS]
        old = ()
        for j in tl.static_range(STEPS):
            old = old + (tl.load(quantized + tl.minimum(first + j, count - 1) * rows + lane),)
        parts = tl.reshape(slopes, [BLOCK // STEPS, STEPS, ROWS])
        here = (tl.arange(0, BLOCK // STEPS) == first // STEPS)[:, None, None]
        slope = _columns(tl.permute(tl.sum(tl.where(here, parts, 0.0), axis=0), (1, 0)))
        values = ()
        changes = ()
        for j in tl.static_range(STEPS):
            k = tl.minimum(first + j, count - 1)
            total = slope[j]
            for i in tl.static_range(j):
                total += tl.load(hessian + k.to(tl.int64) * inputs + tl.minimum(first + i, count - 1)) * changes[i]
            value = _nearest(old[j] - total * tl.load(inverse + k), codebook, rows, entries, midpoints, BITS)
            if outliers is not None:
                value = tl.where(tl.load(outliers + k * rows + lane) != 0, old[j], value)
            values = values + (value,)
            changes = changes + (value - old[j],)
        for j in tl.static_range(STEPS):
            keep = inside & (first + j < count)
            tl.store(quantized + (first + j) * rows + row, values[j], keep)
            tl.store(change + (first + j) * rows + row, changes[j], keep)
        # Threads read what others wrote: the changes, now as a matrix.
        tl.debug_barrier()
        moved = tl.load(change + own[:, None] * rows + lane[None, :], (first + step < count)[:, None], 0.0)
        slopes = tl.dot(beside, moved, slopes, input_precision="ieee")


def descend(
    hessian: Tensor,
    inverse: Tensor,
    pull: Tensor,
    quantized: Tensor,
    codebook: Tensor,
    block: slice,
    offset: int,
    outliers: Tensor | None = None,
) -> Tensor:
    """Take the inputs of a block, in order, each to its best entry given all others, in place.

    Args:
        hessian: fp32 ``[G, K, K]``, symmetric, as all tensors contiguous.
        inverse: One over its diagonal, ``[G, K]``.
        pull: ``H (ŵ - w)`` of some of the inputs, ``[G, P, R]``; the block's begin at ``offset``. Unchanged.
        quantized: ``ŵ [G, K, R]``.
        codebook: Ascending, ``[G, L, R]``.
        block: Its inputs, at most :data:`BLOCK`.
        offset: See ``pull``.
        outliers: Inputs that stay where they are, bool ``[G, K, R]``, or None.

    Returns:
        What was added to ``quantized``, ``[G, inputs of the block, R]``.
    """
    groups, inputs, rows = quantized.shape
    count = block.stop - block.start
    bits = codebook.shape[1].bit_length() - 1
    change = quantized.new_empty(groups, count, rows)
    stay = None if outliers is None else outliers.view(torch.uint8)
    with launching_on(quantized.device):
        descent_kernel[triton.cdiv(rows, _ROWS), groups](
            hessian, inverse, pull, quantized, codebook, stay, change,
            block.start, offset, count, inputs, rows, pull.shape[1],
            # More stages would fetch every scalar of the Hessian by itself, asynchronously.
            BITS=bits, BLOCK=BLOCK, STEPS=_STEPS, ROWS=_ROWS, num_warps=_WARPS, num_stages=1,
        )  # fmt: skip
    return change
