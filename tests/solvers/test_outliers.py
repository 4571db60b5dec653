"""Outliers beside the codes: which they are, that the others do not see them, and what they make good for."""

import pytest
import torch
from test_lnq import naive_descent, random_state
from test_registry import EPS32, G, K, R, as_matrix, problem

from hf_guidedquant.solvers import SOLVERS, SolverSpec, outliers, quadratic, solve

COUNT = 3


def heavy_tailed(name: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A problem with some weights far from the others, and statistics of the kind that a method needs."""
    weight, statistics = problem(SOLVERS[name].statistics, seed)
    return weight * (1 + weight.square()), statistics


def chosen(columns: torch.Tensor) -> torch.Tensor:
    return torch.zeros(G, R, K, dtype=torch.bool).scatter_(-1, columns, True)


def stored(solution) -> torch.Tensor:
    """What a solution stands for, in float64."""
    dense = solution.codebook.double().gather(-1, solution.codes.long())
    return dense.scatter_add_(-1, solution.overlay.columns, solution.overlay.values.double())


def objective(error: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    return torch.einsum("grk,gkl,grl->gr", error, matrix, error)


@pytest.fixture(params=list(SOLVERS))
def name(request):
    return request.param


@pytest.mark.parametrize("kind", ["none", "diagonal", "hessian"])
@pytest.mark.parametrize("count", [0, 1, 5, K])
def test_they_are_the_weights_of_largest_fisher_weighted_magnitude(kind, count):
    weight, statistics = problem(kind)
    columns = outliers.choose(weight, statistics, count)
    diagonals = as_matrix(statistics).diagonal(dim1=-2, dim2=-1).tolist()
    for group, rows in enumerate(weight.double().tolist()):
        for row, values in enumerate(rows):
            order = sorted(range(K), key=lambda k: -diagonals[group][k] * values[k] ** 2)
            assert columns[group, row].tolist() == sorted(order[:count])


def test_of_equal_weights_the_first_are_chosen_whatever_is_chosen_at_a_time(monkeypatch):
    weight = torch.tensor([1.0, -2.0, 2.0, 0.0, 2.0, -2.0]).expand(2, 9, 6)
    for elements in (1 << 25, 40):
        monkeypatch.setattr("hf_guidedquant.solvers.base.ELEMENTS", elements)
        assert torch.equal(outliers.choose(weight, None, 3), torch.tensor([1, 2, 4]).expand(2, 9, 3))


def test_what_the_outliers_are_changes_nothing_of_the_others(name):
    """As long as their errors count as zero: other values there, other codes there, and nothing else."""
    weight, statistics = heavy_tailed(name)
    mask = chosen(outliers.choose(weight, statistics, COUNT))
    first, second = (
        SOLVERS[name].solve(torch.where(mask, other, weight), statistics, SolverSpec(2), mask)
        for other in (weight, -40 * weight + 7)
    )
    assert torch.equal(first.codebook, second.codebook)
    assert torch.equal(first.codes[~mask], second.codes[~mask])
    for stage, value in first.objectives.items():
        assert torch.equal(value, second.objectives[stage])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_last_objective_is_that_of_what_will_be_stored(name, bits, dtype):
    weight, statistics = heavy_tailed(name, seed=bits)
    solution = solve(name, weight, statistics, SolverSpec(bits, dtype, outliers=COUNT))
    overlay = solution.overlay
    assert (overlay.columns.dtype, overlay.columns.shape) == (torch.int64, (G, R, COUNT))
    assert (overlay.values.dtype, overlay.values.shape) == (dtype, (G, R, COUNT))
    assert (overlay.columns.diff(dim=-1) > 0).all()
    matrix, quantized = as_matrix(statistics), stored(solution)
    error = quantized - weight.double()
    # As for solutions without outliers, and the sum with the codeword rounds once more.
    scale = error.abs() + EPS32 * quantized.abs()
    magnitude = torch.einsum("grk,gkl,grl->gr", scale, matrix.abs(), scale)
    assert list(solution.objectives)[-1] == "overlay"
    assert ((solution.objectives["overlay"] - objective(error, matrix)).abs() <= (K + 8) * EPS32 * magnitude).all()


def test_outliers_lower_the_objective_of_every_method_on_every_problem(name):
    for seed in range(20):
        weight, statistics = heavy_tailed(name, seed)
        without, with_them = (
            list(solve(name, weight, statistics, SolverSpec(2, outliers=count)).objectives.values())[-1].sum()
            for count in (0, COUNT)
        )
        assert with_them < without


def test_no_outliers_are_the_method_itself(name):
    weight, statistics = heavy_tailed(name)
    alone, through = (
        SOLVERS[name].solve(weight, statistics, SolverSpec(3)),
        solve(name, weight, statistics, SolverSpec(3)),
    )
    assert through.overlay is None
    assert torch.equal(alone.codes, through.codes)
    assert torch.equal(alone.codebook, through.codebook)


@pytest.mark.parametrize("seed", range(5))
def test_they_make_good_for_the_errors_of_the_others(seed):
    """Row by row the least of ``eᵀ H e + 0.01 e_Oᵀ diag(H_OO) e_O`` over the outliers' errors, in float64."""
    weight, hessian = heavy_tailed("lnq", seed)
    solution = solve("lnq", weight, hessian, SolverSpec(2, torch.float32, outliers=COUNT))
    error, matrix = stored(solution) - weight.double(), hessian.double()
    for group in range(G):
        for row in range(R):
            places = solution.overlay.columns[group, row]
            others = error[group, row].clone()
            others[places] = 0
            among = matrix[group][places][:, places]
            expected = -torch.linalg.solve(among + 0.01 * among.diagonal().diag(), (matrix[group] @ others)[places])
            # The pull is a sum of K products in fp32, and the result is rounded to it next to the weight.
            pull = (matrix[group].abs() @ others.abs())[places]
            slack = torch.linalg.inv(among).abs() @ (K * EPS32 * pull) + 4 * EPS32 * weight[group, row][places].abs()
            assert ((error[group, row][places] - expected).abs() <= slack).all()


def test_they_never_make_it_worse():
    for seed in range(20):
        weight, hessian = heavy_tailed("lnq", seed)
        found = solve("lnq", weight, hessian, SolverSpec(2, torch.float32, outliers=COUNT)).objectives
        assert (found["overlay"] <= found["lnq"] * (1 + K * EPS32)).all()
        assert found["overlay"].sum() < 0.999 * found["lnq"].sum()


def test_dependent_inputs_do_not_make_them_explode():
    """Two outliers of inputs that are one and the same: H_OO is singular, and any multiple would do."""
    weight, hessian = heavy_tailed("lnq")
    weight[..., :2] = 50
    hessian[:, 1], hessian[:, :, 1] = hessian[:, 0], hessian[:, :, 0]
    hessian[:, 1, 1] = hessian[:, 0, 0]
    solution = solve("lnq", weight, hessian, SolverSpec(2, outliers=2))
    assert (stored(solution)[..., :2] - 50).abs().max() < 10


def masked_problem(seed: int) -> tuple[quadratic.Problem, quadratic.Problem, torch.Tensor]:
    """LNQ with the same outliers in every row, LNQ without these inputs, and the inputs that are left; float64."""
    weight, hessian = (tensor.double() for tensor in problem("hessian", seed))
    mask = torch.zeros(G, R, K, dtype=torch.bool)
    mask[..., [3, 20, 36]] = True
    left = torch.arange(K)[~mask[0, 0]]
    return (
        quadratic.Problem(weight, hessian, mask),
        quadratic.Problem(weight[..., left], hessian[:, left][:, :, left]),
        left,
    )


@pytest.mark.parametrize("block", [4, 128])
def test_coordinate_descent_is_that_without_these_inputs(block, monkeypatch):
    monkeypatch.setattr(quadratic, "BLOCK", block)
    whole, part, left = masked_problem(1)
    start = random_state(whole, 2, seed=1)
    found = whole.assign(start, cycles=2)
    for group in range(G):
        for row in range(R):
            expected = naive_descent(
                part.weight[group, :, row].tolist(),
                part.hessian[group].tolist(),
                start.codes[group, left, row].tolist(),
                start.codebook[group, row].tolist(),
                cycles=2,
            )
            assert found.codes[group, left, row].tolist() == expected


def test_the_codebook_step_is_that_without_these_inputs():
    whole, part, left = masked_problem(2)
    start = random_state(whole, 2, seed=2)
    fitted = whole.fit_codebook(start)
    expected = part.fit_codebook(part.state(start.codes[:, left].contiguous(), start.codebook))
    torch.testing.assert_close(fitted.codebook, expected.codebook, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fitted.objective, expected.objective, rtol=1e-9, atol=1e-9)
    assert torch.equal(fitted.codes[:, left], expected.codes)
