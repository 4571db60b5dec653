"""Weighted one-dimensional k-means, every row by itself (SqueezeLLM, Kim et al. 2024).

Minimises ``Σ_i h_i (w_i - c[q_i])²`` per row, ``h`` the diagonal of the row's Hessian. Deterministic, and close to the
optimum: exact dynamic programming over a few dozen runs of the sorted weights gives the start (the optimum itself where
a row has no more weights than runs), and Lloyd's iteration takes it to a local optimum of all weights. On sorted
weights with running sums a Lloyd iteration costs one binary search per centroid, not a pass over the row.
"""

import torch
from torch import Tensor

from .base import Solution, SolverSpec, look_up, nearest, round_codebook, row_objective, without

# Runs of the sorted weights that dynamic programming groups into clusters.
_RUNS = 48
# Elements of the float64 work arrays of one chunk of rows.
_CHUNK = 1 << 24


def solve(weight: Tensor, diagonal: Tensor | None, spec: SolverSpec, outliers: Tensor | None = None) -> Solution:
    """Quantize ``weight [G, R, K]`` under per-input importance ``diagonal [G, K]`` (None: all equal)."""
    codes, codebook = cluster(weight, diagonal, spec, outliers)
    codebook = round_codebook(codebook, spec.codebook_dtype)
    codes = nearest(codebook, weight)
    objective = row_objective(weight, look_up(codes, codebook, weight, outliers), diagonal)
    return Solution(codes, codebook.to(spec.codebook_dtype), {"kmeans": objective})


def memory(groups: int, rows: int, inputs: int) -> int:
    """Bytes at the worst moment, by what was measured: of a chunk, per row and per weight; and the weights."""
    together = min(groups * rows, _rows_per_chunk(inputs))
    return 8 * groups * rows * inputs + together * (53 * _RUNS**2 + 70 * inputs)


def cluster(
    weight: Tensor, diagonal: Tensor | None, spec: SolverSpec, outliers: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes uint8 ``[G, R, K]`` and ascending centroids ``[G, R, 2**bits]`` in weight's dtype, not yet rounded."""
    groups, rows, inputs = weight.shape
    if diagonal is None:
        diagonal = weight.new_ones(groups, inputs)
    every_row = diagonal.unsqueeze(1).expand_as(weight)
    importance = (every_row if outliers is None else every_row.masked_fill(outliers, 0)).reshape(-1, inputs)
    flat = without(outliers, weight).reshape(-1, inputs)
    step = _rows_per_chunk(inputs)
    centroids = [
        _cluster_rows(flat[i : i + step], importance[i : i + step], spec.levels, spec.kmeans_iterations)
        for i in range(0, flat.shape[0], step)
    ]
    codebook = torch.cat(centroids).to(weight.dtype).view(groups, rows, spec.levels)
    return nearest(codebook, weight), codebook


def _rows_per_chunk(inputs: int) -> int:
    return max(1, _CHUNK // max(inputs, _RUNS**2))


def _cluster_rows(weight: Tensor, importance: Tensor, levels: int, iterations: int) -> Tensor:
    """Ascending centroids, fp64 ``[rows, levels]``, of ``weight`` and ``importance``, both ``[rows, K]``."""
    values, order = weight.contiguous().sort(dim=-1, stable=True)
    mass = importance.gather(-1, order).double()
    # Centring keeps differences of running sums accurate. With a leading zero in the running sums, the sum over the
    # sorted positions [i, j) is sums[j] - sums[i].
    centre = (mass * values).sum(dim=-1, keepdim=True) / mass.sum(dim=-1, keepdim=True)
    values = values - centre
    sums = torch.stack([mass, mass * values, mass * values.square()])
    sums = torch.nn.functional.pad(sums.cumsum(dim=-1), (1, 0))
    if levels <= _RUNS // 3:
        edges = _optimal_edges(sums, _run_edges(values, mass, _RUNS), levels)
    else:  # so many codewords that the optimal density is as good a start as dynamic programming
        edges = _run_edges(values, mass, levels)
    centroids = _centroids(sums, values, edges, fallback=None)
    for _ in range(iterations):
        edges = torch.nn.functional.pad(
            torch.searchsorted(values, (centroids[:, 1:] + centroids[:, :-1]) / 2), (1, 1), value=0
        )
        edges[:, -1] = values.shape[1]
        moved = _centroids(sums, values, edges, fallback=centroids)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids + centre


def _run_edges(values: Tensor, mass: Tensor, runs: int) -> Tensor:
    """Cut every sorted row into runs: int64 ``[rows, runs + 1]`` positions from 0 to K.

    The runs hold equal shares of ``h^(1/3) Δ^(2/3)`` (Δ the gap to the neighbour), whose density is the optimal density
    of quantization points (Panter and Dite 1951), so the tails are cut as finely as the optimum needs. A row with no
    more distinct values than runs gets a run for each value.
    """
    gaps = torch.nn.functional.pad(values.diff(dim=-1), (1, 0))
    share = (mass / mass.mean(dim=-1, keepdim=True)).pow(1 / 3) * gaps.pow(2 / 3)
    # A small even share keeps rows of repeated values well defined.
    share = share + share.mean(dim=-1, keepdim=True) * 1e-3 + torch.finfo(share.dtype).tiny
    position = share.cumsum(dim=-1)
    cuts = torch.linspace(0, 1, runs + 1, device=values.device, dtype=values.dtype)[1:-1]
    inner = torch.searchsorted(position, position[:, -1:] * cuts)
    inputs = values.shape[1]
    if inputs > runs:  # every run holds a weight at least
        index = torch.arange(1, runs, device=values.device)
        inner = torch.minimum((inner - index).clamp_min(0).cummax(dim=-1).values + index, inputs - runs + index)
    rank = (gaps > 0).long().cumsum(dim=-1)
    each_value = torch.arange(1, runs, device=values.device).expand(values.shape[0], -1).contiguous()
    inner = torch.where(rank[:, -1:] < runs, torch.searchsorted(rank, each_value), inner)
    edges = torch.nn.functional.pad(inner, (1, 1), value=0)
    edges[:, -1] = inputs
    return edges


def _optimal_edges(sums: Tensor, edges: Tensor, levels: int) -> Tensor:
    """Cluster boundaries among ``edges`` that minimise the weighted squared error, by dynamic programming."""
    at = sums.gather(-1, edges.expand(3, -1, -1))  # [3, rows, E]
    mass, first, second = at.unsqueeze(-1) - at.unsqueeze(-2)  # [rows, E, E]: the run from the 2nd to the 1st index
    cost = second - first.square() / mass.clamp_min(torch.finfo(mass.dtype).tiny)
    count = edges.shape[-1]
    index = torch.arange(count, device=edges.device)
    # cost[:, j, i]: one cluster over the runs i .. j - 1. Only i <= j is a cluster; an empty one costs nothing.
    cost = cost.clamp_min_(0).masked_fill_(index.unsqueeze(0) > index.unsqueeze(1), torch.inf).float()
    total = cost[:, :, 0]
    came_from = []
    for _ in range(levels - 1):
        total, start = (total.unsqueeze(-2) + cost).min(dim=-1)
        came_from.append(start)
    last = torch.full((edges.shape[0], 1), count - 1, device=edges.device)
    chosen = [last]
    for start in reversed(came_from):
        last = start.gather(-1, last)
        chosen.append(last)
    chosen.append(torch.zeros_like(last))
    return edges.gather(-1, torch.cat(chosen[::-1], dim=-1))


def _centroids(sums: Tensor, values: Tensor, edges: Tensor, fallback: Tensor | None) -> Tensor:
    """Weighted means between neighbouring edges; an empty cluster keeps its place (or its left neighbour's value)."""
    at = sums[:2].gather(-1, edges.expand(2, -1, -1))
    mass, first = at.diff(dim=-1)
    # Where importances differ by many orders of magnitude, running sums cannot resolve the small ones: a mean is at
    # least kept between the smallest and the largest value of its cluster.
    last = values.shape[1] - 1
    low, high = values.gather(-1, edges[:, :-1].clamp_max(last)), values.gather(-1, (edges[:, 1:] - 1).clamp_min(0))
    mean = torch.where(mass > 0, first / mass, (low + high) / 2)
    mean = torch.maximum(torch.minimum(mean, high), low)
    filled = edges.diff(dim=-1) > 0
    if fallback is not None:
        return torch.where(filled, mean, fallback)
    # No history yet. Clusters are in ascending order, so the running maximum is the nearest one on the left.
    leftmost = mean.masked_fill(~filled, torch.inf).amin(dim=-1, keepdim=True)
    return torch.maximum(mean.masked_fill(~filled, -torch.inf).cummax(dim=-1).values, leftmost)
