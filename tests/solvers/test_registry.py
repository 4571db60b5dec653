"""What every solver in the table promises; a new row inherits these tests."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_guidedquant.solvers import SOLVERS, SolverSpec
from hf_guidedquant.solvers.hessian import condition

EPS32 = torch.finfo(torch.float32).eps
G, R, K = 2, 5, 37


def problem(kind: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights ``[G, R, K]`` and the kind of statistics that a method declares, and nothing more."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(G, R, K, generator=generator)
    x = torch.randn(G, 3 * K, K, generator=generator) * torch.randn(G, 1, K, generator=generator).exp()
    hessian = x.mT @ x
    if kind == "hessian":
        return weight, condition(hessian, "layer")[0]
    if kind == "diagonal":
        return weight, condition(hessian.diagonal(dim1=-2, dim2=-1), "layer")[0]
    return weight, None


def as_matrix(statistics: torch.Tensor | None) -> torch.Tensor:
    if statistics is None:
        return torch.eye(K, dtype=torch.float64).expand(G, K, K)
    return (statistics if statistics.dim() == 3 else torch.diag_embed(statistics)).double()


@pytest.fixture(params=list(SOLVERS))
def method(request):
    return SOLVERS[request.param]


@pytest.mark.parametrize("name", list(SOLVERS))
def test_statistics_are_of_a_known_kind(name):
    assert SOLVERS[name].statistics in ("none", "diagonal", "hessian")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", range(1, 9))
def test_shapes_dtypes_order_and_range(method, bits, dtype):
    weight, statistics = problem(method.statistics)
    solution = method.solve(weight, statistics, SolverSpec(bits, dtype))
    assert (solution.codes.dtype, solution.codes.shape) == (torch.uint8, (G, R, K))
    assert (solution.codebook.dtype, solution.codebook.shape) == (dtype, (G, R, 2**bits))
    assert solution.codes.is_contiguous()
    assert solution.codebook.is_contiguous()
    assert torch.isfinite(solution.codebook).all()
    assert (solution.codebook.float().diff(dim=-1) >= 0).all()
    assert int(solution.codes.max()) < 2**bits
    assert all(o.dtype == torch.float64 and o.shape == (G, R) for o in solution.objectives.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_last_objective_is_that_of_what_will_be_stored(method, bits, dtype):
    weight, statistics = problem(method.statistics, seed=bits)
    solution = method.solve(weight, statistics, SolverSpec(bits, dtype))
    error = solution.codebook.double().gather(-1, solution.codes.long()) - weight.double()
    matrix = as_matrix(statistics)
    truth = torch.einsum("grk,gkl,grl->gr", error, matrix, error)
    magnitude = torch.einsum("grk,gkl,grl->gr", error.abs(), matrix.abs(), error.abs())
    # ŵ - w rounds once and enters twice, H e rounds at most K times, the product with e once. An objective of a
    # codebook that is not exactly the stored one would be off by the storage dtype's eps instead.
    last = list(solution.objectives.values())[-1]
    assert ((last - truth).abs() <= (K + 4) * EPS32 * magnitude).all()


def test_inputs_and_the_callers_random_numbers_are_left_alone(method):
    weight, statistics = problem(method.statistics)
    copies = weight.clone(), None if statistics is None else statistics.clone()
    random_state, default = torch.get_rng_state(), torch.get_default_dtype()
    method.solve(weight, statistics, SolverSpec(3))
    assert torch.equal(weight, copies[0])
    assert statistics is None or torch.equal(statistics, copies[1])
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.get_default_dtype() == default


def test_the_same_input_gives_the_same_bytes(method):
    weight, statistics = problem(method.statistics)
    first, second = (method.solve(weight, statistics, SolverSpec(3)) for _ in range(2))
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.codebook.view(torch.int16), second.codebook.view(torch.int16))


class Operators(TorchDispatchMode):
    """While entered, notes the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_nothing_is_done_that_sorts_to_be_deterministic(method):
    """On a GPU these sort all the places that they write to, which takes long."""
    weight, statistics = problem(method.statistics)
    with Operators() as called:
        method.solve(weight, statistics, SolverSpec(2))
    assert "aten::gather" in called.names
    assert not called.names & {"aten::scatter", "aten::scatter_", "aten::index_put", "aten::index_put_", "aten::put_"}


def test_a_strided_weight_gives_what_its_copy_gives(method):
    weight, statistics = problem(method.statistics)
    strided = weight.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not strided.is_contiguous()
    first = method.solve(weight, statistics, SolverSpec(3))
    second = method.solve(strided, statistics, SolverSpec(3))
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.codebook, second.codebook)


@pytest.mark.parametrize("method", [m for m in SOLVERS.values() if m.statistics != "none"], ids=lambda m: m.statistics)
def test_the_scale_of_the_statistics_does_not_change_the_solution(method):
    weight, statistics = problem(method.statistics)
    first = method.solve(weight, statistics, SolverSpec(3))
    # A power of two, so every intermediate result scales exactly.
    for scale in (2.0**20, 2.0**-20):
        scaled = method.solve(weight, statistics * scale, SolverSpec(3))
        assert torch.equal(first.codes, scaled.codes)
        assert torch.equal(first.codebook, scaled.codebook)


def test_weights_beyond_the_storage_dtype_saturate_and_never_become_infinite(method):
    weight, statistics = problem(method.statistics)
    solution = method.solve(weight * 1e5, statistics, SolverSpec(3, torch.float16))
    assert torch.isfinite(solution.codebook).all()
    assert solution.codebook.abs().max() == torch.finfo(torch.float16).max


@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1e6, 1e15])
def test_weights_of_any_size_are_reproduced_as_well_as_those_of_size_one(method, scale):
    weight, statistics = problem(method.statistics)
    power = 2.0 ** round(torch.tensor(scale).log2().item())
    first = method.solve(weight, statistics, SolverSpec(3, torch.float32))
    scaled = method.solve(weight * power, statistics, SolverSpec(3, torch.float32))
    # Powers of two scale exactly.
    assert torch.equal(first.codes, scaled.codes)
    assert torch.equal(first.codebook * power, scaled.codebook)
