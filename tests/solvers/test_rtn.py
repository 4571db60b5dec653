"""Round-to-nearest: a uniform grid from every row's smallest to its largest weight."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_guidedquant.solvers import SolverSpec, rtn
from hf_guidedquant.solvers.base import row_objective

EPS16, EPS32 = torch.finfo(torch.float16).eps, torch.finfo(torch.float32).eps


def random_weight(rows: int = 6, inputs: int = 37, seed: int = 0) -> torch.Tensor:
    weight = torch.randn(2, rows, inputs, generator=torch.Generator().manual_seed(seed))
    return weight * torch.logspace(-2, 2, rows).unsqueeze(-1)


def dense(solution) -> torch.Tensor:
    return solution.codebook.double().gather(-1, solution.codes.long())


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_grid_ends_are_the_smallest_and_largest_weight(bits, dtype):
    weight = random_weight(seed=bits)
    codebook = rtn.solve(weight, None, SolverSpec(bits, dtype)).codebook.double()
    low, high = weight.double().aminmax(dim=-1)
    # Rounding to the storage dtype moves a value by half an ulp; fp32 forms the upper end as low + (high - low).
    rounding = torch.finfo(dtype).eps / 2
    spread = 2 * EPS32 * (low.abs() + high.abs())
    assert ((codebook[..., 0] - low).abs() <= rounding * low.abs()).all()
    assert ((codebook[..., -1] - high).abs() <= rounding * high.abs() + spread).all()


@pytest.mark.parametrize("bits", range(1, 9))
def test_error_is_at_most_half_a_step_and_the_rounding_of_the_grid(bits):
    weight = random_weight(seed=10 + bits)
    solution = rtn.solve(weight, None, SolverSpec(bits))
    low, high = weight.double().aminmax(dim=-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    largest = torch.maximum(low.abs(), high.abs())
    # A grid point is off by half an fp16 ulp and a few fp32 roundings, as is the midpoint that decides.
    slack = (EPS16 / 2 + 8 * EPS32) * largest
    assert ((dense(solution) - weight.double()).abs() <= step / 2 + slack).all()


@pytest.mark.parametrize("bits", [2, 3, 5])
def test_grid_is_uniform(bits):
    weight = random_weight(seed=20 + bits)
    codebook = rtn.solve(weight, None, SolverSpec(bits, torch.float32)).codebook.double()
    low, high = weight.double().aminmax(dim=-1, keepdim=True)
    expected = low + (high - low) * torch.arange(2**bits) / (2**bits - 1)
    # The position, the width, their product and the sum round once each.
    assert ((codebook - expected).abs() <= 4 * EPS32 * (low.abs() + high.abs())).all()


@settings(max_examples=50, deadline=None, derandomize=True)
@given(row=st.lists(st.integers(-500, 500), min_size=1, max_size=20), bits=st.integers(1, 8))
def test_codes_are_the_nearest_grid_points(row, bits):
    weight = torch.tensor(row, dtype=torch.float32).view(1, 1, -1)
    solution = rtn.solve(weight, None, SolverSpec(bits))
    distance = (weight.double().unsqueeze(-1) - solution.codebook.double().unsqueeze(-2)).abs()
    # fp16 grid points and their fp32 midpoints are exact here, so there is nothing to forgive.
    assert torch.equal((dense(solution) - weight).abs(), distance.amin(dim=-1))


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("value", [0.0, -0.375, 1000.0])
def test_constant_rows_are_kept_exactly(value, bits):
    weight = torch.full((1, 3, 5), value)
    solution = rtn.solve(weight, None, SolverSpec(bits))
    assert torch.equal(dense(solution), weight.double())
    assert (solution.objectives["rtn"] == 0).all()


@pytest.mark.parametrize("kind", ["none", "diagonal", "hessian"])
def test_the_reported_objective_is_that_of_the_statistics_given(kind):
    weight = random_weight()
    x = torch.randn(2, 80, 37, generator=torch.Generator().manual_seed(1))
    hessian = x.mT @ x
    statistics = {"none": None, "diagonal": hessian.diagonal(dim1=-2, dim2=-1), "hessian": hessian}[kind]
    solution = rtn.solve(weight, statistics, SolverSpec(3))
    full = {"none": torch.eye(37).expand(2, 37, 37), "diagonal": torch.diag_embed(hessian.diagonal(dim1=-2, dim2=-1))}
    matrix = full.get(kind, hessian).double()
    error = dense(solution) - weight.double()
    truth = torch.einsum("grk,gkl,grl->gr", error, matrix, error)
    # ŵ - w rounds once and enters twice, H e rounds at most K times, the product with e once.
    magnitude = row_objective(torch.zeros_like(error), error.abs(), matrix.abs())
    assert ((solution.objectives["rtn"] - truth).abs() <= (37 + 4) * EPS32 * magnitude).all()
