"""Attention of one query per row over a long cache of keys and values, in plain Triton.

A GPU is busy only if many programs share the cache: each takes some blocks of it for all query heads that share its
keys, and a second kernel puts the parts together, in order (Dao et al., "Flash-Decoding", 2023). Blocks that the mask
excludes altogether are not read, so the unused end of a static cache costs nothing.
"""
# mypy: ignore-errors
# (Triton's compiler, not Python, runs most of this file.)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backend import launching_on
from .overlap import follow, launch_options, overlaps

# Tokens of the cache that a program reads at a time.
_BLOCK = 64
# Programs that keep a GPU busy.
_PROGRAMS = 256
_MOST_SPLITS = 64


def decode_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """``softmax(scale * query @ key.T, where mask) @ value`` for one query per row.

    Args:
        query: fp16 or bf16 ``[batch, heads, 1, K]``.
        key, value: ``[batch, key heads, length, K]`` and ``[batch, key heads, length, V]``; heads are a multiple of
            key heads, and neighbouring ones share keys.
        mask: bool, broadcastable to ``[batch, 1, 1, length]``, or None. A row without any True gives zeros.
        scale: Of the scores.

    Returns:
        ``[batch, heads, 1, V]`` in query's dtype. Sums are fp32; weights of the values are rounded to the dtype.
    """
    batch, heads, _, width = query.shape
    key_heads, length, value_width = key.shape[1], key.shape[2], value.shape[3]
    group = heads // key_heads
    blocks = triton.cdiv(length, _BLOCK)
    splits = min(blocks, max(1, _PROGRAMS // (batch * key_heads)), _MOST_SPLITS)
    if mask is not None:
        mask = mask.expand(batch, 1, 1, length)
    result = query.new_empty(batch, heads, 1, value_width)
    parts = query.new_empty(batch * heads, splits, value_width, dtype=torch.float32)
    stats = query.new_empty(batch * heads, splits, 2, dtype=torch.float32)
    overlap = overlaps(query.device)
    with launching_on(query.device):
        _attend_kernel[(batch * key_heads, splits)](
            query, key, value, query if mask is None else mask, parts, stats,
            scale * 1.4426950408889634, length, key_heads,
            query.stride(0), query.stride(1), query.stride(3),
            key.stride(0), key.stride(1), key.stride(2), key.stride(3),
            value.stride(0), value.stride(1), value.stride(2), value.stride(3),
            0 if mask is None else mask.stride(0), 0 if mask is None else mask.stride(3),
            GROUP=group, GROUP_PADDED=max(16, triton.next_power_of_2(group)), WIDTH=width,
            WIDTH_PADDED=max(16, triton.next_power_of_2(width)), VALUE_WIDTH=value_width,
            VALUE_PADDED=max(16, triton.next_power_of_2(value_width)), BLOCK=_BLOCK, HAS_MASK=mask is not None,
            OVERLAP=overlap, num_warps=4, **launch_options(overlap),
        )  # fmt: skip
        _combine_kernel[(batch * heads,)](
            parts, stats, result, splits, SPLITS_PADDED=triton.next_power_of_2(splits), WIDTH=value_width,
            WIDTH_PADDED=triton.next_power_of_2(value_width), OVERLAP=overlap, num_warps=2, **launch_options(overlap),
        )  # fmt: skip
    return result


@triton.jit(do_not_specialize=["scale", "length"])
def _attend_kernel(
    query_ptr, key_ptr, value_ptr, mask_ptr, parts_ptr, stats_ptr, scale, length, key_heads,
    query_row, query_head, query_column, key_row, key_head, key_token, key_column,
    value_row, value_head, value_token, value_column, mask_row, mask_token,
    GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PADDED: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr, BLOCK: tl.constexpr, HAS_MASK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Unnormalized ``parts[row and head, split, V]``, and as ``stats`` the largest score and the sum of weights.

    Scores are in units of log 2. A program takes every split-th block of one key head, for its GROUP query heads.
    """
    row, key_head_index = tl.program_id(0) // key_heads, tl.program_id(0) % key_heads
    split, splits = tl.program_id(1), tl.num_programs(1)
    row64 = row.to(tl.int64)
    head = tl.arange(0, GROUP_PADDED)
    column = tl.arange(0, WIDTH_PADDED)
    value_columns = tl.arange(0, VALUE_PADDED)
    token = tl.arange(0, BLOCK)
    if OVERLAP:
        follow()
    query_ptr += row64 * query_row + key_head_index * GROUP * query_head
    query = tl.load(
        query_ptr + head[:, None] * query_head + column[None, :] * query_column,
        (head < GROUP)[:, None] & (column < WIDTH)[None, :], 0,
    )  # fmt: skip
    key_ptr += row64 * key_row + key_head_index.to(tl.int64) * key_head
    value_ptr += row64 * value_row + key_head_index.to(tl.int64) * value_head
    mask_ptr += row64 * mask_row

    largest = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PADDED], tl.float32)
    sums = tl.zeros([GROUP_PADDED, VALUE_PADDED], tl.float32)
    for start in range(split * BLOCK, length, splits * BLOCK):
        place = start + token
        keep = place < length
        if HAS_MASK:
            keep = keep & (tl.load(mask_ptr + place * mask_token, keep, 0) != 0)
        if tl.max(keep.to(tl.int32), 0) > 0:
            place64 = place.to(tl.int64)
            keys = tl.load(
                key_ptr + place64[None, :] * key_token + column[:, None] * key_column,
                keep[None, :] & (column < WIDTH)[:, None], 0,
            )  # fmt: skip
            values = tl.load(
                value_ptr + place64[:, None] * value_token + value_columns[None, :] * value_column,
                keep[:, None] & (value_columns < VALUE_WIDTH)[None, :], 0,
            )  # fmt: skip
            scores = tl.where(keep[None, :], tl.dot(query, keys) * scale, float("-inf"))
            new_largest = tl.maximum(largest, tl.max(scores, 1))
            weights = tl.exp2(scores - new_largest[:, None])
            shrink = tl.exp2(largest - new_largest)
            total = total * shrink + tl.sum(weights, 1)
            sums = tl.dot(weights.to(values.dtype), values, sums * shrink[:, None])
            largest = new_largest
    first = (row64 * key_heads + key_head_index) * GROUP
    part = (first + head) * splits + split
    tl.store(
        parts_ptr + part[:, None] * VALUE_WIDTH + value_columns[None, :], sums,
        (head < GROUP)[:, None] & (value_columns < VALUE_WIDTH)[None, :],
    )  # fmt: skip
    tl.store(stats_ptr + part * 2, largest, head < GROUP)
    tl.store(stats_ptr + part * 2 + 1, total, head < GROUP)


@triton.jit(do_not_specialize=["splits"])
def _combine_kernel(
    parts_ptr, stats_ptr, result_ptr, splits,
    SPLITS_PADDED: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PADDED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The normalized sum of the splits' parts."""
    first = tl.program_id(0).to(tl.int64) * splits
    split = tl.arange(0, SPLITS_PADDED)
    column = tl.arange(0, WIDTH_PADDED)
    if OVERLAP:
        follow()
    largest = tl.load(stats_ptr + (first + split) * 2, split < splits, float("-inf"))
    total = tl.load(stats_ptr + (first + split) * 2 + 1, split < splits, 0)
    # Without any token everything is 0, not 0 / 0.
    overall = tl.maximum(tl.max(largest, 0), -1e38)
    shrink = tl.exp2(largest - overall)
    parts = tl.load(
        parts_ptr + (first + split)[:, None] * WIDTH + column[None, :],
        (split < splits)[:, None] & (column < WIDTH)[None, :], 0,
    )  # fmt: skip
    sums = tl.sum(parts * shrink[:, None], 0) / tl.maximum(tl.sum(total * shrink, 0), 1e-38)
    result_ptr += tl.program_id(0).to(tl.int64) * WIDTH
    tl.store(result_ptr + column, sums.to(result_ptr.dtype.element_ty), column < WIDTH)
