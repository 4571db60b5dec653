"""GPTQ (Frantar et al. 2022): one sweep over the inputs, in which each makes good for the errors of those before it.

With ``H = Mᵀ M``, M lower triangular, the objective is ``|M (ŵ - w)|²``, and its j-th term knows no input after j. So
the best codeword for input j, while all later inputs are still free, is the one nearest to
``w_j - Σ_{i<j} M_ji e_i / M_jj``, ``e = ŵ - w``. ``M⁻ᵀ`` is the paper's Cholesky factor of the inverse Hessian
(``H⁻¹ = Uᵀ U``, section 3.3, step 3) and the codes are those of its error feedback, but nothing is inverted: the sweep
is a cycle of LNQ's coordinate descent with M in the place of H, begun at ``ŵ = w``. The blocks of that descent are the
paper's lazy batch updates.

Inputs of large ``H_jj`` come first. M is that of a damped H, as in the paper: where inputs almost depend on each other,
the errors that they are to make good for would else take their targets far beyond the codebook.
"""

import torch
from torch import Tensor

from . import rtn
from .base import Solution, SolverSpec, look_up, nearest, row_objective, without
from .hessian import cholesky
from .quadratic import Problem

# Added to the diagonal for the sweep, in units of its mean (section 3.3 of the paper).
DAMPING = 0.01


def solve(weight: Tensor, hessian: Tensor, spec: SolverSpec, outliers: Tensor | None = None) -> Solution:
    """Quantize ``weight [G, R, K]`` under ``hessian [G, K, K]`` to the evenly spaced values of :func:`.rtn.grid`."""
    codebook = rtn.grid(without(outliers, weight), spec)
    swept = Sweep(weight, hessian, outliers).codes(codebook)
    objectives = {}
    for stage, codes in (("rtn", nearest(codebook, weight)), ("gptq", swept)):
        objectives[stage] = row_objective(weight, look_up(codes, codebook, weight, outliers), hessian)
    return Solution(codes, codebook.to(spec.codebook_dtype), objectives)


def memory(groups: int, rows: int, inputs: int) -> int:
    """Bytes at the worst moment: the factors, and the weights and what it takes to find one, or what was measured per
    weight.
    """
    weights = groups * rows * inputs
    return 4 * groups * inputs**2 + max(12 * inputs**2 + 4 * weights, 30 * weights)


class Sweep:
    """The sweep of some weights, for any codebook.

    Args:
        weight, hessian: As for :func:`solve`.
        outliers: Weights whose errors are zero, bool ``[G, R, K]``.
    """

    def __init__(self, weight: Tensor, hessian: Tensor, outliers: Tensor | None = None) -> None:
        order = hessian.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
        factor = torch.empty_like(hessian)
        for group, places in enumerate(order):
            factor[group] = _factor(hessian[group], places)
        places = order.unsqueeze(1).expand_as(weight)
        # Where every input has gone. To gather is cheap; where torch is to be deterministic, a scatter sorts on a GPU.
        self._back = order.argsort(dim=-1).unsqueeze(1).expand_as(weight)
        ordered = None if outliers is None else outliers.gather(-1, places)
        self._problem = Problem(weight.gather(-1, places), factor, ordered, lower=True)

    def codes(self, codebook: Tensor) -> Tensor:
        """Codes after the sweep, uint8 ``[G, R, K]``; the codebook is ascending, ``[G, R, L]``, with any spacing."""
        quantized = self._problem.weight.clone()
        self._problem.descend(quantized, codebook, cycles=1)
        return nearest(codebook, quantized.mT).gather(-1, self._back)


def _factor(hessian: Tensor, order: Tensor) -> Tensor:
    """Lower triangular ``M`` with ``Mᵀ M = H``, damped, ``[K, K]``, its inputs in the order given."""
    # Cholesky gives H = L Lᵀ: with the inputs backwards, M is L turned by half a circle and transposed.
    backwards = order.flip(0)
    damped = hessian[backwards.unsqueeze(1), backwards]
    damped.diagonal().add_(DAMPING * damped.diagonal().mean())
    found = cholesky(damped)
    return damped.diagonal().sqrt().flip(0).diag() if found is None else found[0].flip(0, 1).mT
