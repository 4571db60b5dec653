"""What a solver hands to a format: :class:`Codes`."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Overlay:
    """Outliers, so many in every row: what is added to their codewords.

    Attributes:
        columns: int64 ``[..., N, n]``, the inputs that they belong to, ascending in every row.
        values: ``[..., N, n]`` in the dtype that they are stored in.
    """

    columns: Tensor
    values: Tensor


@dataclass(frozen=True)
class Codes:
    """A quantized matrix: ``W[n, k] ≈ codebook[n, codes[n, k]]``, and what an overlay adds to that.

    Attributes:
        codes: uint8 ``[N, K]``.
        codebook: ``[N, 2**bits]`` in the dtype it is stored in, ascending in every row.
        overlay: Of the outliers, if there are any.
    """

    codes: Tensor
    codebook: Tensor
    overlay: Overlay | None = None

    @property
    def bits(self) -> int:
        return (self.codebook.shape[1] - 1).bit_length()
