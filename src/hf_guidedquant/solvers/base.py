"""What all solvers share: the settings they take, the result they give, and the small steps they have in common."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class SolverSpec:
    """Settings of one solve.

    Attributes:
        bits: Bits per weight; a codebook has ``2**bits`` entries.
        codebook_dtype: The dtype that codebooks are stored in. Results are exactly representable in it.
        lnq_iterations, lnq_cycles, kmeans_iterations: See :class:`GuidedQuantConfig`.
    """

    bits: int
    codebook_dtype: torch.dtype = torch.float16
    lnq_iterations: int = 2
    lnq_cycles: int = 4
    kmeans_iterations: int = 50

    @property
    def levels(self) -> int:
        return 2**self.bits


@dataclass(frozen=True)
class Solution:
    """Result of a solve over G groups of R rows with K inputs.

    Attributes:
        codes: uint8 ``[G, R, K]``.
        codebook: ``[G, R, 2**bits]`` in ``codebook_dtype``, ascending.
        objectives: Stage name -> fp64 ``[G, R]``, the value of ``(ŵ - w)ᵀ H (ŵ - w)`` after that stage, in order.
    """

    codes: Tensor
    codebook: Tensor
    objectives: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A solver and the statistics it needs: nothing, the diagonal of the Hessian ``[G, K]``, or all of it."""

    solve: Callable[..., Solution]
    statistics: Literal["none", "diagonal", "hessian"]


def nearest(codebook: Tensor, values: Tensor) -> Tensor:
    """Index of the nearest entry: ascending ``codebook [..., L]``, ``values [..., K]`` -> int64 ``[..., K]``."""
    midpoints = (codebook[..., 1:] + codebook[..., :-1]) / 2
    return torch.searchsorted(midpoints.contiguous(), values.contiguous())


def round_codebook(codebook: Tensor, dtype: torch.dtype) -> Tensor:
    """The codebook as it will be read back from a file in ``dtype``, in the codebook's own dtype."""
    limit = torch.finfo(dtype).max
    return codebook.clamp(-limit, limit).to(dtype).to(codebook.dtype)


def sort_codebook(codes: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Bring every row's codebook into ascending order and renumber its codes (int64 ``[..., K]``) to match."""
    ordered, order = codebook.sort(dim=-1, stable=True)
    return order.argsort(dim=-1).gather(-1, codes), ordered


def row_objective(weight: Tensor, quantized: Tensor, statistics: Tensor | None) -> Tensor:
    """``(ŵ - w)ᵀ H (ŵ - w)`` of every row: ``[G, R, K]`` and a Hessian, its diagonal, or None -> fp64 ``[G, R]``."""
    error = quantized - weight
    if statistics is None:
        weighted = error
    elif statistics.dim() == 2:
        weighted = error * statistics.unsqueeze(1)
    else:
        weighted = error @ statistics
    return (error * weighted).sum(dim=-1, dtype=torch.float64)
