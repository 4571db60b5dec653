"""The ops in plain Triton, without inline assembly: for any GPU that Triton knows, and for tests on a CPU.

A CPU needs ``TRITON_INTERPRET=1`` in the environment before triton is first imported, and is slow.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backend import launching_on
from .reference import WORD_BITS

_WARPS = 4
# 32-bit words that a program decodes at a time: one for each thread where a warp has 32.
_TILE_WORDS = _WARPS * 32
# The addresses of a gather say nothing about a good layout. Triton then spreads a warp over the last dimension; before
# 3.7, over the first.
_WARP_ALONG_FIRST = tl.constexpr(tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 7))


class Tile(NamedTuple):
    """Outputs of one program, ``[tokens, rows]``, both powers of two, and the stages of its loop's pipeline."""

    tokens: int
    rows: int
    stages: int = 2

    @property
    def words(self) -> int:
        """Words of every row that are decoded at a time."""
        return _TILE_WORDS // self.rows


def choose_tile(tokens: int, rows: int, dtype: torch.dtype) -> Tile:
    """The tile for ``[tokens, K] @ [rows, K].T``: decoding takes the time, so the more tokens share it the better."""
    # With few rows, small tiles keep more of the device busy.
    narrow = rows <= 8192
    # Pipelining fp32 takes the codewords through shared memory as well, and spills registers.
    stages = 1 if dtype == torch.float32 else 2
    if tokens == 1:
        return Tile(1, 4 if rows <= 2048 else 8, stages)
    if tokens <= 32:
        return Tile(16 if tokens <= 16 else 32, 16 if narrow else 32, stages)
    if tokens <= 256 or dtype == torch.float32:
        return Tile(64, 32 if narrow else 64, stages)
    return Tile(128, 64, stages)


@triton.jit
def _codewords(
    weight, lut, row, start, inputs, plane_stride, row_stride, word_stride,
    BITS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Weights ``[32, ROWS, WORDS]``: place in its word, row, word from input ``start`` on; 0 past the last input.

    The place lies along a thread's registers, not across a warp: so one thread loads a word and shifts it by constants.
    """
    word = start // 32 + tl.arange(0, WORDS)
    pointers = weight + row[:, None] * row_stride + word.to(tl.int64)[None, :] * word_stride
    place = tl.arange(0, 32)[:, None, None]
    codes = tl.zeros([32, ROWS, WORDS], tl.int32)
    for plane in tl.static_range(BITS):
        bits = tl.load(pointers, mask=(word * 32 < inputs)[None, :], other=0)
        codes |= ((bits[None, :, :] >> place) & 1) << plane
        # Stepping, because plane times stride may leave int32.
        pointers += plane_stride
    # An infinite codeword that no input uses must not meet the zeros past x's end.
    inside = word[None, None, :] * 32 + place < inputs
    if _WARP_ALONG_FIRST:
        codes, inside = tl.permute(codes, (2, 1, 0)), tl.permute(inside, (2, 1, 0))
    codewords = tl.load(lut + (row << BITS)[None, :, None] + codes, mask=inside, other=0.0)
    return tl.permute(codewords, (2, 1, 0)) if _WARP_ALONG_FIRST else codewords


@triton.jit
def _vector_kernel(
    x, weight, lut, bias, out, rows, inputs, plane_stride, row_stride, word_stride,
    BITS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """The only token times ``ROWS`` rows, multiplied and summed in fp32."""
    column = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    # Rows past the end repeat the last one and are not stored: cheaper than a mask on every load.
    row = tl.minimum(column, rows - 1).to(tl.int64)
    sums = tl.zeros([ROWS, WORDS], tl.float32)
    for start in range(0, inputs, WORDS * 32):
        k = start + tl.arange(0, WORDS)[None, :] * 32 + tl.arange(0, 32)[:, None]
        values = tl.load(x + k, mask=k < inputs, other=0.0)
        codewords = _codewords(
            weight, lut, row, start, inputs, plane_stride, row_stride, word_stride, BITS, ROWS, WORDS
        )  # fmt: skip
        sums += tl.sum(codewords.to(tl.float32) * values.to(tl.float32)[:, None, :], axis=0)
    total = tl.sum(sums, axis=1)
    if bias is not None:
        total += tl.load(bias + row).to(tl.float32)
    tl.store(out + column, total.to(out.dtype.element_ty), mask=column < rows)


@triton.jit(do_not_specialize=["tokens"])
def _matrix_kernel(
    x, weight, lut, bias, out, tokens, rows, inputs, token_stride, plane_stride, row_stride, word_stride,
    BITS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """``TOKENS`` tokens times ``ROWS`` rows by ``tl.dot``."""
    tiles = tl.cdiv(rows, ROWS)
    line = tl.program_id(0) // tiles * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    # As above: what lies past the end repeats the last token or row and is not stored.
    token = tl.minimum(line, tokens - 1).to(tl.int64)
    row = tl.minimum(column, rows - 1).to(tl.int64)
    sums = tl.zeros([TOKENS, ROWS], tl.float32)
    for start in range(0, inputs, WORDS * 32):
        k = start + tl.arange(0, WORDS * 32)
        pointers = x + token[:, None] * token_stride + k[None, :]
        values = tl.load(pointers, mask=(k < inputs)[None, :], other=0.0)
        codewords = _codewords(
            weight, lut, row, start, inputs, plane_stride, row_stride, word_stride, BITS, ROWS, WORDS
        )  # fmt: skip
        columns = tl.reshape(tl.permute(codewords, (2, 0, 1)), [WORDS * 32, ROWS])
        sums = tl.dot(values, columns, sums, input_precision="ieee")
    if bias is not None:
        sums += tl.load(bias + row).to(tl.float32)[None, :]
    stored = (line < tokens)[:, None] & (column < rows)[None, :]
    pointers = out + line.to(tl.int64)[:, None] * rows + column[None, :]
    tl.store(pointers, sums.to(out.dtype.element_ty), mask=stored)


@triton.jit
def _dense_kernel(
    weight, lut, out, rows, inputs, plane_stride, row_stride, word_stride,
    BITS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """``ROWS`` × ``32 * WORDS`` entries of the dense matrix."""
    tiles = tl.cdiv(inputs, WORDS * 32)
    column = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(column, rows - 1).to(tl.int64)
    start = tl.program_id(0) % tiles * (WORDS * 32)
    k = start + tl.arange(0, WORDS * 32)
    codewords = _codewords(weight, lut, row, start, inputs, plane_stride, row_stride, word_stride, BITS, ROWS, WORDS)
    dense = tl.reshape(tl.permute(codewords, (1, 2, 0)), [ROWS, WORDS * 32])
    stored = (column < rows)[:, None] & (k < inputs)[None, :]
    tl.store(out + row[:, None] * inputs + k[None, :], dense, mask=stored)


INTERPRETED = not isinstance(_dense_kernel, triton.JITFunction)


def lut_linear(x: Tensor, weight: Tensor, lut: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ dequantized.T + bias``, summed in fp32 and rounded once, the same bits at every call.

    Args:
        x: ``[..., K]``, fp16, bf16 or fp32, any strides. On a CPU only if :data:`INTERPRETED`.
        weight: Bit-planes int32 ``[bits, N, ceil(K / 32)]``, any strides, bits 1-8.
        lut: Codebooks ``[N, 2**bits]``, any floating point dtype; rounded to x's.
        bias: ``[N]`` or None; rounded to x's dtype.

    Returns:
        ``[..., N]`` in x's dtype, contiguous.
    """
    if INTERPRETED and x.dtype == torch.bfloat16:
        # The interpreter's bf16 is no arithmetic: `tl.dot` multiplies the bit patterns and stores cut off.
        rounded = None if bias is None else bias.to(x.dtype).float()
        return lut_linear(x.float(), weight, lut.to(x.dtype).float(), rounded).to(x.dtype)
    bits, rows, _ = weight.shape
    inputs = x.shape[-1]
    tokens = math.prod(x.shape[:-1])
    out = torch.empty(*x.shape[:-1], rows, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    flat = x.reshape(tokens, inputs)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    tile = choose_tile(tokens, rows, x.dtype)
    # The codebook and the bias are small. Rounding them here spares the kernels a conversion per weight.
    lut = lut.to(x.dtype).contiguous()
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    meta = {"BITS": bits, "ROWS": tile.rows, "WORDS": tile.words, "num_warps": _WARPS, "num_stages": tile.stages}
    programs = triton.cdiv(tokens, tile.tokens) * triton.cdiv(rows, tile.rows)
    with launching_on(x.device):
        if tokens == 1:
            _vector_kernel[(programs,)](flat, weight, lut, bias, out, rows, inputs, *weight.stride(), **meta)
        else:
            strides = flat.stride(0), *weight.stride()
            meta["TOKENS"] = tile.tokens
            _matrix_kernel[(programs,)](flat, weight, lut, bias, out, tokens, rows, inputs, *strides, **meta)
    return out


def lut_dequantize(weight: Tensor, lut: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    """The dense matrix ``[N, in_features]`` in ``dtype``: the codewords rounded to it, nothing else.

    Args:
        weight: Bit-planes int32 ``[bits, N, ceil(in_features / 32)]``, any strides, bits 1-8.
        lut: Codebooks ``[N, 2**bits]``, any floating point dtype.
        in_features: K.
        dtype: fp16, bf16, fp32 or fp64.
    """
    bits, rows, _ = weight.shape
    out = torch.empty(rows, in_features, dtype=dtype, device=weight.device)
    if out.numel() == 0:
        return out
    tile = Tile(1, 8)
    programs = triton.cdiv(rows, tile.rows) * triton.cdiv(in_features, tile.words * WORD_BITS)
    with launching_on(weight.device):
        _dense_kernel[(programs,)](
            weight, lut.to(dtype).contiguous(), out, rows, in_features, *weight.stride(),
            BITS=bits, ROWS=tile.rows, WORDS=tile.words, num_warps=_WARPS,
        )  # fmt: skip
    return out
