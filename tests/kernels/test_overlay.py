"""Products and dense matrices with an overlay against float64, per element: the ops, and the sparse kernel alone."""

import importlib.util

import pytest
import torch
from interpreter import interpreter_only, not_interpreted, run_interpreted_tests
from test_ops import DTYPES, OPS, activations, dense64, layer

from hf_guidedquant.triton_kernels import lut_dequantize, lut_dequantize_tiled, lut_linear, lut_linear_tiled, pack_tiles
from hf_guidedquant.triton_kernels.reference import add_overlay

EPS32, EPS64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps
KERNEL_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Around the tokens of a program, around those that are copied, and outliers of one program and of several steps.
TOKENS_AND_COUNTS = [(1, 1), (1, 3), (1, 40), (2, 19), (4, 5), (5, 5), (8, 33), (33, 7), (64, 32), (65, 9), (130, 2)]


@not_interpreted
@pytest.mark.timeout(900)
def test_everything_interpreted_below_in_a_process_with_the_interpreter():
    run_interpreted_tests(__file__)


def overlay(rows: int, inputs: int, count: int, dtype: torch.dtype = torch.float16, seed: int = 0):
    """Values and ascending columns ``[N, n]``."""
    generator = torch.Generator().manual_seed(100 * rows + inputs + count + seed)
    columns = torch.rand(rows, inputs, generator=generator).argsort(dim=-1)[:, :count].sort(dim=-1).values
    values = 3 * torch.randn(rows, count, generator=generator)
    return values.to(dtype), columns.to(torch.int16 if seed % 2 == 0 else torch.int32)


def sparse64(values: torch.Tensor, columns: torch.Tensor, inputs: int) -> torch.Tensor:
    """The overlay as a matrix, exactly."""
    empty = torch.zeros(len(values), inputs, dtype=torch.float64, device=values.device)
    return empty.scatter_(1, columns.long(), values.double())


def smallest(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def assert_close_to_truth(actual, x, dense, sparse, bias=None) -> None:
    """Every element within what either way to compute it may lose.

    Summing: K + n products are rounded each at most so often, to fp32 (fp64 for fp64). Storing: an outlier's weight,
    the product without overlay, that with the bias and the whole are rounded to x's dtype; below the normal range a
    rounding costs half the smallest subnormal. The truth is exact to so many eps64.
    """
    x, dtype = x.double(), x.dtype
    eps, tiny = torch.finfo(dtype).eps, smallest(dtype)
    exact, without = x @ (dense + sparse).mT, x @ dense.mT
    terms = x.shape[-1] + int((sparse != 0).sum(dim=1).max()) + 4
    added = torch.zeros(()) if bias is None else bias.to(dtype).double()
    magnitude = x.abs() @ (dense.abs() + sparse.abs()).mT + added.abs()
    summing = terms * (min(eps, EPS32) + EPS64) * magnitude
    touched = (sparse != 0).double()
    weights = x.abs() @ (touched * (eps / 2 * (dense + sparse).abs() + tiny)).mT
    storing = torch.zeros_like(exact)
    for stored in (without, without + added, exact + added):
        storing = storing + eps / 2 * (stored.abs() + summing + weights + storing) + tiny
    assert actual.dtype == dtype
    assert ((actual.double() - exact - added).abs() <= summing + weights + storing).all()


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("tokens", [1, 7, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_against_float64_per_element(dtype, tokens, count):
    for bits, rows, inputs in ((2, 7, 129), (3, 13, 257), (8, 5, 33)):
        codes, weight, lut = layer(bits, rows, inputs)
        values, columns = overlay(rows, inputs, count, seed=bits)
        x, bias = activations(tokens, inputs, dtype=dtype, seed=tokens), activations(rows, dtype=torch.float32, seed=5)
        dense, sparse = dense64(codes, lut, dtype), sparse64(values, columns, inputs)
        assert_close_to_truth(lut_linear(x, weight, lut, None, values, columns), x, dense, sparse)
        assert_close_to_truth(lut_linear(x, weight, lut, bias, values, columns), x, dense, sparse, bias)


@pytest.mark.parametrize("value_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dense_matrix_is_the_sum_rounded_once(dtype, value_dtype):
    codes, weight, lut = layer(3, 9, 130)
    values, columns = overlay(9, 130, 4, value_dtype)
    exact = dense64(codes, lut, dtype) + sparse64(values, columns, 130)
    found = lut_dequantize(weight, lut, 130, dtype, values, columns)
    touched = sparse64(torch.ones_like(values), columns, 130).bool()
    assert torch.equal(found[~touched].double(), exact[~touched])
    # Summed in fp32 and stored in the dtype, so two roundings at most.
    allowed = (torch.finfo(dtype).eps / 2 + min(torch.finfo(dtype).eps, EPS32)) * exact.abs() + smallest(dtype)
    assert ((found.double() - exact).abs() <= allowed).all()
    assert (found[touched].double() != dense64(codes, lut, dtype)[touched]).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_tiles_give_what_bit_planes_give(bits):
    _, weight, lut = layer(bits, 37, 200)
    values, columns = overlay(37, 200, 3)
    x, bias = activations(5, 200, dtype=torch.float32), activations(37, dtype=torch.float32)
    tiles = pack_tiles(weight, 200)
    for dtype in (torch.float16, torch.float32):
        planes = lut_dequantize(weight, lut, 200, dtype, values, columns)
        assert torch.equal(lut_dequantize_tiled(tiles, lut, 200, dtype, values, columns), planes)
    expected = lut_linear(x, weight, lut, bias, values, columns)
    assert torch.equal(lut_linear_tiled(x, tiles, lut, bias, values, columns), expected)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, gradient):
    _, weight, lut = layer(3, 7, 45)
    x = activations(3, 45, dtype=dtype).requires_grad_(gradient)
    torch.library.opcheck(OPS.lut_linear.default, (x, weight, lut, None, *overlay(7, 45, 2)))
    torch.library.opcheck(OPS.lut_linear_tiled.default, (x, pack_tiles(weight, 45), lut, None, *overlay(7, 45, 2)))
    torch.library.opcheck(OPS.lut_dequantize.default, (weight, lut, 45, dtype, *overlay(7, 45, 2)))


def test_meta_tensors_give_shape_and_dtype_only():
    _, weight, lut = layer(3, 7, 45)
    x = torch.empty(2, 3, 45, dtype=torch.bfloat16, device="meta")
    values, columns = (tensor.to("meta") for tensor in overlay(7, 45, 2))
    result = lut_linear(x, weight.to("meta"), lut.to("meta"), None, values, columns)
    assert (result.device.type, result.shape, result.dtype) == ("meta", (2, 3, 7), torch.bfloat16)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("gradient", [False, True])
def test_compiled_without_graph_breaks_it_equals_eager(backend, gradient):
    torch._dynamo.reset()
    _, weight, lut = layer(3, 7, 45)
    sparse = overlay(7, 45, 2)

    def run(x):
        return lut_linear(torch.tanh(x), weight, lut, None, *sparse)

    compiled = torch.compile(run, fullgraph=True, backend=backend, dynamic=True)
    for tokens in (3, 5):
        x, same = (activations(tokens, 45, dtype=torch.float32).requires_grad_(gradient) for _ in range(2))
        expected, actual = run(x), compiled(same)
        assert torch.equal(actual, expected)
        if gradient:
            expected.square().sum().backward()
            actual.square().sum().backward()
            assert torch.equal(same.grad, x.grad)


def test_gradient_of_x_is_that_of_the_dense_layer():
    codes, weight, lut = layer(3, 7, 45, torch.float64)
    values, columns = overlay(7, 45, 3, torch.float64)
    x = activations(4, 45, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: lut_linear(x, weight, lut, None, values, columns), x)
    upstream = activations(4, 7, dtype=torch.float64, seed=2)
    (gradient,) = torch.autograd.grad(lut_linear(x, weight, lut, None, values, columns), x, upstream)
    dense = dense64(codes, lut, torch.float64) + sparse64(values, columns, 45)
    # N products, each rounded at most N times, here and there; every weight is rounded once.
    assert ((gradient - upstream @ dense).abs() <= (2 * 7 + 1) * EPS64 * (upstream.abs() @ dense.abs())).all()


def broken() -> dict[str, tuple]:
    values, columns = overlay(5, 40, 2)
    return {
        "no-columns": ((values, None), "belong together"),
        "no-values": ((None, columns), "belong together"),
        "integer-values": ((values.int(), columns), "overlay_values must be floating point.*int32"),
        "int64-columns": ((values, columns.long()), "overlay_columns must be int16 or int32.*int64"),
        "rows": ((values[:4], columns[:4]), r"must be \[5, n\].*\(4, 2\)"),
        "different": ((values, columns[:, :1]), r"must be \[5, n\].*\(5, 2\) and \(5, 1\)"),
        "vector": ((values[0], columns[0]), r"must be \[5, n\]"),
    }


@pytest.mark.parametrize("what", list(broken()))
def test_what_does_not_fit_is_refused(what):
    sparse, message = broken()[what]
    _, weight, lut = layer(2, 5, 40)
    for call in (
        lambda: lut_linear(torch.ones(3, 40), weight, lut, None, *sparse),
        lambda: lut_linear_tiled(torch.ones(3, 40), pack_tiles(weight, 40), lut, None, *sparse),
        lambda: lut_dequantize(weight, lut, 40, torch.float32, *sparse),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


# The kernel by itself.


def surrounded(tensor: torch.Tensor, by: float) -> torch.Tensor:
    """The tensor between guards in one storage."""
    whole = torch.full((tensor.numel() + 128,), by, dtype=tensor.dtype, device=tensor.device)
    return whole[64:-64].view(tensor.shape).copy_(tensor)


def check_kernel(dtype, tokens: int, count: int, device: str) -> None:
    """``y + x @ overlay.T`` per element; nothing beyond x is read, nothing beyond y is written, twice the same bits."""
    from hf_guidedquant.triton_kernels.sparse import add_product

    rows, inputs = 37, 131 if tokens % 2 else 144
    values, columns = (tensor.to(device) for tensor in overlay(rows, inputs, count, seed=tokens))
    x = activations(tokens, inputs, dtype=dtype, seed=tokens).to(device)
    before = activations(tokens, rows, dtype=dtype, seed=1).to(device)
    results = []
    for _ in range(2):
        y = surrounded(before, float("nan"))
        add_product(y, surrounded(x, float("inf")), surrounded(values, float("nan")), surrounded(columns, 10000))
        assert y._base[:64].isnan().all()
        assert y._base[-64:].isnan().all()
        results.append(y)
    assert torch.equal(*results)
    sparse = sparse64(values, columns, inputs)
    exact = before.double() + x.double() @ sparse.mT
    # n + 1 numbers are summed in fp32, and the sum is rounded.
    summing = (count + 2) * EPS32 * (before.double().abs() + x.double().abs() @ sparse.abs().mT)
    bound = summing + torch.finfo(dtype).eps / 2 * (exact.abs() + summing) + smallest(dtype)
    assert ((results[0].double() - exact).abs() <= bound).all()


@interpreter_only
@pytest.mark.parametrize(("tokens", "count"), TOKENS_AND_COUNTS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_interpreted_kernel_against_float64_per_element(dtype, tokens, count):
    check_kernel(dtype, tokens, count, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "count"), TOKENS_AND_COUNTS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_kernel_on_a_gpu_against_float64_per_element(dtype, tokens, count):
    check_kernel(dtype, tokens, count, "cuda")


def check_dense(dtype, count: int, device: str) -> None:
    """The same bits as torch's, in a part of a matrix whose rows lie apart; nothing else is written."""
    from hf_guidedquant.triton_kernels.sparse import add_to_dense

    rows, inputs = 37, 144
    values, columns = (tensor.to(device) for tensor in overlay(rows, inputs, count, seed=count))
    wide = surrounded(activations(rows, inputs + 16, dtype=dtype, seed=1).to(device), float("nan"))
    expected = wide.clone()
    for part in (slice(0, 20), slice(20, rows)):
        add_to_dense(wide[part, :inputs], values[part], columns[part])
    assert torch.equal(wide, torch.cat([add_overlay(expected[:, :inputs], (values, columns)), expected[:, inputs:]], 1))
    assert not torch.equal(wide, activations(rows, inputs + 16, dtype=dtype, seed=1).to(device))
    assert wide._base[:64].isnan().all()
    assert wide._base[-64:].isnan().all()


@interpreter_only
@pytest.mark.parametrize("count", [1, 19, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_interpreted_kernel_adds_to_a_dense_matrix(dtype, count):
    check_dense(dtype, count, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 19, 33])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_kernel_on_a_gpu_adds_to_a_dense_matrix(dtype, count):
    check_dense(dtype, count, "cuda")


@interpreter_only
@pytest.mark.parametrize("shape", [(45,), (0, 45), (2, 3, 45), (4, 1, 45)])
def test_interpreted_kernel_takes_activations_of_all_shapes(shape):
    from hf_guidedquant.triton_kernels.sparse import add_product

    values, columns = overlay(6, 45, 3)
    x = activations(*shape[:-1], 90, dtype=torch.float32)[..., ::2]
    y = torch.zeros(*shape[:-1], 6)
    add_product(y, x, values, columns)
    # Three products, summed and rounded.
    expected, magnitude = (f(x.double()) @ f(sparse64(values, columns, 45)).mT for f in (torch.clone, torch.abs))
    assert ((y.double() - expected).abs() <= 4 * EPS32 * magnitude).all()


@interpreter_only
def test_interpreted_kernel_is_not_reached_by_activations_of_other_inputs():
    from hf_guidedquant.triton_kernels.sparse import add_product

    values, columns = overlay(6, 45, 3)
    y = torch.zeros(5, 6)
    x = torch.full((5, 45), float("nan"))
    x[:, columns.long().unique()] = 0
    add_product(y, x, values, columns)
    assert torch.equal(y, torch.zeros(5, 6))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.gpu
@pytest.mark.usefixtures("dense_products_in_fp32")
@pytest.mark.parametrize(
    # How an overlay is multiplied also depends on how large the layer is.
    ("tokens", "rows", "inputs"),
    [*((tokens, 300, 1000) for tokens in (1, 2, 7, 16, 64, 200, 600)), (200, 8300, 4096)],
)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_on_a_gpu_against_float64_per_element(dtype, bits, tokens, rows, inputs):
    codes, weight, lut = (tensor.cuda() for tensor in layer(bits, rows, inputs))
    values, columns = (tensor.cuda() for tensor in overlay(rows, inputs, 5))
    x, tiles = activations(tokens, inputs, dtype=dtype).cuda(), pack_tiles(weight, inputs)
    dense, sparse = dense64(codes, lut, dtype), sparse64(values, columns, inputs)
    for op, packed in ((lut_linear_tiled, tiles), (lut_linear, weight)):
        first, second = (op(x, packed, lut, None, values, columns) for _ in range(2))
        assert torch.equal(first, second)
        assert_close_to_truth(first, x, dense, sparse)
