"""Bit-planes and a codebook per row: the format of scalar-codebook checkpoints.

A layer ``P`` with N outputs, K inputs and b bits is saved as ``P.weight`` (int32 ``[b, N, ceil(K / 32)]``; plane 0 is
the least significant code bit, bit i of word j belongs to input 32 j + i) and ``P.lut`` (``[N, 2**b]``, fp16 unless the
weights do not fit it), with its unquantized bias, if any, as ``P.bias``.

With n outliers in every row there are ``P.overlay_values`` (``[N, n]``, of the codebook's dtype), which are added to
the outliers' codewords, and ``P.overlay_columns`` (``[N, n]``, int16, or int32 from 32769 inputs on), their inputs,
which ascend in every row.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..codes import Codes, Overlay
from ..triton_kernels import pack_codes, unpack_codes, words_per_row

# fp16 holds a codebook well inside this range. Outside it the codebook is stored in fp32.
_FP16_LARGEST, _FP16_SMALLEST = 2.0**15, 2.0**-14


# Inputs that int16 can number.
_INT16_INPUTS = 2**15


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor that is not there yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def declare(
    out_features: int, in_features: int, bits: int, lut_dtype: torch.dtype, outliers: int = 0
) -> dict[str, TensorSpec]:
    """Names, shapes and dtypes of a layer's tensors, without the bias; ``outliers`` are those of a row."""
    specs = {
        "weight": TensorSpec((bits, out_features, words_per_row(in_features)), torch.int32),
        "lut": TensorSpec((out_features, 2**bits), lut_dtype),
    }
    if outliers:
        specs["overlay_values"] = TensorSpec((out_features, outliers), lut_dtype)
        specs["overlay_columns"] = TensorSpec((out_features, outliers), _columns_dtype(in_features))
    return specs


def encode(codes: Codes) -> dict[str, Tensor]:
    """Codes as the named tensors of :func:`declare`."""
    tensors = {"weight": pack_codes(codes.codes, codes.bits), "lut": codes.codebook}
    if codes.overlay is not None:
        tensors["overlay_values"] = codes.overlay.values
        tensors["overlay_columns"] = codes.overlay.columns.to(_columns_dtype(codes.codes.shape[1]))
    return {name: _apart(tensor) for name, tensor in tensors.items()}


def _apart(tensor: Tensor) -> Tensor:
    """The tensor, contiguous, in memory that holds nothing else."""
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def decode(tensors: dict[str, Tensor], in_features: int) -> Codes:
    """Inverse of :func:`encode`."""
    overlay = None
    if "overlay_values" in tensors:
        overlay = Overlay(tensors["overlay_columns"].long(), tensors["overlay_values"])
    return Codes(unpack_codes(tensors["weight"], in_features), tensors["lut"], overlay)


def outliers_per_row(in_features: int, share: float) -> int:
    """How many weights of a row make at least that share of it; never all of them."""
    return min(math.ceil(share * in_features), in_features - 1)


def are_columns(columns: Tensor, in_features: int) -> bool:
    """Whether ``columns [N, n]`` are inputs of a layer, ascending in every row, none twice."""
    if columns.numel() == 0:
        return True
    low, high = columns.aminmax()
    return bool(low >= 0) and bool(high < in_features) and bool((columns[:, 1:] > columns[:, :-1]).all())


def _columns_dtype(in_features: int) -> torch.dtype:
    return torch.int16 if in_features <= _INT16_INPUTS else torch.int32


def codebook_dtype(weight: Tensor) -> torch.dtype:
    """The dtype to store the codebook of ``weight [N, K]`` in: fp16, or fp32 where fp16 would not do.

    That is if the values of some row would overflow, or be so small that fp16 holds them with less than 11 bits.
    """
    largest = weight.abs().amax(dim=1)
    fits = (largest == 0) | ((largest >= _FP16_SMALLEST) & (largest <= _FP16_LARGEST))
    return torch.float16 if bool(fits.all()) else torch.float32
