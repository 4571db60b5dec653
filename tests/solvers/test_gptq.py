"""GPTQ and GPTVQ-1D against the textbook: one input at a time, the inverse Hessian updated explicitly, in float64."""

import pytest
import torch
from test_lnq import correlated_hessian, problem, true_objective

from hf_guidedquant.solvers import SolverSpec, gptq, gptvq1d, kmeans, lnq, quadratic, rtn
from hf_guidedquant.solvers.base import nearest
from hf_guidedquant.solvers.hessian import condition

SWEEPS = {"gptq": gptq.solve, "gptvq1d": gptvq1d.solve}


def textbook(w: torch.Tensor, h: torch.Tensor, codebook: list[float]) -> list[int]:
    """Codes of one row: quantize an input, spread its error over those that are left, take it out of H⁻¹."""
    w, codes = w.clone(), [-1] * len(w)
    inverse = torch.linalg.inv(h + gptq.DAMPING * h.trace() / len(w) * torch.eye(len(w), dtype=h.dtype))
    for j in h.diagonal().argsort(descending=True, stable=True).tolist():
        codes[j] = min(range(len(codebook)), key=lambda entry, j=j: abs(codebook[entry] - float(w[j])))
        w -= (w[j] - codebook[codes[j]]) / inverse[j, j] * inverse[j]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


@pytest.mark.parametrize(("panel", "block"), [(1, 1), (10, 4), (8, 21), (1024, 8), (1024, 128)])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_blocked_sweep_is_the_textbook(monkeypatch, panel, block, bits):
    monkeypatch.setattr(quadratic, "PANEL", panel)
    monkeypatch.setattr(quadratic, "BLOCK", block)
    weight, hessian = problem(seed=bits)
    spec = SolverSpec(bits)
    grids = {
        "gptq": rtn.solve(weight, None, spec).codebook,
        "gptvq1d": kmeans.solve(weight, hessian.diagonal(dim1=-2, dim2=-1), spec).codebook,
    }
    for codebook in grids.values():
        codebook = codebook.double()
        codes = gptq.Sweep(weight, hessian).codes(codebook)
        assert not torch.equal(codes, nearest(codebook, weight))
        for g in range(weight.shape[0]):
            for r in range(weight.shape[1]):
                assert codes[g, r].tolist() == textbook(weight[g, r], hessian[g], codebook[g, r].tolist())


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_gptq_is_the_sweep_on_the_grid_of_rtn(bits):
    weight, hessian = problem(seed=10 + bits)
    solution = gptq.solve(weight, hessian, SolverSpec(bits))
    assert torch.equal(solution.codebook, rtn.solve(weight, None, SolverSpec(bits)).codebook)
    assert torch.equal(solution.codes, gptq.Sweep(weight, hessian).codes(solution.codebook.double()))


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_gptvq1d_fits_its_codebook_to_the_codes_of_the_sweep(bits):
    """Least squares by QR, in float64; the stored codebook is its rounding."""
    weight, hessian = problem(seed=20 + bits, inputs=40)
    spec = SolverSpec(bits, torch.float32)
    start = kmeans.solve(weight, hessian.diagonal(dim1=-2, dim2=-1), spec).codebook.double()
    codes = gptq.Sweep(weight, hessian).codes(start).long()
    solution = gptvq1d.solve(weight, hessian, spec)
    quantized = solution.codebook.double().gather(-1, solution.codes.long())
    for g in range(weight.shape[0]):
        factor = torch.linalg.cholesky(hessian[g])
        for r in range(weight.shape[1]):
            one_hot = torch.nn.functional.one_hot(codes[g, r], 2**bits).double()
            assert (one_hot.sum(dim=0) > 0).all()
            best = torch.linalg.lstsq(factor.mT @ one_hot, (factor.mT @ weight[g, r]).unsqueeze(1)).solution
            # The ridge shortens the step by at most ε / λ_min of its length; fp32 rounds what is stored.
            normal = one_hot.mT @ hessian[g] @ one_hot
            ridge = quadratic._RIDGE * normal.trace() / 2**bits / torch.linalg.eigvalsh(normal)[0]
            step = (best.squeeze(1) - start[g, r]).norm()
            bound = ridge * step + torch.finfo(torch.float32).eps * best.abs().max()
            assert ((quantized[g, r] - (one_hot @ best).squeeze(1)).abs() <= bound).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_better_methods_have_lower_objectives(bits):
    found = dict.fromkeys(("rtn", "gptq", "gptvq1d", "lnq"), 0.0)
    for seed in range(6):
        generator = torch.Generator().manual_seed(100 * bits + seed)
        weight = torch.randn(2, 16, 96, generator=generator)
        hessian = correlated_hessian(2, 96, 400, generator)
        for name, solve in {"rtn": rtn.solve, **SWEEPS, "lnq": lnq.solve}.items():
            statistics = None if name == "rtn" else hessian
            found[name] += float(true_objective(solve(weight, statistics, SolverSpec(bits)), weight, hessian).sum())
    assert found["lnq"] < found["gptvq1d"] < found["gptq"] < found["rtn"]


@pytest.mark.parametrize("seed", range(20))
def test_the_codebook_update_never_raises_the_objective(seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = 5 + 7 * seed
    weight = torch.randn(2, 3, inputs, generator=generator)
    tokens = 4 * inputs if seed % 2 else max(1, inputs // 3)
    x = torch.randn(2, tokens, inputs, generator=generator)
    solution = gptvq1d.solve(weight, condition(x.mT @ x, "layer")[0], SolverSpec(1 + seed % 8))
    assert list(solution.objectives) == ["kmeans", "gptq", "gptvq1d"]
    assert (solution.objectives["gptvq1d"] <= solution.objectives["gptq"]).all()


@pytest.mark.parametrize("name", list(SWEEPS))
class TestBoth:
    def test_groups_at_once_equal_groups_one_by_one(self, name):
        weight, hessian = problem(seed=50, groups=3, rows=5, inputs=40)
        together = SWEEPS[name](weight, hessian, SolverSpec(3))
        for g in range(3):
            alone = SWEEPS[name](weight[g : g + 1], hessian[g : g + 1], SolverSpec(3))
            assert torch.equal(together.codes[g : g + 1], alone.codes)
            assert torch.equal(together.codebook[g : g + 1], alone.codebook)

    def test_rows_do_not_depend_on_each_other(self, name):
        weight, hessian = problem(seed=51, groups=1, rows=6, inputs=40)
        together = SWEEPS[name](weight, hessian, SolverSpec(3))
        alone = SWEEPS[name](weight[:, 2:3], hessian, SolverSpec(3))
        assert torch.equal(together.codes[:, 2:3], alone.codes)
        assert torch.equal(together.codebook[:, 2:3], alone.codebook)

    @pytest.mark.parametrize("bits", range(1, 9))
    @pytest.mark.parametrize("inputs", [1, 2, 130])
    def test_constant_rows_are_kept_exactly(self, name, inputs, bits):
        hessian = correlated_hessian(1, inputs, 4 * inputs, torch.Generator().manual_seed(inputs))
        weight = torch.tensor([0.0, -0.375, 1000.0]).view(1, 3, 1).expand(1, 3, inputs)
        solution = SWEEPS[name](weight, hessian, SolverSpec(bits))
        assert torch.equal(solution.codebook.float().gather(-1, solution.codes.long()), weight)
        assert all((objective == 0).all() for objective in solution.objectives.values())

    def test_a_dead_input_takes_its_nearest_codeword_and_moves_no_other(self, name):
        weight, hessian = problem(seed=52, rows=4, inputs=30)
        hessian[:, 7], hessian[..., 7] = 0, 0
        hessian = condition(hessian.float(), "layer")[0].double()
        codebook = rtn.grid(weight, SolverSpec(2))
        codes = gptq.Sweep(weight, hessian).codes(codebook)
        assert torch.equal(codes[..., 7], nearest(codebook, weight)[..., 7])
        changed = weight.clone()
        changed[..., 7] = codebook[..., 1]
        others = torch.arange(30) != 7
        assert torch.equal(gptq.Sweep(changed, hessian).codes(codebook)[..., others], codes[..., others])

    @pytest.mark.parametrize("rank", [1, 5])
    def test_singular_hessians_do_no_worse_than_rounding(self, name, rank):
        generator = torch.Generator().manual_seed(rank)
        weight = torch.randn(2, 16, 64, generator=generator)
        x = torch.randn(2, rank, 64, generator=generator)
        hessian = condition(x.mT @ x, "layer")[0]
        first, *_, last = SWEEPS[name](weight, hessian, SolverSpec(3)).objectives.values()
        assert last.sum() < first.sum()


def test_what_no_damping_helps_is_rounded_input_by_input():
    hessian = torch.full((1, 4, 4), -1.0) + 4.0 * torch.eye(4)
    hessian[0, 0, 1] = hessian[0, 1, 0] = 50.0
    weight = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    codebook = rtn.grid(weight, SolverSpec(2))
    assert torch.equal(gptq.Sweep(weight, hessian).codes(codebook), nearest(codebook, weight))
