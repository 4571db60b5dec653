"""Sums by code in Triton: the values are read once for every sixteen codes, and bit-planes are never unpacked."""
# mypy: ignore-errors
# (Triton's compiler, not Python, runs most of this file.)

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_kernels.backend import launching_on

# Values that a program has in hand at a time, and codes whose sums it keeps.
_BLOCK, _LEVELS = 256, 16


@triton.jit
def _sums_kernel(
    values, codes, result, inputs, plane_stride, row_stride,
    BITS: tl.constexpr, LEVELS: tl.constexpr, PLANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of a row, of ``LEVELS`` codes. Every lane sums its own columns in order, then all lanes are added up."""
    row = tl.program_id(0).to(tl.int64)
    level = tl.program_id(1) * LEVELS + tl.arange(0, LEVELS)
    sums = tl.zeros([LEVELS, BLOCK], tl.float32)
    for start in range(0, inputs, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < inputs
        value = tl.load(values + row * inputs + column, mask=inside, other=0.0)
        if PLANES:
            code = tl.zeros([BLOCK], tl.int32)
            for plane in tl.static_range(BITS):
                word = tl.load(codes + plane * plane_stride + row * row_stride + column // 32, mask=inside, other=0)
                code |= ((word >> (column % 32)) & 1) << plane
        else:
            code = tl.load(codes + row * row_stride + column, mask=inside, other=0).to(tl.int32)
        sums += tl.where(code[None, :] == level[:, None], value[None, :], 0.0)
    tl.store(result + row * (1 << BITS) + level, tl.sum(sums, axis=1))


def sums_by_code(values: Tensor, codes: Tensor, levels: int) -> Tensor:
    """As :func:`.code_sums.sums_by_code`, of fp32 values."""
    rows, inputs = values.shape
    planes = codes.dim() == 3
    values = values.contiguous()
    if codes.stride(-1) != 1:
        codes = codes.contiguous()
    result = torch.empty(rows, levels, device=values.device)
    together = min(levels, _LEVELS)
    with launching_on(values.device):
        _sums_kernel[rows, levels // together](
            values, codes, result, inputs, codes.stride(0), codes.stride(-2),
            BITS=levels.bit_length() - 1, LEVELS=together, PLANES=planes, BLOCK=_BLOCK,
        )  # fmt: skip
    return result
