"""Dense and sparse: in every row some weights, the outliers, are kept beside the codes (SqueezeLLM, Kim et al. 2024).

Outliers are the weights of largest ``H_kk w_k²``, as many in every row. A method solves for the others, the outliers'
errors being zero. Its codes then fixed, the outliers make good for the errors of the others:
``e_O = -H_OO⁻¹ H_OI e_I`` minimises ``eᵀ H e``. What is stored of an outlier is what its codeword lacks.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ..codes import Overlay
from .base import ELEMENTS, Method, Solution, SolverSpec, parts, round_codebook, row_objective
from .kronecker import Factors, refine

# Added to H_OO in units of its diagonal: inputs that almost depend on each other would else take large weights of
# opposite signs, which do not survive rounding.
_DAMPING = 0.01
# Arrays as large as the weight that it takes to fill in the overlay, or to choose outliers.
_ARRAYS = 6


def solve(
    method: Method, weight: Tensor, statistics: Tensor | None, spec: SolverSpec, factors: Factors | None = None
) -> Solution:
    """Quantize ``weight [G, R, K]`` by a method, with ``spec.outliers`` weights of every row beside the codes.

    Args:
        method: The solver.
        weight, statistics, spec: What it is given.
        factors: Of the curvature of the layers that the rows are of, to refine the method's solution with.

    Returns:
        The method's solution with an overlay and the objective "overlay" of what will be stored; without outliers the
        method's solution.
    """

    def solved(outliers: Tensor | None) -> Solution:
        found = method.solve(weight, statistics, spec, outliers)
        if factors is None or statistics is None:
            return found
        return refine(weight, statistics, found, factors, spec, outliers)

    if not spec.outliers:
        return solved(None)
    columns = choose(weight, statistics, spec.outliers)
    outliers = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device).scatter_(-1, columns, True)
    solution = solved(outliers)
    values = torch.empty(columns.shape, dtype=spec.codebook_dtype, device=weight.device)
    objective = weight.new_empty(weight.shape[:-1], dtype=torch.float64)
    for rows in parts(weight.shape[1], weight.shape[0] * _work(weight.shape[-1], spec.outliers)):
        part, places = weight[:, rows], columns[:, rows]
        quantized = solution.codebook[:, rows].to(weight.dtype).gather(-1, solution.codes[:, rows].long())
        lacking = part.gather(-1, places) - quantized.gather(-1, places)
        if statistics is not None and statistics.dim() == 3:
            error = (quantized - part).masked_fill_(outliers[:, rows], 0)
            lacking += _compensation(error, statistics, places).to(weight.dtype)
        lacking = round_codebook(lacking, spec.codebook_dtype)
        values[:, rows] = lacking.to(spec.codebook_dtype)
        quantized.scatter_(-1, places, quantized.gather(-1, places) + lacking)
        objective[:, rows] = row_objective(part, quantized, statistics)
    return replace(solution, overlay=Overlay(columns, values), objectives={**solution.objectives, "overlay": objective})


def memory(method: Method, groups: int, rows: int, inputs: int, outliers: int) -> int:
    """Bytes at the worst moment: the method's, or of filling in the overlay; the outliers twice, and a copy."""
    solving, weights = method.memory(groups, rows, inputs), groups * rows * inputs
    if not outliers:
        return solving
    filling = 8 * weights + 8 * min(ELEMENTS, groups * rows * _work(inputs, outliers))
    return max(solving, filling) + 6 * weights + 16 * groups * rows * outliers


def choose(weight: Tensor, statistics: Tensor | None, count: int) -> Tensor:
    """Columns of the ``count`` weights of every row with the largest ``H_kk w_k²``.

    Args:
        weight: ``[G, R, K]``.
        statistics: Hessians ``[G, K, K]``, their diagonals ``[G, K]``, or None for ``w_k²``.
        count: At most K.

    Returns:
        int64 ``[G, R, count]``, ascending; of equal weights the first ones.
    """
    columns = torch.empty(*weight.shape[:-1], count, dtype=torch.int64, device=weight.device)
    importance: Tensor | float = 1.0
    if statistics is not None:
        diagonal = statistics.diagonal(dim1=-2, dim2=-1) if statistics.dim() == 3 else statistics
        importance = diagonal.double().unsqueeze(1)
    for rows in parts(weight.shape[1], weight.shape[0] * _work(weight.shape[-1], count)):
        order = (weight[:, rows].double().square() * importance).argsort(dim=-1, descending=True, stable=True)
        columns[:, rows] = order[..., :count].sort(dim=-1).values
    return columns


def _compensation(error: Tensor, hessian: Tensor, places: Tensor) -> Tensor:
    """``-H_OO⁻¹ H_OI e_I``, fp64 ``[G, r, n]``.

    Args:
        error: ``e [G, r, K]``, 0 at the outliers.
        hessian: ``[G, K, K]``.
        places: Of the outliers, int64 ``[G, r, n]``.
    """
    groups = torch.arange(hessian.shape[0], device=hessian.device).view(-1, 1, 1, 1)
    among = hessian[groups, places.unsqueeze(-1), places.unsqueeze(-2)].double()  # [G, r, n, n]
    among.diagonal(dim1=-2, dim2=-1).mul_(1 + _DAMPING)
    pull = (error @ hessian).gather(-1, places).double()
    return torch.linalg.solve(among, pull.unsqueeze(-1)).squeeze(-1).neg_()


def _work(inputs: int, outliers: int) -> int:
    """Elements of work arrays per row: as many as weights some times, and pieces of the Hessian."""
    return _ARRAYS * inputs + 3 * outliers**2
