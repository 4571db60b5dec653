"""Bit-planes and a codebook per row: the format of scalar-codebook checkpoints.

A layer ``P`` with N outputs, K inputs and b bits is saved as ``P.weight`` (int32 ``[b, N, ceil(K / 32)]``; plane 0 is
the least significant code bit, bit i of word j belongs to input 32 j + i) and ``P.lut`` (``[N, 2**b]``, fp16 unless the
weights do not fit it), with its unquantized bias, if any, as ``P.bias``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..codes import Codes
from ..triton_kernels import pack_codes, unpack_codes, words_per_row

# fp16 holds a codebook well inside this range. Outside it the codebook is stored in fp32.
_FP16_LARGEST, _FP16_SMALLEST = 2.0**15, 2.0**-14


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor that is not there yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def declare(out_features: int, in_features: int, bits: int, lut_dtype: torch.dtype) -> dict[str, TensorSpec]:
    """Names, shapes and dtypes of a layer's tensors, without the bias."""
    return {
        "weight": TensorSpec((bits, out_features, words_per_row(in_features)), torch.int32),
        "lut": TensorSpec((out_features, 2**bits), lut_dtype),
    }


def encode(codes: Codes) -> dict[str, Tensor]:
    """Codes as the named tensors of :func:`declare`."""
    return {"weight": pack_codes(codes.codes, codes.bits), "lut": codes.codebook.contiguous()}


def decode(tensors: dict[str, Tensor], in_features: int) -> Codes:
    """Inverse of :func:`encode`."""
    return Codes(unpack_codes(tensors["weight"], in_features), tensors["lut"])


def codebook_dtype(weight: Tensor) -> torch.dtype:
    """The dtype to store the codebook of ``weight [N, K]`` in: fp16, or fp32 where fp16 would not do.

    That is if the values of some row would overflow, or be so small that fp16 holds them with less than 11 bits.
    """
    largest = weight.abs().amax(dim=1)
    fits = (largest == 0) | ((largest >= _FP16_SMALLEST) & (largest <= _FP16_LARGEST))
    return torch.float16 if bool(fits.all()) else torch.float32
