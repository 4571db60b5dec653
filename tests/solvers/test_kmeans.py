"""Weighted one-dimensional k-means against brute force, against simpler methods, and on degenerate rows."""

from itertools import combinations_with_replacement, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_guidedquant.solvers import SolverSpec, kmeans, rtn
from hf_guidedquant.solvers.base import nearest

EPS32, EPS64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps


def cost_of(weight: torch.Tensor, importance: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
    """Σ h (ŵ - w)² per row, in fp64."""
    error = quantized.double() - weight.double()
    return (importance.double().unsqueeze(1) * error.square()).sum(dim=-1)


def optimum(weight: list[float], importance: list[float], levels: int) -> float:
    """The least cost over all cuts of the sorted row into at most ``levels`` contiguous runs."""
    pairs = sorted(zip(weight, importance, strict=True))

    def run_cost(run: list[tuple[float, float]]) -> float:
        mass = sum(h for _, h in run)
        centre = sum(h * w for w, h in run) / mass if run else 0.0
        return sum(h * (w - centre) ** 2 for w, h in run)

    best = float("inf")
    for inner in combinations_with_replacement(range(len(pairs) + 1), levels - 1):
        cuts = (0, *inner, len(pairs))
        best = min(best, sum(run_cost(pairs[i:j]) for i, j in pairwise(cuts)))
    return best


def rounding(weight: torch.Tensor, importance: torch.Tensor, best: torch.Tensor, levels: int) -> torch.Tensor:
    """What rounding may add to the optimal cost in fp64.

    The dynamic program compares sums of ``levels`` costs in fp32, for the chosen and for the best partition. Each
    cost, and each centroid, is a difference of running sums over K terms of Σ h w².
    """
    inputs = weight.shape[-1]
    total = (importance.double().unsqueeze(1) * weight.double().square()).sum(dim=-1)
    return 2 * (levels + 1) * EPS32 * best + 8 * levels * inputs * EPS64 * total


@pytest.mark.parametrize("levels", [2, 4])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("inputs", [1, 2, 3, 4, 5, 7, 10])
def test_small_rows_reach_the_optimum_of_brute_force(inputs, weighted, levels):
    generator = torch.Generator().manual_seed(inputs)
    weight = torch.randn(2, 5, inputs, generator=generator, dtype=torch.float64)
    importance = torch.randn(2, inputs, generator=generator, dtype=torch.float64).exp()
    if not weighted:
        importance = torch.ones_like(importance)
    codes, codebook = kmeans.cluster(weight, importance if weighted else None, SolverSpec(levels.bit_length() - 1))
    cost = cost_of(weight, importance, codebook.gather(-1, codes.long()))
    best = torch.tensor(
        [[optimum(row.tolist(), h.tolist(), levels) for row in w] for w, h in zip(weight, importance, strict=True)],
        dtype=torch.float64,
    )
    slack = rounding(weight, importance, best, levels)
    assert (cost <= best + slack).all()
    # The brute force is what it claims to be: nobody beats it.
    assert (cost >= best - slack).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    row=st.lists(st.tuples(st.integers(-6, 6), st.integers(1, 50)), min_size=1, max_size=9),
    bits=st.integers(1, 2),
)
def test_rows_with_ties_reach_the_optimum(row, bits):
    weight = torch.tensor([[[float(w) for w, _ in row]]], dtype=torch.float64)
    importance = torch.tensor([[float(h) for _, h in row]], dtype=torch.float64)
    codes, codebook = kmeans.cluster(weight, importance, SolverSpec(bits))
    best = optimum(weight.flatten().tolist(), importance.flatten().tolist(), 2**bits)
    slack = rounding(weight, importance, torch.tensor([[best]], dtype=torch.float64), 2**bits)
    assert (cost_of(weight, importance, codebook.gather(-1, codes.long())) <= best + slack).all()
    assert (codebook.diff(dim=-1) >= 0).all()


def problem(inputs: int, seed: int, tails: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(2, 8, inputs, generator=generator)
    if tails:
        weight = weight / torch.randn(weight.shape, generator=generator).abs().add(0.05)
    return weight, torch.randn(2, inputs, generator=generator).mul(2).exp()


# rows of more than 48 weights get at most 48 different centroids. Lloyd never fills an empty cluster, so it stays so.
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("inputs", [100, 300, 1500])
@pytest.mark.parametrize("tails", [False, True])
def test_never_worse_than_the_uniform_grid(inputs, bits, tails):
    weight, importance = problem(inputs, seed=bits, tails=tails)
    spec = SolverSpec(bits, torch.float32)
    found = kmeans.solve(weight, importance, spec).objectives["kmeans"]
    grid = rtn.solve(weight, importance, spec).objectives["rtn"]
    assert (found <= grid).all()


@pytest.mark.parametrize("bits", [5, 6, 7, 8])
def test_every_codeword_is_used_when_there_are_more_distinct_weights(bits):
    weight = torch.randn(1, 2, 1500, generator=torch.Generator().manual_seed(bits))
    codes, _ = kmeans.cluster(weight, None, SolverSpec(bits))
    # In one dimension, splitting a cluster of different weights lowers the cost, so no optimum leaves a codeword empty.
    # The start uses all; with hundreds of codewords Lloyd's iteration, which is local, may strand one of them.
    stranded = 0 if bits <= 4 else 1
    assert all(row.unique().numel() >= 2**bits - stranded for row in codes[0])


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_after_enough_iterations_every_centroid_is_the_mean_of_its_weights(bits):
    weight, importance = (tensor.double() for tensor in problem(300, seed=20 + bits))
    spec = SolverSpec(bits, kmeans_iterations=2000)
    codes, codebook = kmeans.cluster(weight, importance, spec)
    mass = importance.unsqueeze(1).expand_as(weight)
    total = torch.zeros_like(codebook).scatter_add_(-1, codes.long(), mass)
    first = torch.zeros_like(codebook).scatter_add_(-1, codes.long(), mass * weight)
    # A centroid is a difference of running sums over K terms, which carry K eps64 Σ h |w|, over the cluster's mass.
    noise = 300 * EPS64 * (mass * weight.abs()).sum(dim=-1, keepdim=True)
    assert (total > 0).all()
    assert ((codebook - first / total).abs() <= 8 * noise / total).all()


def quantile_lloyd(weight: torch.Tensor, importance: torch.Tensor, levels: int) -> torch.Tensor:
    """Start at weighted quantiles, then 50 plain Lloyd iterations; quantized rows in fp64."""
    weight = weight.double()
    mass = importance.double().unsqueeze(1).expand_as(weight)
    values, order = weight.sort(dim=-1)
    share = mass.gather(-1, order).cumsum(dim=-1)
    wanted = (torch.arange(levels, dtype=torch.float64) + 0.5) / levels
    codebook = values.gather(-1, torch.searchsorted(share, share[..., -1:] * wanted))
    for _ in range(50):
        codes = nearest(codebook, weight)
        total = torch.zeros_like(codebook).scatter_add_(-1, codes.long(), mass)
        first = torch.zeros_like(codebook).scatter_add_(-1, codes.long(), mass * weight)
        codebook = torch.where(total > 0, first / total, codebook)
    return codebook.gather(-1, nearest(codebook, weight).long())


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("inputs", [100, 300, 1500])
@pytest.mark.parametrize("tails", [False, True])
def test_on_the_whole_never_worse_than_weighted_quantiles_and_lloyd(inputs, bits, tails):
    weight, importance = problem(inputs, seed=10 + bits, tails=tails)
    codes, codebook = kmeans.cluster(weight, importance, SolverSpec(bits))
    found = cost_of(weight, importance, codebook.gather(-1, codes.long()))
    simple = cost_of(weight, importance, quantile_lloyd(weight, importance, 2**bits))
    # Both are local optima, so a single row may go either way; the sum over rows may not.
    assert found.sum() <= simple.sum()


@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize("inputs", [1, 5, 200])
@pytest.mark.parametrize("value", [0.0, 0.75, -3.0])
def test_constant_rows_are_kept_exactly(value, inputs, bits):
    solution = kmeans.solve(torch.full((1, 2, inputs), value), torch.ones(1, inputs), SolverSpec(bits))
    assert torch.equal(solution.codebook.float().gather(-1, solution.codes.long()), torch.full((1, 2, inputs), value))
    assert (solution.objectives["kmeans"] == 0).all()


# end where the value changes, so neighbours share a cluster, and Lloyd cannot split it. A layer that already holds at
# most 2**bits values per row (a quantized model saved dense) is then not reproduced, from 8 values in 3 bits on.
@pytest.mark.parametrize(
    ("bits", "distinct"), [(2, 2), (2, 3), (2, 4), (3, 8), (4, 9), (4, 16), (5, 32), (6, 60), (8, 40)]
)
@pytest.mark.parametrize("inputs", [48, 61, 1000])
def test_fewer_distinct_values_than_codewords_lose_nothing(bits, distinct, inputs):
    generator = torch.Generator().manual_seed(distinct)
    values = torch.randn(distinct, generator=generator).half().float()
    weight = values[torch.randint(distinct, (2, 16, inputs), generator=generator)]
    importance = torch.rand(2, inputs, generator=generator) + 0.1
    solution = kmeans.solve(weight, importance, SolverSpec(bits))
    assert torch.equal(solution.codebook.float().gather(-1, solution.codes.long()), weight)


def test_repeated_calls_give_the_same_bytes_and_do_not_depend_on_the_chunk(monkeypatch):
    weight, importance = problem(300, seed=5)
    first = kmeans.cluster(weight, importance, SolverSpec(3))
    again = kmeans.cluster(weight, importance, SolverSpec(3))
    monkeypatch.setattr(kmeans, "_CHUNK", 1)
    one_row_at_a_time = kmeans.cluster(weight, importance, SolverSpec(3))
    for other in (again, one_row_at_a_time):
        assert torch.equal(first[0], other[0])
        assert torch.equal(first[1], other[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_codebooks_ascend_and_are_what_the_file_will_hold(bits, dtype):
    weight, importance = problem(300, seed=6)
    solution = kmeans.solve(weight, importance, SolverSpec(bits, dtype))
    assert solution.codebook.dtype == dtype
    assert (solution.codebook.float().diff(dim=-1) >= 0).all()
    # The reported objective is that of the rounded codebook: w's error, its square and the product round once each.
    cost = cost_of(weight, importance, solution.codebook.gather(-1, solution.codes.long()))
    assert ((solution.objectives["kmeans"] - cost).abs() <= 4 * EPS32 * cost).all()
    # And every weight sits on its nearest codeword: midpoints round once, at the size of the codebook.
    distance = (solution.codebook.double().unsqueeze(-1) - weight.double().unsqueeze(-2)).abs()
    taken = distance.gather(-2, solution.codes.long().unsqueeze(-2)).squeeze(-2)
    slack = 2 * EPS32 * solution.codebook.double().abs().amax(dim=-1, keepdim=True)
    assert (taken <= distance.amin(dim=-2) + slack).all()


# sums. Light clusters behind heavy ones lose all their digits (outside the row, out of order) or become x / 0 = inf.
@pytest.mark.parametrize("span", [3, 5, 8, 12])
@pytest.mark.parametrize("kind", ["random", "descending", "two-levels"])
def test_extreme_importance_keeps_codebooks_finite_ordered_and_inside_the_row(kind, span):
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        inputs, bits = (8, 40, 120)[seed % 3], 1 + seed % 4
        weight = torch.randn(2, 8, inputs, generator=generator).sort(dim=-1).values
        exponents = {
            "random": torch.rand(2, inputs, generator=generator) * 2 - 1,
            "descending": torch.linspace(1, -1, inputs).expand(2, -1),
            "two-levels": torch.where(torch.arange(inputs) < inputs // 4, 1.0, -1.0).expand(2, -1),
        }
        importance = 10 ** (span * exponents[kind])
        codes, codebook = kmeans.cluster(weight, importance, SolverSpec(bits))
        assert torch.isfinite(codebook).all()
        assert (codebook.diff(dim=-1) >= 0).all()
        low, high = weight.aminmax(dim=-1, keepdim=True)
        # A weighted mean lies between its weights, up to its own rounding.
        slack = 2 * EPS32 * weight.abs().amax(dim=-1, keepdim=True)
        assert (codebook >= low - slack).all()
        assert (codebook <= high + slack).all()
        grid = rtn.solve(weight, importance, SolverSpec(bits, torch.float32))
        uniform = cost_of(weight, importance, grid.codebook.gather(-1, grid.codes.long()))
        assert (cost_of(weight, importance, codebook.gather(-1, codes.long())) <= uniform).all()
