"""The published any-precision format: one stack of bit-planes, and a codebook per row for every width it is read at.

A layer ``P`` with N outputs, K inputs (a multiple of 32) and B planes is saved as ``P.qweight`` (int32
``[B, N, K / 32]``; plane 0 is the most significant code bit, and the first b planes are the codes of width b) and
``P.lut{b}`` (fp16 ``[N, 2**b]``) for each width. Weights are counted in blocks of 1024, of which the last may be
shorter. In a block of T words, bit ``31 - 8 j - e`` of word t belongs to weight ``8 T j + 8 t + e``, with j in 0-3 and
e in 0-7.

Source: Park et al., "Any-Precision LLM" (ICML 2024), and the checkpoints of GuidedQuant (Kim et al., ICML 2025).
"""

import torch
from torch import Tensor

from .lut import TensorSpec

INPUTS_PER_WORD = 32
_WORDS_PER_BLOCK = 32


def declare(out_features: int, in_features: int, planes: int, bits: int) -> dict[str, TensorSpec]:
    """Names, shapes and dtypes of the tensors of a layer that codes of width ``bits`` are read from."""
    return {
        "qweight": TensorSpec((planes, out_features, in_features // INPUTS_PER_WORD), torch.int32),
        f"lut{bits}": TensorSpec((out_features, 2**bits), torch.float16),
    }


def bit_planes(qweight: Tensor, bits: int) -> Tensor:
    """The codes of width ``bits`` as the bit-planes of :mod:`.lut`.

    Args:
        qweight: int32 ``[B, N, K / 32]``.
        bits: The width, at most B.

    Returns:
        int32 ``[bits, N, K / 32]``, plane 0 the least significant.
    """
    # Memory holds a word's least significant byte first.
    octets = qweight[:bits].flip(0).view(torch.uint8).unflatten(-1, (-1, 4)).flip(-1)
    whole = octets.shape[2] // _WORDS_PER_BLOCK * _WORDS_PER_BLOCK
    blocks = [*octets[:, :, :whole].split(_WORDS_PER_BLOCK, dim=2), octets[:, :, whole:]]
    # A block's octets stand word by word, and are counted byte by byte.
    ordered = torch.cat([block.mT.flatten(2) for block in blocks], dim=2)
    return _reversed_bits(ordered).view(torch.int32)


def _reversed_bits(octets: Tensor) -> Tensor:
    """uint8 with the most significant bit first -> least significant first."""
    octets = (octets >> 4) | (octets << 4)
    octets = ((octets >> 2) & 0x33) | ((octets & 0x33) << 2)
    return ((octets >> 1) & 0x55) | ((octets & 0x55) << 1)
