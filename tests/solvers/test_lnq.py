"""LNQ against naive loops and least squares in float64, and its promises: never worse, stationary, repeatable."""

import pytest
import torch

from hf_guidedquant.solvers import SolverSpec, kmeans, lnq, quadratic, rtn
from hf_guidedquant.solvers.base import row_objective
from hf_guidedquant.solvers.hessian import condition

EPS32, EPS64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps


def correlated_hessian(groups: int, inputs: int, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Gram matrices of inputs that mix with each other and differ in size, conditioned: fp32 ``[G, K, K]``."""
    mixing = torch.randn(groups, inputs, inputs, generator=generator) / inputs**0.5
    mixing = mixing + torch.eye(inputs)
    x = torch.randn(groups, tokens, inputs, generator=generator) @ mixing
    x = x * torch.randn(groups, 1, inputs, generator=generator).exp()
    return condition(x.mT @ x, "layer")[0]


def problem(seed: int, groups: int = 2, rows: int = 3, inputs: int = 21) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and Hessian in float64, the Hessian of full rank."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(groups, rows, inputs, generator=generator, dtype=torch.float64)
    return weight, correlated_hessian(groups, inputs, 4 * inputs, generator).double()


def random_state(lnq_problem: quadratic.Problem, bits: int, seed: int) -> quadratic.State:
    """Codes and an ascending codebook at random."""
    groups, inputs, rows = lnq_problem.weight.shape
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (groups, inputs, rows), generator=generator).to(torch.uint8)
    codebook = torch.randn(groups, rows, 2**bits, generator=generator, dtype=torch.float64).sort(dim=-1).values
    return lnq_problem.state(codes, codebook)


def true_objective(solution, weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    quantized = solution.codebook.double().gather(-1, solution.codes.long())
    error = quantized - weight.double()
    return torch.einsum("grk,gkl,grl->gr", error, hessian.double(), error)


def naive_descent(w: list, h: list, codes: list, codebook: list, cycles: int) -> list:
    """Coordinate descent on one row, straight from the formula."""
    codes = list(codes)
    for _ in range(cycles):
        for j in range(len(w)):
            pull = sum((codebook[codes[i]] - w[i]) * h[i][j] for i in range(len(w)) if i != j)
            target = w[j] - pull / h[j][j]
            codes[j] = min(range(len(codebook)), key=lambda entry, target=target: abs(codebook[entry] - target))
    return codes


@pytest.mark.parametrize(("panel", "block"), [(1, 1), (10, 4), (1024, 8), (8, 21), (1024, 128)])
@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("cycles", [1, 3])
def test_blocked_coordinate_descent_is_the_naive_loop(monkeypatch, panel, block, bits, cycles):
    monkeypatch.setattr(quadratic, "PANEL", panel)
    monkeypatch.setattr(quadratic, "BLOCK", block)
    weight, hessian = problem(seed=bits)
    descent = quadratic.Problem(weight, hessian)
    start = random_state(descent, bits, seed=7)
    end = descent.assign(start, cycles)
    for g in range(weight.shape[0]):
        for r in range(weight.shape[1]):
            expected = naive_descent(
                weight[g, r].tolist(),
                hessian[g].tolist(),
                start.codes[g, :, r].tolist(),
                start.codebook[g, r].tolist(),
                cycles,
            )
            assert end.codes[g, :, r].tolist() == expected
    assert torch.equal(end.codebook, start.codebook)
    assert not torch.equal(end.codes, start.codes)


@pytest.mark.parametrize("chunk", [1, 1 << 23])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_codebook_step_is_least_squares_and_leaves_empty_codewords_alone(monkeypatch, chunk, bits):
    monkeypatch.setattr(quadratic, "_CHUNK", chunk)
    weight, hessian = problem(seed=20 + bits)
    inputs, levels = weight.shape[-1], 2**bits
    step = quadratic.Problem(weight, hessian)
    before = random_state(step, bits, seed=8)
    after = step.fit_codebook(before)
    assert (after.codebook.diff(dim=-1) >= 0).all()
    # One more empty codeword than chance leaves: nobody uses the first.
    before = step.state(before.codes.clamp_min(1), before.codebook)
    after = step.fit_codebook(before)
    for g in range(weight.shape[0]):
        factor = torch.linalg.cholesky(hessian[g])  # H = L Lᵀ, so the objective is |Lᵀ (P c - w)|²
        for r in range(weight.shape[1]):
            codes, old = before.codes[g, :, r].long(), before.codebook[g, r]
            used = codes.unique()
            one_hot = (codes.unsqueeze(1) == used).double()
            best = torch.linalg.lstsq(factor.mT @ one_hot, (factor.mT @ weight[g, r]).unsqueeze(1)).solution.squeeze(1)
            normal = one_hot.mT @ hessian[g] @ one_hot
            spectrum = torch.linalg.eigvalsh(normal)
            # A ridge of up to ε shortens the step by at most ε / λ_min; forming and solving the normal equations loses
            # K eps cond(A) of the codebook's size.
            ridge = quadratic._RIDGE * normal.diagonal().max() + quadratic._RIDGE_OF_MEAN * normal.trace() / levels
            size = torch.cat([best, old]).abs().max() * levels**0.5
            bound = (
                ridge / spectrum[0] * (best - old[used]).norm() + 8 * inputs * EPS64 * spectrum[-1] / spectrum[0] * size
            )
            fitted = after.codebook[g, r][after.codes[g, :, r].long()]
            low, high = weight[g, r].aminmax()
            best = best.clamp(2 * low - high, 2 * high - low)
            assert ((fitted - one_hot @ best).abs() <= bound).all()
            empty = [entry for entry in range(levels) if entry not in used.tolist()]
            assert 0 in empty
            assert all((after.codebook[g, r] == old[entry]).any() for entry in empty)


def random_case(seed: int) -> tuple[torch.Tensor, torch.Tensor, SolverSpec]:
    """Any shape, bits 1-4; Hessians of full rank, ill-conditioned, rank-deficient, rank 1, or with twin inputs."""
    generator = torch.Generator().manual_seed(1000 + seed)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    groups, rows, inputs = pick(1, 3), pick(1, 6), pick(130, 150) if seed % 20 == 0 else pick(1, 50)
    tokens = (4 * inputs, 4 * inputs, max(1, inputs // 2), 1, 4 * inputs)[seed % 5]
    x = torch.randn(groups, tokens, inputs, generator=generator)
    if seed % 5 == 1:
        x = x * torch.logspace(-4, 0, inputs)
    if seed % 5 == 4:
        x[..., inputs // 2 :] = x[..., : inputs - inputs // 2]
    weight = torch.randn(groups, rows, inputs, generator=generator)
    return weight, condition(x.mT @ x, "layer")[0], SolverSpec(pick(1, 5))


@pytest.mark.parametrize("seed", range(200))
def test_objective_never_increases_and_is_reported_truthfully(seed):
    weight, hessian, spec = random_case(seed)
    solution = lnq.solve(weight, hessian, spec)
    assert list(solution.objectives) == ["kmeans", "lnq"]
    assert (solution.objectives["lnq"] <= solution.objectives["kmeans"]).all()
    truth = true_objective(solution, weight, hessian)
    error = (solution.codebook.double().gather(-1, solution.codes.long()) - weight).abs()
    # ŵ - w rounds once (twice used), H e at most K times, the product with e once; the sum over inputs is fp64.
    magnitude = torch.einsum("grk,gkl,grl->gr", error, hessian.double().abs(), error)
    assert ((solution.objectives["lnq"] - truth).abs() <= (weight.shape[-1] + 4) * EPS32 * magnitude).all()


@pytest.mark.parametrize("seed", range(10))
def test_what_is_saved_is_stationary_no_single_code_change_helps(seed):
    cycles = 60
    weight, hessian = problem(seed, rows=4, inputs=33)
    solution = lnq.solve(weight, hessian, SolverSpec(bits=1 + seed % 4, lnq_cycles=cycles))
    codebook = solution.codebook.double()
    quantized = codebook.gather(-1, solution.codes.long())
    slope = torch.bmm(quantized - weight, hessian)
    step = codebook.unsqueeze(2) - quantized.unsqueeze(3)  # [G, R, K, L]: every other choice of every code
    curvature = hessian.diagonal(dim1=-2, dim2=-1).unsqueeze(1)  # H_jj
    change = 2 * slope.unsqueeze(-1) * step + curvature.unsqueeze(-1) * step.square()
    # H e is kept up to date over all cycles, K terms of at most |H| · span each; the target and the midpoint then
    # round at the size of the values, and so does this check.
    span = 2 * torch.maximum(codebook.abs().amax(-1), weight.abs().amax(-1)).unsqueeze(-1)
    noise = (
        EPS64 * span * ((cycles + 1) * (weight.shape[-1] + 3) * hessian.abs().sum(dim=1).unsqueeze(1) + 4 * curvature)
    )
    assert (change >= -4 * step.abs() * noise.unsqueeze(-1)).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_lnq_beats_squeezellm_beats_rtn_on_the_objective(seed, bits):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(2, 16, 96, generator=generator)
    hessian = correlated_hessian(2, 96, 400, generator)
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    spec = SolverSpec(bits)
    ours = true_objective(lnq.solve(weight, hessian, spec), weight, hessian)
    clustered = true_objective(kmeans.solve(weight, diagonal, spec), weight, hessian)
    grid = true_objective(rtn.solve(weight, None, spec), weight, hessian)
    assert (ours <= clustered).all()
    assert ours.sum() < clustered.sum() < grid.sum()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_sweep_is_a_better_start_than_k_means(bits):
    """Where inputs depend on each other; of many rows together, not of each."""
    found = dict.fromkeys((0, 1, 3), 0.0)
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(2, 16, 96, generator=generator)
        hessian = correlated_hessian(2, 96, 400, generator)
        for sweeps in found:
            solution = lnq.solve(weight, hessian, SolverSpec(bits, lnq_sweeps=sweeps))
            found[sweeps] += float(true_objective(solution, weight, hessian).sum())
    assert found[1] < found[0]


# others back.
@pytest.mark.parametrize("bits", [5, 6, 7, 8])
def test_lnq_beats_rtn_at_many_bits(bits):
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(1, 4, 300, generator=generator)
    hessian = correlated_hessian(1, 300, 1200, generator)
    ours = true_objective(lnq.solve(weight, hessian, SolverSpec(bits)), weight, hessian)
    assert (ours < true_objective(rtn.solve(weight, None, SolverSpec(bits)), weight, hessian)).all()


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("seed", range(5))
def test_each_step_alone_never_raises_the_objective(seed, bits):
    weight, hessian = problem(seed, rows=5, inputs=40)
    steps = quadratic.Problem(weight, hessian)
    state = random_state(steps, bits, seed)
    for step in (lambda s: steps.assign(s, 1), steps.fit_codebook) * 3:
        after = step(state)
        # The first objective is the largest; its K² terms round at most K + 2 times each.
        error = (quadratic._look_up(state.codes, state.codebook) - steps.weight).abs()
        slack = 2 * (40 + 2) * EPS64 * (error * torch.bmm(hessian.abs(), error)).sum(dim=1)
        assert (after.objective <= state.objective + slack).all()
        state = after


def test_groups_at_once_equal_groups_one_by_one():
    weight, hessian = problem(seed=50, groups=3, rows=5, inputs=40)
    spec = SolverSpec(3)
    together = lnq.solve(weight, hessian, spec)
    for g in range(3):
        alone = lnq.solve(weight[g : g + 1], hessian[g : g + 1], spec)
        assert torch.equal(together.codes[g : g + 1], alone.codes)
        assert torch.equal(together.codebook[g : g + 1], alone.codebook)


def test_rows_do_not_depend_on_each_other():
    weight, hessian = problem(seed=51, groups=1, rows=6, inputs=40)
    together = lnq.solve(weight, hessian, SolverSpec(3))
    alone = lnq.solve(weight[:, 2:3], hessian, SolverSpec(3))
    assert torch.equal(together.codes[:, 2:3], alone.codes)
    assert torch.equal(together.codebook[:, 2:3], alone.codebook)


@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize(("rows", "inputs"), [(1, 1), (4, 1), (1, 30), (3, 140)])
def test_constant_rows_are_kept_exactly(rows, inputs, bits):
    hessian = correlated_hessian(1, inputs, 4 * inputs, torch.Generator().manual_seed(inputs))
    weight = torch.arange(rows).float().view(1, rows, 1).expand(1, rows, inputs) - 1.5
    solution = lnq.solve(weight, hessian, SolverSpec(bits))
    assert torch.equal(solution.codebook.float().gather(-1, solution.codes.long()), weight)
    assert (solution.objectives["lnq"] == 0).all()


@pytest.mark.parametrize(("bits", "distinct"), [(1, 2), (2, 3), (3, 5), (8, 40)])
def test_fewer_distinct_values_than_codewords_lose_nothing(bits, distinct):
    generator = torch.Generator().manual_seed(distinct)
    values = torch.randn(distinct, generator=generator).half().float()
    weight = values[torch.randint(distinct, (2, 3, 45), generator=generator)]
    solution = lnq.solve(weight, correlated_hessian(2, 45, 200, generator), SolverSpec(bits))
    assert torch.equal(solution.codebook.float().gather(-1, solution.codes.long()), weight)
    assert (solution.objectives["lnq"] == 0).all()


@pytest.mark.parametrize("bits", [1, 8])
@pytest.mark.parametrize(("rows", "inputs"), [(1, 1), (1, 40), (1, 60), (5, 2)])
def test_smallest_shapes_and_extreme_bits(bits, rows, inputs):
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(1, rows, inputs, generator=generator)
    hessian = correlated_hessian(1, inputs, 4 * inputs, generator)
    solution = lnq.solve(weight, hessian, SolverSpec(bits, torch.float32))
    assert (solution.objectives["lnq"] <= solution.objectives["kmeans"]).all()
    if inputs <= 2**bits:
        # Enough codewords for every weight: what is left is fp64 -> fp32 rounding of the codewords.
        exact = row_objective(weight.abs(), torch.zeros_like(weight), hessian.abs())
        assert (solution.objectives["lnq"] <= (4 * EPS32) ** 2 * exact).all()


@pytest.mark.parametrize("bits", [2, 3, 5])
@pytest.mark.parametrize("inputs", [64, 256])
def test_codebooks_stay_near_the_weights_where_inputs_sum_to_zero(bits, inputs):
    """As behind a layer norm without weights: nothing is lost if a row's codewords are all moved alike."""
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(1, 4096, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    hessian, _ = condition((x := torch.nn.functional.layer_norm(x, x.shape[-1:])).mT @ x, "layer")
    weight = 0.06 * torch.randn(1, 48, inputs, generator=generator)
    solution = lnq.solve(weight, hessian, SolverSpec(bits=bits))
    low, high = weight.aminmax(dim=-1)
    assert (solution.codebook.float().amin(dim=-1) >= low - 0.1 * (high - low)).all()
    assert (solution.codebook.float().amax(dim=-1) <= high + 0.1 * (high - low)).all()
    # Rounding the sums costs so much of what the terms amount to.
    quantized = solution.codebook.float().gather(-1, solution.codes.long())
    size = row_objective(weight.abs() + quantized.abs(), torch.zeros_like(weight), hessian.abs())
    assert (
        (solution.objectives["lnq"] - true_objective(solution, weight, hessian)).abs() <= inputs * EPS32 * size
    ).all()


def test_the_same_input_gives_the_same_bytes_twice():
    weight, hessian, _ = random_case(20)
    first, second = (lnq.solve(weight.clone(), hessian.clone(), SolverSpec(3)) for _ in range(2))
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.codebook.view(torch.int16), second.codebook.view(torch.int16))
    assert torch.equal(first.objectives["lnq"], second.objectives["lnq"])
