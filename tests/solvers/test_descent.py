"""The fused block of coordinate descent against the plain loop, in the interpreter and on a GPU.

Hessians, weights and codebooks are small binary fractions and diagonals powers of two: every sum is exact in fp32,
so the codes must be the same whatever the order of the additions.
"""

import pytest
import torch
from interpreter import interpreter_only, not_interpreted, run_interpreted_tests

from hf_guidedquant.solvers import SolverSpec, lnq, quadratic
from hf_guidedquant.solvers.hessian import condition
from hf_guidedquant.solvers.products import SplitProduct

EPS32 = torch.finfo(torch.float32).eps


@not_interpreted
@pytest.mark.timeout(900)
def test_everything_below_in_a_process_with_the_interpreter():
    run_interpreted_tests(__file__)


def framed(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with NaN before and behind it."""
    frame = torch.full((tensor.numel() + 128,), float("nan"), device=tensor.device)
    return frame[64:-64].view(tensor.shape).copy_(tensor)


def frame_is_whole(tensor: torch.Tensor) -> bool:
    frame = tensor._base
    return bool(frame[:64].isnan().all() and frame[-64:].isnan().all())


def exact_problem(groups: int, inputs: int, rows: int, bits: int, device: str = "cpu"):
    """Weights ``[G, R, K]``, a Hessian, codes ``[G, K, R]`` and a codebook ``[G, R, L]`` of short numbers."""
    generator = torch.Generator().manual_seed(inputs + rows + bits)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator).float()

    hessian = integers(-4, 5, groups, inputs, inputs)
    hessian = hessian.tril(-1) + hessian.tril(-1).mT
    hessian.diagonal(dim1=-2, dim2=-1).copy_(2 ** integers(5, 9, groups, inputs))
    codebook = (integers(-64, 64, groups, rows, 2**bits) / 8).sort(dim=-1).values
    codes = torch.randint(2**bits, (groups, inputs, rows), generator=generator).to(torch.uint8)
    weight = integers(-128, 128, groups, rows, inputs) / 16
    return weight.to(device), hessian.to(device), codes.to(device), codebook.to(device)


BLOCKS = {  # groups, inputs, rows, bits, the block, the first input whose slope is there
    "whole": (1, 128, 32, 2, (0, 128), 0),
    "odd-rows": (2, 150, 37, 3, (128, 150), 0),
    "one-row": (1, 40, 1, 4, (0, 40), 0),
    "later-panel": (2, 300, 5, 1, (128, 256), 100),
    "one-input": (3, 33, 3, 2, (32, 33), 32),
    "sixteen": (1, 16, 33, 4, (0, 16), 0),
    "8-bit": (2, 60, 33, 8, (10, 60), 10),
    "5-bit": (1, 20, 4, 5, (3, 20), 1),
}


def check_block(name: str, device: str, outliers: bool) -> None:
    """Same codewords and changes as the plain loop, nothing else touched, nothing beyond the ends read or written.

    With outliers a third of the weights stay where they are, which is on no codeword.
    """
    from hf_guidedquant.solvers.descent import descend

    groups, inputs, rows, bits, (start, stop), panel = BLOCKS[name]
    weight, hessian, codes, codebook = exact_problem(groups, inputs, rows, bits, device)
    quantized, stay = quadratic._look_up(codes, codebook), None
    if outliers:
        stay = torch.rand(quantized.shape, generator=torch.Generator().manual_seed(7)).to(device) < 0.3
        quantized = torch.where(stay, weight.mT + 0.25, quantized)
    pull = (hessian @ (quantized - weight.mT))[:, panel:stop]
    expected, entries = quantized.clone(), codebook.mT.contiguous()
    inverse = 1 / hessian.diagonal(dim1=-2, dim2=-1)
    before = quantized.clone()
    block = {"block": slice(start, stop), "offset": start - panel, "outliers": stay}
    change = quadratic._descend(hessian, inverse, pull, expected, entries, **block)
    given = [framed(tensor) for tensor in (hessian, inverse, pull, quantized, entries)]
    assert torch.equal(descend(*given, **block), change)
    assert torch.equal(given[3], expected)
    assert frame_is_whole(given[3])
    assert (change != 0).any()
    if stay is not None:
        assert torch.equal(expected[stay], before[stay])


@interpreter_only
@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("name", list(BLOCKS))
def test_interpreted_block_is_the_plain_loop(name, outliers):
    check_block(name, "cpu", outliers)


@pytest.mark.gpu
@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("name", list(BLOCKS))
def test_block_on_a_gpu_is_the_plain_loop(name, outliers):
    check_block(name, "cuda", outliers)


def check_ties(device: str) -> None:
    """A weight half-way between two entries takes the lower one."""
    from hf_guidedquant.solvers.descent import descend

    for bits in (1, 2, 5):
        entries = torch.arange(2**bits, device=device).float().view(1, -1, 1).expand(1, -1, 20).contiguous()
        weight = (torch.arange(20 * 20, device=device) % 2 ** (bits + 1)).float().view(1, 20, 20) / 2
        quantized, one = torch.zeros_like(weight), torch.ones(1, 20, device=device)
        hessian = torch.eye(20, device=device).unsqueeze(0)
        descend(hessian, one, quantized - weight, quantized, entries, slice(0, 20), 0)
        assert torch.equal(quantized, (weight - 0.5).ceil().clamp(0, 2**bits - 1))


@interpreter_only
def test_interpreted_ties_go_down():
    check_ties("cpu")


@pytest.mark.gpu
def test_ties_go_down_on_a_gpu():
    check_ties("cuda")


def check_real(device: str) -> None:
    """Real numbers: the codewords of float64, where no target comes so near a midpoint that fp32 may not tell."""
    from hf_guidedquant.solvers.descent import descend

    inputs, rows = 50, 9
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 200, inputs, generator=generator)
    hessian = (x.mT @ x / 200).to(device)
    weight = torch.randn(1, inputs, rows, generator=generator).to(device)
    entries = torch.tensor([-1.5, -0.4, 0.5, 1.4]).view(1, 4, 1).repeat(1, 1, rows).to(device)
    quantized = entries.gather(1, torch.randint(4, (1, inputs, rows), generator=generator).to(device))
    inverse = 1 / hessian.diagonal(dim1=-2, dim2=-1)
    pull = hessian @ (quantized - weight)
    exact, midpoints = quantized.double(), (entries[0, 1:, 0] + entries[0, :-1, 0]) / 2
    for j in range(inputs):
        error, row = exact - weight, hessian[:, j : j + 1].double()
        target = exact[:, j] - (row @ error).squeeze(1) / row[..., j]
        # H e, which was summed before and of whose terms up to j have changed by up to twice the span since; then the
        # quotient, the target and the midpoint.
        size = (row.abs() @ (error.abs() + 2 * 2.9)).squeeze(1) / row[..., j] + exact[:, j].abs()
        distance = (target.unsqueeze(-1) - midpoints).abs().amin(dim=-1)
        assert (distance > (2 * inputs + 4) * EPS32 * size).all()
        exact[:, j] = entries[0, :, 0].double()[(target.unsqueeze(-1) > midpoints).sum(dim=-1)]
    descend(hessian, inverse, pull, quantized, entries, slice(0, inputs), 0)
    assert torch.equal(quantized.double(), exact)


@interpreter_only
def test_interpreted_block_of_real_numbers():
    check_real("cpu")


@pytest.mark.gpu
def test_block_of_real_numbers_on_a_gpu():
    check_real("cuda")


def check_assign(monkeypatch, groups: int, inputs: int, rows: int, bits: int, cycles: int, device: str) -> None:
    """All blocks, panels and cycles, with products in pieces: the codes of the plain loop on a CPU."""
    weight, hessian, codes, codebook = exact_problem(groups, inputs, rows, bits)
    plain = quadratic.Problem(weight, hessian)
    assert not plain.fused
    start = plain.state(codes, codebook)
    expected = plain.assign(start, cycles)
    monkeypatch.setattr(quadratic, "backend_for", lambda device: "triton")
    monkeypatch.setattr(quadratic, "has_tensor_cores", lambda device: True)
    fused = quadratic.Problem(weight.to(device), hessian.to(device))
    assert fused.fused
    assert isinstance(fused.product, SplitProduct)
    result = fused.assign(fused.state(codes.to(device), codebook.to(device)), cycles)
    assert torch.equal(result.codes.cpu(), expected.codes)
    assert torch.equal(result.objective.cpu(), expected.objective)
    assert not torch.equal(expected.codes, codes)


@interpreter_only
def test_interpreted_assignment_over_panels_gives_the_codes_of_the_plain_loop(monkeypatch):
    monkeypatch.setattr(quadratic, "PANEL", 150)
    check_assign(monkeypatch, groups=2, inputs=170, rows=35, bits=2, cycles=2, device="cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
@pytest.mark.parametrize(("groups", "inputs", "rows"), [(1, 1300, 70), (3, 129, 33), (1, 512, 1)])
def test_assignment_on_a_gpu_gives_the_codes_of_the_plain_loop(monkeypatch, groups, inputs, rows, bits):
    check_assign(monkeypatch, groups, inputs, rows, bits, cycles=3, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_gpu_reaches_the_objective_of_the_cpu_and_says_so_truthfully(bits):
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(2, 1200, 300, generator=generator) @ (
        torch.eye(300) + torch.randn(2, 300, 300, generator=generator) / 300**0.5
    )
    hessian = condition(x.mT @ x, "layer")[0]
    weight = torch.randn(2, 64, 300, generator=generator)
    spec = SolverSpec(bits)
    there = lnq.solve(weight.cuda(), hessian.cuda(), spec)
    again = lnq.solve(weight.cuda(), hessian.cuda(), spec)
    assert torch.equal(there.codes, again.codes)
    assert torch.equal(there.codebook, again.codebook)
    error = (there.codebook.double().gather(-1, there.codes.long()).cpu() - weight).double()
    truth = torch.einsum("grk,gkl,grl->gr", error, hessian.double(), error)
    magnitude = torch.einsum("grk,gkl,grl->gr", error.abs(), hessian.double().abs(), error.abs())
    assert ((there.objectives["lnq"].cpu() - truth).abs() <= (300 + 8) * EPS32 * magnitude).all()
    # A rounded near-tie sends a row to another local optimum, better or worse; over many rows it evens out. Rows
    # scatter by less than their size, so the mean of 128 by less than a tenth.
    here = lnq.solve(weight, hessian, spec)
    assert abs(there.objectives["lnq"].sum().cpu() / here.objectives["lnq"].sum() - 1) < 0.1
    assert (there.objectives["lnq"] <= there.objectives["kmeans"]).all()
