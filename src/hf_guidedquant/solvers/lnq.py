"""Layer-wise non-uniform quantization (LNQ; Kim et al. 2025, section 4), from a better start.

Per row, minimise ``(ŵ - w)ᵀ H (ŵ - w)`` over codes and a codebook by turns: the codebook in closed form, the codes by
cyclic coordinate descent (quadratic.py). Every row's best state is kept, so the objective never increases.

The paper starts from the weighted k-means, which knows the diagonal of H only, and coordinate descent then stops at the
nearest point where no single code can be bettered. GPTQ's sweep (gptq.py) moves all codes with all of H in view, so the
descent starts from sweeps, each followed by a codebook fit.
"""

from torch import Tensor

from . import gptq, kmeans
from .base import Solution, SolverSpec, round_codebook
from .quadratic import Problem, State


def solve(weight: Tensor, hessian: Tensor, spec: SolverSpec, outliers: Tensor | None = None) -> Solution:
    """Quantize ``weight [G, R, K]`` under ``hessian [G, K, K]`` (symmetric, positive diagonal).

    From the weighted k-means, ``lnq_sweeps`` times: sweep, fit the codebook. Then ``lnq_iterations`` times: assign, fit
    the codebook. Then the codebook is rounded to the dtype it is stored in and the codes are assigned once more, so
    that what is saved is stationary.
    """
    # The sweep comes first: finding its factors takes most, and nothing else is there yet.
    sweep = gptq.Sweep(weight, hessian, outliers) if spec.lnq_sweeps else None
    problem = Problem(weight, hessian, outliers)
    codes, codebook = kmeans.cluster(weight, problem.diagonal, spec, outliers)
    start = problem.state(codes.mT.contiguous(), round_codebook(codebook, spec.codebook_dtype))
    best = _swept(problem, start, sweep, spec.lnq_sweeps) if sweep else start
    del sweep
    final = problem.alternate(start, best, spec.lnq_iterations, spec.lnq_cycles, spec.codebook_dtype)
    return Solution(
        codes=final.codes.mT.contiguous(),
        codebook=final.codebook.to(spec.codebook_dtype).contiguous(),
        objectives={"kmeans": start.objective, "lnq": final.objective},
    )


def _swept(problem: Problem, best: State, sweep: gptq.Sweep, count: int) -> State:
    for _ in range(count):
        best = best.better(problem.state(sweep.codes(best.codebook).mT.contiguous(), best.codebook))
        best = best.better(problem.fit_codebook(best))
    return best


def memory(groups: int, rows: int, inputs: int) -> int:
    """Bytes at the worst moment: while the sweep's factors are found, or with them and the Hessians in pieces beside
    k-means, or what was measured per weight.
    """
    weights, hessians = groups * rows * inputs, groups * inputs**2
    solving = 10 * hessians + max(kmeans.memory(groups, rows, inputs), 36 * weights)
    return max(gptq.memory(groups, rows, inputs), solving)
