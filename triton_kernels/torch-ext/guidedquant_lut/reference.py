"""The ops in plain torch. This is the truth that every kernel is tested against; it runs on any device and dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor

WORD_BITS = 32
# Values ``[N, n]`` and columns ``[N, n]`` of outliers, ascending in every row: what is added to a matrix ``[N, K]``.
Overlay = tuple[Tensor, Tensor] | None

# Weights to expand at a time, so that unpacking never needs much more memory than its result.
_CHUNK = 1 << 24


def words_per_row(in_features: int) -> int:
    """int32 words that one bit-plane of a row takes."""
    return -(-in_features // WORD_BITS)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into bit-planes.

    Args:
        codes: uint8 ``[N, K]``, every value below ``2**bits``.
        bits: Bit-planes to write, 1-8.

    Returns:
        int32 ``[bits, N, ceil(K / 32)]``. Plane 0 is the least significant code bit; bit i of word j belongs to input
        ``32 j + i``. Bits past K are 0.
    """
    rows, inputs = codes.shape
    words = words_per_row(inputs)
    padded = F.pad(codes, (0, words * WORD_BITS - inputs)).view(rows, words * 4, 8)
    place = torch.arange(8, device=codes.device, dtype=torch.uint8)
    planes = []
    for plane in range(bits):
        bit = (padded >> plane) & 1
        # The places of a byte do not overlap, so the sum stays below 256 and is exact in uint8.
        octets = (bit << place).sum(dim=-1, dtype=torch.uint8)
        planes.append(octets.view(torch.int32))
    return torch.stack(planes)


def _octet_table(device: torch.device) -> Tensor:
    """int64 ``[256]``: entry v holds the 8 bits of v as 8 bytes, so that one look-up spreads a byte over 8 codes."""
    values = torch.arange(256, device=device, dtype=torch.int32).unsqueeze(1)
    bits = (values >> torch.arange(8, device=device, dtype=torch.int32)) & 1
    return bits.to(torch.uint8).view(torch.int64).squeeze(1)


def unpack_codes(weight: Tensor, in_features: int) -> Tensor:
    """Inverse of :func:`pack_codes`: int32 ``[bits, N, ceil(K / 32)]`` -> uint8 ``[N, K]``."""
    bits, rows, words = weight.shape
    octets = weight.contiguous().view(torch.uint8).view(bits, -1)
    table = _octet_table(weight.device)
    spread = table.index_select(0, octets[0].int())
    for plane in range(1, bits):
        # Eight codes sit in one int64, a byte each; a code has at most 8 bits, so shifting never crosses a byte.
        spread |= table.index_select(0, octets[plane].int()) << plane
    return spread.view(torch.uint8).view(rows, words * WORD_BITS)[:, :in_features]


def lut_dequantize(weight: Tensor, lut: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    """The dense matrix ``[N, in_features]`` that codes and codebooks stand for, in ``dtype``."""
    _, rows, words = weight.shape
    entries = lut.shape[1]
    values = lut.to(dtype).flatten()
    dense = torch.empty(rows, in_features, dtype=dtype, device=weight.device)
    step = max(1, _CHUNK // max(1, words * WORD_BITS))
    for start in range(0, rows, step):
        codes = unpack_codes(weight[:, start : start + step], in_features)
        first = torch.arange(start, start + codes.shape[0], device=weight.device, dtype=torch.int32) * entries
        index = codes.to(torch.int32).add_(first.unsqueeze(1))
        dense[start : start + step] = values.index_select(0, index.flatten()).view(index.shape)
    return dense


def add_overlay(dense: Tensor, overlay: Overlay) -> Tensor:
    """``dense [N, K]``, to which the overlay is added in place; every sum is rounded once."""
    if overlay is not None:
        values, places = overlay[0], overlay[1].long()
        wide = torch.promote_types(dense.dtype, torch.float32)
        sums = dense.gather(1, places).to(wide) + values.to(wide)
        # No column stands twice in a row, so nothing is written twice.
        dense.scatter_(1, places, sums.to(dense.dtype))
    return dense


def lut_linear(x: Tensor, weight: Tensor, lut: Tensor, bias: Tensor | None, overlay: Overlay = None) -> Tensor:
    """``x @ (dequantized + overlay).T + bias`` in x's dtype: ``[..., K] -> [..., N]``."""
    dense = add_overlay(lut_dequantize(weight, lut, x.shape[-1], x.dtype), overlay)
    return F.linear(x, dense, None if bias is None else bias.to(x.dtype))
