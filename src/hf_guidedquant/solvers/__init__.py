"""From a weight matrix and its Hessian to codes and codebooks. Solvers know nothing of models, files or packing.

Every solver is a function ``solve(weight, hessian, spec) -> Solution`` over a batch of independent problems:
``weight [G, R, K]`` is G groups of R rows that share the Hessian ``hessian [G, K, K]`` (or its diagonal ``[G, K]``,
or None, whichever the table below says). A new method is one file and one row. :func:`solve` takes care of outliers,
which every method is told of, and knows nothing of but that their errors are zero; and of what comes after a method
that looks at every row alone, under the curvature of a layer's outputs (kronecker.py).
"""

from torch import Tensor

from . import gptq, gptvq1d, kmeans, lnq, outliers, rtn
from .base import Method, Solution, SolverSpec
from .kronecker import Factors

SOLVERS: dict[str, Method] = {
    "lnq": Method(lnq.solve, "hessian", lnq.memory),
    "gptvq1d": Method(gptvq1d.solve, "hessian", gptvq1d.memory),
    "gptq": Method(gptq.solve, "hessian", gptq.memory),
    "squeezellm": Method(kmeans.solve, "diagonal", kmeans.memory),
    "kmeans": Method(kmeans.solve, "none", kmeans.memory),
    "rtn": Method(rtn.solve, "none", rtn.memory),
}


def solve(
    method: str, weight: Tensor, statistics: Tensor | None, spec: SolverSpec, factors: Factors | None = None
) -> Solution:
    """Quantize by the method of that name; :func:`.outliers.solve`."""
    return outliers.solve(SOLVERS[method], weight, statistics, spec, factors)


__all__ = ["SOLVERS", "Factors", "Method", "Solution", "SolverSpec", "solve"]
