"""All outputs of a layer together, under a curvature of the end loss that knows how they depend on each other.

LNQ solves every row alone. The end loss' curvature has terms between rows too, and its Kronecker factors (K-FAC;
Martens & Grosse 2015) hold them: with ``E = Ŵ - W [N, K]``, the joint objective is

    tr(G E H Eᵀ),     G = Σ_t g_t g_tᵀ,     g_t = ∂ℓ/∂z_t

where H is the guided Hessian of all outputs. (YAQA, Tseng et al. 2025, rounds with the factors of both sides, too.)
Rows take turns in chunks. As far as the rows of a chunk do not depend on each other, each has an LNQ problem of its
own (quadratic.py), with other values v in the place of its weights:

    min (ŵ - v)ᵀ H (ŵ - v),     v_n = w_n + e_n - (G E)_n / (s G_nn),     s = 1.

They do depend on each other, so a row's step may be too long for what the others do at once. With s the largest
eigenvalue of the chunk's part of G, of unit diagonal, the joint objective cannot rise. Smaller s does more in practice:
s starts at 1, grows where the joint objective rose, and what made it rise is taken back.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .base import Solution, SolverSpec, look_up, parts, row_objective
from .hessian import condition
from .quadratic import Problem

# Passes over all rows, and chunks that take turns in each.
_PASSES, _CHUNKS = 2, 16
# Added to G, in units of its mean diagonal.
_DAMPING = 0.01


@dataclass(frozen=True)
class Factors:
    """The Kronecker factors of B layers' curvature, each of unit mean diagonal: ``outputs [B, N, N]`` (G, damped), and
    ``inputs [B, K, K]`` (H). Where G is zero there is nothing to go by, and nothing is changed.
    """

    outputs: Tensor
    inputs: Tensor

    @classmethod
    def of(cls, curvature: Tensor, hessian: Tensor, layer: str) -> "Factors":
        """From a layer's sums over tokens: G ``[N, N]``, symmetric, and the Hessians ``[g, K, K]`` of its groups.

        Raises:
            HessianError: NaN or infinite entries of a Hessian. Of G, they count as zero all over.
        """
        outputs, groups = len(curvature), len(hessian)
        sizes = [len(rows) for rows in torch.arange(outputs).split(-(-outputs // groups))]
        mean = torch.tensordot(hessian.new_tensor(sizes) / outputs, hessian, dims=1)
        size = curvature.diagonal().double().mean()
        if not (torch.isfinite(size) and size > 0 and torch.isfinite(curvature).all()):
            normal = torch.zeros_like(curvature)
        else:
            normal = curvature / size.to(curvature.dtype)
            normal.diagonal().add_(_DAMPING)
        return cls(normal.unsqueeze(0), condition(mean.unsqueeze(0), layer)[0])

    @classmethod
    def together(cls, layers: Sequence["Factors"]) -> "Factors":
        """Those of all layers."""
        if len(layers) == 1:
            return layers[0]
        return cls(torch.cat([layer.outputs for layer in layers]), torch.cat([layer.inputs for layer in layers]))


def refine(
    weight: Tensor,
    hessian: Tensor,
    solution: Solution,
    factors: Factors,
    spec: SolverSpec,
    outliers: Tensor | None = None,
) -> Solution:
    """Lower the joint objective of all rows of each layer; it never rises.

    Args:
        weight: ``[B * g, R, K]``: of each layer N rows in g groups, the last filled up.
        hessian: Of the groups, ``[B * g, K, K]``.
        solution: Of LNQ, without an overlay.
        factors: Of the B layers.
        spec: As for LNQ; ``lnq_cycles`` counts here too.
        outliers: bool ``[B * g, R, K]``, weights whose errors are zero.

    Returns:
        The solution with "curvature", the rows' own objectives in the end. Those may be higher than LNQ's; what is left
        of the joint objective is ``joint_left``.
    """
    layers, outputs, _ = factors.outputs.shape

    def rows(tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (layers, -1)).flatten(1, 2)[:, :outputs]

    codes, codebook = solution.codes.clone(), solution.codebook.to(weight.dtype, copy=True)
    joint = Joint(factors, rows(weight), rows(codes), rows(codebook), None if outliers is None else rows(outliers))
    before = joint.objective()
    joint.descend(spec)
    after = joint.objective()
    del joint
    quantized = look_up(codes, codebook, weight, outliers)
    return replace(
        solution,
        codes=codes,
        codebook=codebook.to(spec.codebook_dtype),
        objectives={**solution.objectives, "curvature": row_objective(weight, quantized, hessian)},
        joint_left=torch.where(before > 0, after / before, 1.0),
    )


class Joint:
    """Layers with their codes uint8 ``[B, N, K]`` and codebooks ``[B, N, L]``, which are bettered in place.

    Args:
        factors: Of the layers.
        weight: ``[B, N, K]``.
        codes, codebook: Where they start.
        outliers: bool ``[B, N, K]``, weights whose errors are zero.
    """

    def __init__(
        self, factors: Factors, weight: Tensor, codes: Tensor, codebook: Tensor, outliers: Tensor | None = None
    ) -> None:
        self._curvature, self._hessian = factors.outputs, factors.inputs
        self._weight, self._outliers = weight, outliers
        self._codes, self._codebook = codes, codebook
        self._error = look_up(codes, codebook, weight, outliers).sub_(weight)
        self._problem = Problem(weight[:, :1], factors.inputs)

    def objective(self) -> Tensor:
        """``tr(G E H Eᵀ)`` of every layer, fp64 ``[B]``."""
        total = self._error.new_zeros(len(self._error), dtype=torch.float64)
        for rows in parts(self._error.shape[1], self._error[:, 0].numel()):
            pulled, weighted = self._curvature[:, rows] @ self._error, self._error[:, rows] @ self._hessian
            total += (pulled * weighted).sum(dim=(1, 2), dtype=torch.float64)
        return total

    def descend(self, spec: SolverSpec) -> None:
        """Better codes and codebooks, chunk after chunk of rows."""
        chunks = [(own, self._safe(own)) for own in chunked(self._curvature, _CHUNKS)]
        shortened = self._curvature.new_ones(len(self._curvature))
        for _ in range(_PASSES):
            for own, safe in chunks:
                rose = self._step(own, torch.minimum(safe, shortened), spec)
                longer, shorter = (0.9 * shortened).clamp_min(1), torch.minimum(2 * shortened, safe)
                shortened = torch.where(rose, shorter, longer)

    def _safe(self, own: Tensor) -> Tensor:
        """How much the steps of rows ``own [B, r]`` are to be shortened for the objective not to rise: ``[B]``."""
        inner = _rows(self._curvature, own).gather(2, own.unsqueeze(1).expand(-1, own.shape[1], -1))
        root = _positive(inner.diagonal(dim1=-2, dim2=-1)).sqrt().unsqueeze(-1)
        return largest_eigenvalue(inner / (root * root.mT)).clamp_min(1)

    def _step(self, own: Tensor, shortened: Tensor, spec: SolverSpec) -> Tensor:
        """Solve for rows ``own [B, r]`` once more, and take it back where the objective rose: bool ``[B]``."""
        coupling = _rows(self._curvature, own)  # [B, r, N]
        inner = coupling.gather(2, own.unsqueeze(1).expand(-1, own.shape[1], -1))
        weight, error = _rows(self._weight, own), _rows(self._error, own)
        codes, codebook = _rows(self._codes, own), _rows(self._codebook, own)
        outliers = None if self._outliers is None else _rows(self._outliers, own)
        pull = coupling @ self._error
        unit = _positive(inner.diagonal(dim1=-2, dim2=-1)).unsqueeze(-1) * shortened.view(-1, 1, 1)
        problem = self._problem.towards(weight + error - pull / unit, weight, outliers)
        start = problem.state(codes.mT.contiguous(), codebook)
        final = problem.alternate(start, start, 1, spec.lnq_cycles, spec.codebook_dtype)
        found = final.codes.mT.contiguous()
        fresh = look_up(found, final.codebook, weight, outliers).sub_(weight)
        change = fresh - error
        # tr(G (E + D) H (E + D)ᵀ) - tr(G E H Eᵀ), where D is zero but for these rows.
        rise = ((2 * pull + inner @ change) * (change @ self._hessian)).sum(dim=(1, 2), dtype=torch.float64)
        rose = ~(rise <= 0)
        kept = rose.view(-1, 1, 1)
        _put(self._error, own, torch.where(kept, error, fresh))
        _put(self._codes, own, torch.where(kept, codes, found))
        _put(self._codebook, own, torch.where(kept, codebook, final.codebook))
        return rose


def chunked(curvature: Tensor, count: int) -> list[Tensor]:
    """Rows in chunks that depend little on each other inside: G ``[B, N, N]`` -> indices ``[B, r]`` each.

    Greedy: every row into the chunk, of those with room, to whose rows it is coupled least. Sizes differ by 1 at most;
    fewer rows than ``count`` have a chunk each.
    """
    layers, rows, _ = curvature.shape
    sizes = [len(part) for part in torch.arange(rows).tensor_split(min(count, rows))]
    room = torch.tensor(sizes, device=curvature.device).repeat(layers, 1)
    inside = curvature.new_zeros(layers, len(sizes), rows)  # which rows a chunk has
    chunks = torch.arange(len(sizes), device=curvature.device)
    diagonal = _positive(curvature.diagonal(dim1=-2, dim2=-1))
    for row in range(rows):
        # Over the row's own diagonal besides it would be squared correlations, which is the same for all chunks.
        coupling = curvature[:, row].square() / diagonal
        cost = (inside @ coupling.unsqueeze(-1)).squeeze(-1)
        chosen = cost.masked_fill(room == 0, torch.inf).argmin(dim=-1)
        taken = chosen.unsqueeze(-1) == chunks
        inside[:, :, row] = taken
        room -= taken.long()
    order = inside.argsort(dim=-1, descending=True, stable=True)
    return [order[:, number, :size].contiguous() for number, size in enumerate(sizes)]


def largest_eigenvalue(matrix: Tensor) -> Tensor:
    """An upper bound of that of positive semidefinite ``[B, r, r]``, at most ``r^(1/32)`` times it: the root of the
    trace of the 32nd power.
    """
    log = matrix.new_zeros(len(matrix), dtype=torch.float64)
    power = matrix.double()
    for exponent in (1, 2, 4, 8, 16, 32):
        size = power.diagonal(dim1=-2, dim2=-1).sum(dim=-1).clamp_min(torch.finfo(torch.float64).tiny)
        log += size.log() / exponent
        power = power / size.view(-1, 1, 1)
        power = power @ power
    return log.exp().to(matrix.dtype)


def memory(layers: int, outputs: int, inputs: int) -> int:
    """Bytes at the worst moment, the factors and weights included."""
    weights = layers * outputs * inputs
    chunk = layers * -(-outputs // _CHUNKS)
    # Errors, codes before and after, and besides the products with both factors, or a chunk as LNQ has it and its rows
    # of G.
    work = max(18 * weights, 6 * weights + chunk * (60 * inputs + 8 * outputs))
    return 4 * weights + 4 * layers * outputs**2 + 10 * layers * inputs**2 + work


def _rows(tensor: Tensor, own: Tensor) -> Tensor:
    """Rows ``own [B, r]`` of ``[B, N, n]``."""
    return tensor.gather(1, own.unsqueeze(-1).expand(-1, -1, tensor.shape[-1]))


def _put(tensor: Tensor, own: Tensor, rows: Tensor) -> None:
    # By whole rows: where torch is to be deterministic, a scatter would sort the places of all numbers on a GPU.
    tensor[torch.arange(len(own), device=own.device).unsqueeze(-1), own] = rows


def _positive(diagonal: Tensor) -> Tensor:
    """The diagonal to divide by."""
    return torch.where(diagonal > 0, diagonal, 1.0)
