"""What a solver hands to a format: :class:`Codes`."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Codes:
    """A quantized matrix: ``W[n, k] ≈ codebook[n, codes[n, k]]``.

    Attributes:
        codes: uint8 ``[N, K]``.
        codebook: ``[N, 2**bits]`` in the dtype it is stored in, ascending in every row.
    """

    codes: Tensor
    codebook: Tensor

    @property
    def bits(self) -> int:
        return (self.codebook.shape[1] - 1).bit_length()
