"""What all solvers share: the settings they take, the result they give, and the small steps they have in common."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..codes import Overlay

# Elements at a time, where what comes out is smaller than what is on the way to it.
ELEMENTS = 1 << 25


@dataclass(frozen=True)
class SolverSpec:
    """Settings of one solve.

    Attributes:
        bits: Bits per weight; a codebook has ``2**bits`` entries.
        codebook_dtype: The dtype that codebooks are stored in. Results are exactly representable in it.
        lnq_sweeps, lnq_iterations, lnq_cycles, kmeans_iterations: See :class:`GuidedQuantConfig`.
        outliers: Weights of every row that are kept beside the codes; less than all.
    """

    bits: int
    codebook_dtype: torch.dtype = torch.float16
    lnq_sweeps: int = 3
    lnq_iterations: int = 2
    lnq_cycles: int = 4
    kmeans_iterations: int = 50
    outliers: int = 0

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
        overlay: Of the outliers (:mod:`.outliers`); methods leave it out.
        joint_left: Of the joint objective of a layer's rows (:mod:`.kronecker`), what is left: fp64, one per layer.
    """

    codes: Tensor
    codebook: Tensor
    objectives: dict[str, Tensor] = field(default_factory=dict)
    overlay: Overlay | None = None
    joint_left: Tensor | None = None


@dataclass(frozen=True)
class Method:
    """A solver, and what it needs.

    Attributes:
        solve: ``(weight [G, R, K], statistics, spec, outliers) -> Solution``. The errors of ``outliers``, bool
            ``[G, R, K]`` or None, count as zero; any codes will do for them.
        statistics: Nothing, the diagonal of the Hessian ``[G, K]``, or all of it ``[G, K, K]``.
        memory: ``(G, R, K) -> `` bytes in use at the worst moment, weights included, statistics not.
    """

    solve: Callable[..., Solution]
    statistics: Literal["none", "diagonal", "hessian"]
    memory: Callable[[int, int, int], int]


def parts(length: int, cost: int) -> Iterator[slice]:
    """Cut a dimension into parts of bounded memory, where each of its ``length`` steps means ``cost`` elements."""
    step = max(1, ELEMENTS // max(1, cost))
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def nearest(codebook: Tensor, values: Tensor) -> Tensor:
    """Index of the nearest entry: ascending codebooks ``[..., R, L]``, values -> uint8 ``[..., R, K]``."""
    midpoints = ((codebook[..., 1:] + codebook[..., :-1]) / 2).contiguous()
    codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    for rows in parts(values.shape[-2], values[..., 0, :].numel()):
        part = values[..., rows, :].contiguous()
        codes[..., rows, :] = torch.searchsorted(midpoints[..., rows, :].contiguous(), part, out_int32=True)
    return codes


def look_up(codes: Tensor, codebook: Tensor, weight: Tensor, outliers: Tensor | None) -> Tensor:
    """Quantized weights ``[G, R, K]`` of codes ``[G, R, K]`` and codebooks ``[G, R, L]``; outliers are as they were."""
    quantized = codebook.gather(-1, codes.long())
    return quantized if outliers is None else torch.where(outliers, weight, quantized)


def without(outliers: Tensor | None, weight: Tensor) -> Tensor:
    """The weights, every outlier replaced by the smallest other weight of its row, so that it adds no value."""
    if outliers is None:
        return weight
    return torch.where(outliers, weight.masked_fill(outliers, torch.inf).amin(dim=-1, keepdim=True), weight)


def round_codebook(codebook: Tensor, dtype: torch.dtype) -> Tensor:
    """The codebook as it will be read back from a file in ``dtype``, in the codebook's own dtype."""
    limit = torch.finfo(dtype).max
    return codebook.clamp(-limit, limit).to(dtype).to(codebook.dtype)


def sort_codebook(codes: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Bring every row's codebook ``[..., R, L]`` into ascending order; renumber its codes, uint8 ``[..., R, K]``."""
    ordered, order = codebook.sort(dim=-1, stable=True)
    ranks = order.argsort(dim=-1).to(torch.uint8)
    renumbered = torch.empty_like(codes)
    for rows in parts(codes.shape[-2], codes[..., 0, :].numel()):
        renumbered[..., rows, :] = ranks[..., rows, :].gather(-1, codes[..., rows, :].long())
    return renumbered, ordered


def row_objective(weight: Tensor, quantized: Tensor, statistics: Tensor | None) -> Tensor:
    """``(ŵ - w)ᵀ H (ŵ - w)`` of every row: ``[G, R, K]`` and a Hessian, its diagonal, or None -> fp64 ``[G, R]``."""
    objective = weight.new_empty(weight.shape[:-1], dtype=torch.float64)
    for rows in parts(weight.shape[1], weight[:, 0].numel()):
        error = quantized[:, rows] - weight[:, rows]
        if statistics is None:
            weighted = error
        elif statistics.dim() == 2:
            weighted = error * statistics.unsqueeze(1)
        else:
            weighted = error @ statistics
        objective[:, rows] = (error * weighted).sum(dim=-1, dtype=torch.float64)
    return objective
