"""Round-to-nearest: a uniform grid between every row's smallest and largest weight. The baseline; needs no data."""

import torch
from torch import Tensor

from .base import Solution, SolverSpec, look_up, nearest, round_codebook, row_objective, without


def memory(groups: int, rows: int, inputs: int) -> int:
    """Bytes at the worst moment."""
    return 24 * groups * rows * inputs


def solve(weight: Tensor, statistics: Tensor | None, spec: SolverSpec, outliers: Tensor | None = None) -> Solution:
    """Quantize ``weight [G, R, K]`` to ``2**bits`` evenly spaced values per row."""
    codebook = grid(without(outliers, weight), spec)
    codes = nearest(codebook, weight)
    objective = row_objective(weight, look_up(codes, codebook, weight, outliers), statistics)
    return Solution(codes, codebook.to(spec.codebook_dtype), {"rtn": objective})


def grid(weight: Tensor, spec: SolverSpec) -> Tensor:
    """``[G, R, 2**bits]`` evenly spaced values, ascending, as they will be stored, in the dtype of ``weight``."""
    low, high = weight.aminmax(dim=-1, keepdim=True)
    position = torch.linspace(0, 1, spec.levels, device=weight.device, dtype=weight.dtype)
    return round_codebook(low + (high - low) * position, spec.codebook_dtype)
