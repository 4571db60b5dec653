"""GPTVQ in one dimension (van Baalen et al. 2024): GPTQ's sweep on a codebook per row, and a codebook update.

The codebook starts as the weighted k-means of SqueezeLLM. After the sweep it becomes, for the codes found, the one of
least ``(ŵ - w)ᵀ H (ŵ - w)`` (the paper's codebook update, here in closed form), which is LNQ's codebook step.
"""

from torch import Tensor

from . import gptq, kmeans, lnq
from .base import Solution, SolverSpec, round_codebook
from .quadratic import Problem


def solve(weight: Tensor, hessian: Tensor, spec: SolverSpec, outliers: Tensor | None = None) -> Solution:
    """Quantize ``weight [G, R, K]`` under ``hessian [G, K, K]`` (symmetric, positive diagonal)."""
    codes, centroids = kmeans.cluster(weight, hessian.diagonal(dim1=-2, dim2=-1), spec, outliers)
    codebook = round_codebook(centroids, spec.codebook_dtype)
    swept_codes = gptq.Sweep(weight, hessian, outliers).codes(codebook)
    problem = Problem(weight, hessian, outliers)
    start = problem.state(codes.mT.contiguous(), codebook)
    swept = problem.state(swept_codes.mT.contiguous(), codebook)
    fitted = problem.fit_codebook(swept)
    # Rounded, a codebook can be worse than the one before.
    final = swept.better(problem.state(fitted.codes, round_codebook(fitted.codebook, spec.codebook_dtype)))
    return Solution(
        codes=final.codes.mT.contiguous(),
        codebook=final.codebook.to(spec.codebook_dtype).contiguous(),
        objectives={"kmeans": start.objective, "gptq": swept.objective, "gptvq1d": final.objective},
    )


def memory(groups: int, rows: int, inputs: int) -> int:
    """Bytes at the worst moment: of k-means, of the sweep, or of the codebook step, which takes what LNQ's takes."""
    return max(gptq.memory(groups, rows, inputs), lnq.memory(groups, rows, inputs))
