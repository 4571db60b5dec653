"""Codes and codebooks of rows that share a Hessian: their objective, and how to make either better.

Per row the objective is ``(ŵ - w)ᵀ H (ŵ - w)`` over codes q and a codebook c, ``ŵ_k = c[q_k]``:

* the codebook in closed form, ``c = (Pᵀ H P)⁻¹ Pᵀ H w`` with P the one-hot matrix of q;
* the codes by cyclic coordinate descent: input j takes the codeword nearest to ``ŵ_j - (H (ŵ - w))_j / H_jj``.

Work arrays are laid out ``[G, K, R]`` (inputs before rows): a coordinate-descent step then touches contiguous memory.
On a GPU with Triton a block of steps is one launch (descent.py) and the large products run on tensor cores without loss
of accuracy (products.py).
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..triton_kernels import backend_for
from .base import nearest, parts, round_codebook, sort_codebook
from .products import LowerProduct, PlainProduct, SplitProduct, has_tensor_cores

# Inputs per panel and per block of coordinate descent. ``H (ŵ - w)`` is computed afresh for every panel; a block's
# changes reach the rest of its panel by one matrix product; steps inside a block read the block's own changes.
PANEL, BLOCK = 1024, 128
# Ridges of the codebook step, relative to the diagonal of its normal equations and to the mean of that: above what fp32
# knows of them, and what holds empty codewords. Then the largest one-hot array.
_RIDGE, _RIDGE_OF_MEAN = 1e-5, 1e-7
_CHUNK = 1 << 25


@dataclass(frozen=True)
class State:
    """Codes uint8 ``[G, K, R]``, codebook ``[G, R, L]`` and objective fp64 ``[G, R]``."""

    codes: Tensor
    codebook: Tensor
    objective: Tensor

    def better(self, other: "State") -> "State":
        """Of every row the state with the lower objective."""
        take = other.objective < self.objective
        return State(
            torch.where(take.unsqueeze(1), other.codes, self.codes),
            torch.where(take.unsqueeze(2), other.codebook, self.codebook),
            torch.where(take, other.objective, self.objective),
        )


class Problem:
    """The fixed part of a solve: weights ``[G, K, R]``, the Hessian, one over its diagonal, and how to multiply.

    ``outliers``, bool ``[G, R, K]``, are weights whose errors are zero: they pull at no other, belong to no codeword
    and do not move. Products run on tensor cores, for which the Hessian is kept once more; but not if it is ``lower``
    triangular, as the factors that :mod:`.gptq` descends on.
    """

    def __init__(self, weight: Tensor, hessian: Tensor, outliers: Tensor | None = None, lower: bool = False) -> None:
        self.weight = self.kept = weight.mT.contiguous()
        self.outliers = None if outliers is None else outliers.mT.contiguous()
        self.hessian = hessian.contiguous()
        self.diagonal = hessian.diagonal(dim1=-2, dim2=-1)
        self.inverse = (1 / self.diagonal).contiguous()
        self.fused = weight.dtype == torch.float32 and backend_for(weight.device) != "torch"
        split = self.fused and has_tensor_cores(weight.device)
        kind = LowerProduct if lower else SplitProduct if split else PlainProduct
        self.product: PlainProduct | SplitProduct = kind(hessian)

    def towards(self, target: Tensor, weight: Tensor, outliers: Tensor | None) -> "Problem":
        """The problem of other values ``target [G, R, K]`` under the same Hessian; outliers keep their weights."""
        other = copy.copy(self)
        other.weight, other.kept = target.mT.contiguous(), weight.mT.contiguous()
        other.outliers = None if outliers is None else outliers.mT.contiguous()
        return other

    def state(self, codes: Tensor, codebook: Tensor) -> State:
        error = self.quantized(codes, codebook).sub_(self.weight)
        operand = self.product.operand(error)
        objective = error.new_zeros(error.shape[0], error.shape[2], dtype=torch.float64)
        for panel in _panels(error.shape[1]):
            objective += (error[:, panel] * self.product.rows(panel, operand)).sum(dim=1, dtype=torch.float64)
        return State(codes, codebook, objective)

    def quantized(self, codes: Tensor, codebook: Tensor) -> Tensor:
        """Quantized weights ``[G, K, R]``; outliers are as they were."""
        found = _look_up(codes, codebook)
        return found if self.outliers is None else torch.where(self.outliers, self.kept, found)

    def assign(self, state: State, cycles: int) -> State:
        """Coordinate descent over all inputs, ``cycles`` times; stops early when nothing changes."""
        quantized = self.quantized(state.codes, state.codebook)
        self.descend(quantized, state.codebook, cycles)
        codes = nearest(state.codebook, quantized.mT).mT.contiguous()
        del quantized
        return self.state(codes, state.codebook)

    def alternate(self, start: State, best: State, iterations: int, cycles: int, dtype: torch.dtype) -> State:
        """Codes and codebook by turns from ``best``, then with the codebook as it is stored.

        What comes out is stationary, and no worse than ``start``, whose codebook is stored as it is.
        """
        for _ in range(iterations):
            best = best.better(self.assign(best, cycles))
            best = best.better(self.fit_codebook(best))
        final = self.state(best.codes, round_codebook(best.codebook, dtype)).better(start)
        return final.better(self.assign(final, cycles))

    def descend(self, quantized: Tensor, codebook: Tensor, cycles: int) -> None:
        """Take all inputs of ``quantized [G, K, R]``, in place, to entries of ``codebook [G, R, L]``, as `assign`.

        Outliers stay where they are.
        """
        codebook = codebook.mT.contiguous()
        error = self.product.operand(quantized - self.weight)
        for _ in range(cycles):
            moved = torch.zeros((), dtype=torch.bool, device=quantized.device)
            for panel in _panels(quantized.shape[1]):
                before = quantized[:, panel].clone()
                self._assign_panel(panel, quantized, self.product.rows(panel, error), codebook)
                error[..., panel, :] = self.product.operand(quantized[:, panel] - self.weight[:, panel])
                moved |= (before != quantized[:, panel]).any()
            if not moved:
                break

    def _assign_panel(self, panel: slice, quantized: Tensor, pull: Tensor, codebook: Tensor) -> None:
        """One pass over the inputs of a panel, in place: ``quantized [G, K, R]``, ``pull`` = H (ŵ - w) of the panel."""
        if self.fused:
            from .descent import descend
        else:
            descend = _descend
        for start in range(panel.start, panel.stop, BLOCK):
            block = slice(start, min(start + BLOCK, panel.stop))
            offset = start - panel.start
            change = descend(self.hessian, self.inverse, pull, quantized, codebook, block, offset, self.outliers)
            if block.stop < panel.stop:
                beside = self.hessian[:, block.stop : panel.stop, block]
                pull[:, offset + BLOCK :].baddbmm_(beside, change)

    def fit_codebook(self, state: State) -> State:
        """The best codebook for the state's codes, in ascending order, and the codes renumbered to match.

        Solves for the change from the old codebook, ``(Pᵀ H P + D) δ = -Pᵀ H e`` with a small diagonal D: an empty
        codeword has a zero row and right-hand side and stays where it is, and so do all if inputs that sum to zero
        (behind a layer norm without weights) leave open where they are. None goes further beyond the row's weights than
        these lie apart.
        """
        codes, codebook = state.codes.mT.contiguous(), state.codebook  # [G, R, K], [G, R, L]
        groups, rows, inputs = codes.shape
        levels = codebook.shape[-1]
        error = self.quantized(state.codes, codebook).sub_(self.weight).mT.unsqueeze(-1)  # [G, R, K, 1]
        inliers = None if self.outliers is None else ~self.outliers.mT.unsqueeze(2)  # [G, R, 1, K]
        low, high = self.weight.aminmax(dim=1)  # [G, R]
        spread = high - low
        entries = torch.arange(levels, device=codes.device).unsqueeze(-1)
        fitted = torch.empty_like(codebook)
        step = max(1, _CHUNK // (groups * inputs * levels))
        for i in range(0, rows, step):
            part = slice(i, i + step)
            one_hot = codes[:, part].unsqueeze(2) == entries  # Pᵀ: [G, r, L, K]
            if inliers is not None:
                one_hot &= inliers[:, part]
            curved = self.product.one_hot(one_hot.flatten(1, 2)).view(one_hot.shape)  # Pᵀ H
            normal = (curved @ one_hot.to(curved.dtype).mT).double()  # [G, r, L, L]
            right = (curved @ error[:, part]).double()  # [G, r, L, 1]
            diagonal = normal.diagonal(dim1=-2, dim2=-1)
            diagonal += _RIDGE * diagonal + _RIDGE_OF_MEAN * diagonal.mean(dim=-1, keepdim=True)
            fitted[:, part] = codebook[:, part] - torch.linalg.solve(normal, right).squeeze(-1).to(codebook.dtype)
        del error
        fitted = fitted.clamp((low - spread).unsqueeze(-1), (high + spread).unsqueeze(-1))
        renumbered, fitted = sort_codebook(codes, fitted)
        return self.state(renumbered.mT.contiguous(), fitted)


def _descend(
    hessian: Tensor,
    inverse: Tensor,
    pull: Tensor,
    quantized: Tensor,
    codebook: Tensor,
    block: slice,
    offset: int,
    outliers: Tensor | None = None,
) -> Tensor:
    """As :func:`.descent.descend`, in plain torch, for any device and dtype."""
    midpoints = (codebook[:, 1:] + codebook[:, :-1]) / 2
    change = torch.empty_like(quantized[:, block])
    for done in range(change.shape[1]):
        j = block.start + done
        slope = pull[:, offset + done]
        if done:
            slope = slope + torch.bmm(hessian[:, j : j + 1, block.start : j], change[:, :done]).squeeze(1)
        target = quantized[:, j] - slope * inverse[:, j : j + 1]
        code = (target.unsqueeze(1) > midpoints).sum(dim=1, keepdim=True)
        value = codebook.gather(1, code).squeeze(1)
        if outliers is not None:
            value = torch.where(outliers[:, j], quantized[:, j], value)
        torch.sub(value, quantized[:, j], out=change[:, done])
        quantized[:, j] = value
    return change


def _look_up(codes: Tensor, codebook: Tensor) -> Tensor:
    """Codes uint8 ``[G, K, R]`` and codebook ``[G, R, L]`` -> quantized weights ``[G, K, R]``."""
    table = codebook.mT.contiguous()
    found = torch.empty(codes.shape, dtype=codebook.dtype, device=codes.device)
    for part in parts(codes.shape[1], codes[:, 0].numel()):
        found[:, part] = table.gather(1, codes[:, part].long())
    return found


def _panels(inputs: int) -> Iterator[slice]:
    return (slice(start, min(start + PANEL, inputs)) for start in range(0, inputs, PANEL))
