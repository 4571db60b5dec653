"""Layer-wise non-uniform quantization (LNQ; Kim et al. 2025, section 4).

Per row, minimise ``(ŵ - w)ᵀ H (ŵ - w)`` over codes q and a codebook c, ``ŵ_k = c[q_k]``, by turns:

* the codebook in closed form, ``c = (Pᵀ H P)⁻¹ Pᵀ H w`` with P the one-hot matrix of q;
* the codes by cyclic coordinate descent: input j takes the codeword nearest to ``ŵ_j - (H (ŵ - w))_j / H_jj``.

Every row's best state is kept, so the objective never increases. Work arrays are laid out ``[G, K, R]`` (inputs before
rows): a coordinate-descent step then touches contiguous memory.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Solution, SolverSpec, nearest, round_codebook, sort_codebook
from .kmeans import cluster

# Inputs per block of coordinate descent: steps inside a block read only the block's own changes, and one matrix
# product per block brings the other inputs up to date.
BLOCK = 128
# Ridge of the codebook step relative to the mean diagonal of its normal equations, and the largest one-hot array.
_RIDGE = 1e-7
_CHUNK = 1 << 23


@dataclass(frozen=True)
class _State:
    """Codes int64 ``[G, K, R]``, codebook ``[G, R, L]`` and objective fp64 ``[G, R]``."""

    codes: Tensor
    codebook: Tensor
    objective: Tensor

    def better(self, other: "_State") -> "_State":
        """Of every row the state with the lower objective."""
        take = other.objective < self.objective
        return _State(
            torch.where(take.unsqueeze(1), other.codes, self.codes),
            torch.where(take.unsqueeze(2), other.codebook, self.codebook),
            torch.where(take, other.objective, self.objective),
        )


def solve(weight: Tensor, hessian: Tensor, spec: SolverSpec) -> Solution:
    """Quantize ``weight [G, R, K]`` under ``hessian [G, K, K]`` (symmetric, positive diagonal).

    From the weighted k-means, ``lnq_iterations`` times: assign, fit the codebook. Then the codebook is rounded to the
    dtype it is stored in and the codes are assigned once more, so that what is saved is stationary.
    """
    problem = _Problem(weight, hessian)
    codes, codebook = cluster(weight, problem.diagonal, spec)
    start = problem.state(codes.mT.contiguous(), round_codebook(codebook, spec.codebook_dtype))
    best = start
    for _ in range(spec.lnq_iterations):
        best = best.better(problem.assign(best, spec.lnq_cycles))
        best = best.better(problem.fit_codebook(best))
    final = problem.state(best.codes, round_codebook(best.codebook, spec.codebook_dtype)).better(start)
    final = final.better(problem.assign(final, spec.lnq_cycles))
    return Solution(
        codes=final.codes.mT.contiguous().to(torch.uint8),
        codebook=final.codebook.to(spec.codebook_dtype).contiguous(),
        objectives={"kmeans": start.objective, "lnq": final.objective},
    )


class _Problem:
    """The fixed part of a solve: weights ``[G, K, R]``, the Hessian, and the Hessian with rows scaled by 1 / H_jj."""

    def __init__(self, weight: Tensor, hessian: Tensor) -> None:
        self.weight = weight.mT.contiguous()
        self.hessian = hessian
        self.diagonal = hessian.diagonal(dim1=-2, dim2=-1)
        self.scaled = hessian / self.diagonal.unsqueeze(-1)

    def state(self, codes: Tensor, codebook: Tensor) -> _State:
        error = _look_up(codes, codebook) - self.weight
        objective = (error * torch.bmm(self.hessian, error)).sum(dim=1, dtype=torch.float64)
        return _State(codes, codebook, objective)

    def assign(self, state: _State, cycles: int) -> _State:
        """Coordinate descent over all inputs, ``cycles`` times; stops early when nothing changes."""
        codebook = state.codebook.mT.contiguous()  # [G, L, R]
        midpoints = (codebook[:, 1:] + codebook[:, :-1]) / 2
        quantized = _look_up(state.codes, state.codebook)
        slope = torch.bmm(self.scaled, quantized - self.weight)  # (H e)_j / H_jj, kept up to date
        for _ in range(cycles):
            before = quantized.clone()
            for start in range(0, quantized.shape[1], BLOCK):
                self._assign_block(start, quantized, slope, codebook, midpoints)
            if torch.equal(before, quantized):
                break
        codes = nearest(state.codebook, quantized.mT).mT.contiguous()
        return self.state(codes, state.codebook)

    def _assign_block(self, start: int, quantized: Tensor, slope: Tensor, codebook: Tensor, midpoints: Tensor) -> None:
        """One pass over the inputs ``start .. start + BLOCK - 1``, in place. The seam for a fused GPU kernel.

        Shapes: ``quantized`` and ``slope`` are ``[G, K, R]``, the ascending ``codebook`` is ``[G, L, R]`` and
        ``midpoints [G, L - 1, R]``.
        """
        stop = min(start + BLOCK, quantized.shape[1])
        change = torch.empty_like(quantized[:, start:stop])
        for j in range(start, stop):
            done = j - start
            target = quantized[:, j] - slope[:, j]
            if done:
                target -= torch.bmm(self.scaled[:, j : j + 1, start:j], change[:, :done]).squeeze(1)
            code = (target.unsqueeze(1) > midpoints).sum(dim=1, keepdim=True)
            value = codebook.gather(1, code).squeeze(1)
            torch.sub(value, quantized[:, j], out=change[:, done])
            quantized[:, j] = value
        slope.baddbmm_(self.scaled[:, :, start:stop], change)

    def fit_codebook(self, state: _State) -> _State:
        """The best codebook for the state's codes, in ascending order, and the codes renumbered to match.

        Solves for the change from the old codebook, ``(Pᵀ H P + εI) δ = -Pᵀ H e``: an empty codeword has a zero row
        and right-hand side and stays where it is.
        """
        codes, codebook = state.codes.mT, state.codebook  # [G, R, K], [G, R, L]
        groups, rows, inputs = codes.shape
        levels = codebook.shape[-1]
        pull = torch.bmm(self.hessian, _look_up(state.codes, codebook) - self.weight).mT.unsqueeze(-1)  # H e
        entries = torch.arange(levels, device=codes.device).unsqueeze(-1)
        fitted = torch.empty_like(codebook)
        step = max(1, _CHUNK // (groups * inputs * levels))
        for i in range(0, rows, step):
            part = slice(i, i + step)
            one_hot = (codes[:, part].unsqueeze(2) == entries).to(pull.dtype)  # Pᵀ: [G, r, L, K]
            curved = torch.bmm(one_hot.flatten(1, 2), self.hessian).view_as(one_hot)  # Pᵀ H
            normal = (curved @ one_hot.mT).double()  # [G, r, L, L]
            right = (one_hot @ pull[:, part]).double()  # [G, r, L, 1]
            ridge = _RIDGE * normal.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
            normal.diagonal(dim1=-2, dim2=-1).add_(ridge.unsqueeze(-1))
            fitted[:, part] = codebook[:, part] - torch.linalg.solve(normal, right).squeeze(-1).to(codebook.dtype)
        renumbered, fitted = sort_codebook(codes, fitted)
        return self.state(renumbered.mT.contiguous(), fitted)


def _look_up(codes: Tensor, codebook: Tensor) -> Tensor:
    """Codes ``[G, K, R]`` and codebook ``[G, R, L]`` -> quantized weights ``[G, K, R]``."""
    return codebook.mT.gather(1, codes)
