"""The ops against a naive gather and product in float64, per element, and their contracts with torch."""

import pytest
import torch

from hf_guidedquant.triton_kernels import OPS_NAMESPACE, lut_dequantize, lut_linear, pack_codes, reference

OPS = getattr(torch.ops, OPS_NAMESPACE)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def layer(bits: int, rows: int, inputs: int, lut_dtype: torch.dtype = torch.float16, seed: int = 0):
    """Codes ``[N, K]``, packed weight and codebook."""
    generator = torch.Generator().manual_seed(1000 * bits + 10 * rows + inputs + seed)
    codes = torch.randint(2**bits, (rows, inputs), generator=generator, dtype=torch.uint8)
    lut = torch.randn(rows, 2**bits, generator=generator).sort(dim=-1).values.to(lut_dtype)
    return codes, pack_codes(codes, bits), lut


def activations(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dense64(codes: torch.Tensor, lut: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The matrix in ``dtype``, which is where the op's contract rounds the codebook, exactly in float64."""
    return lut.to(dtype).double().gather(1, codes.long())


def assert_close_to_truth(
    actual: torch.Tensor, x: torch.Tensor, dense: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    """Every element within what K products summed in at least fp32 and stored in x's dtype may lose.

    Summing K products rounds each at most K times: K eps Σ|x||w|, eps of fp32 (of fp64 for fp64). Storing the
    product and its sum with the bias in x's dtype rounds each once; below the normal range a rounding costs half the
    smallest subnormal. The truth itself is exact to K eps64 Σ|x||w|.
    """
    exact = x.double() @ dense.mT
    magnitude = x.double().abs() @ dense.abs().mT
    eps, tiny = torch.finfo(x.dtype).eps, torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps
    accumulator = min(eps, torch.finfo(torch.float32).eps)
    summing = (x.shape[-1] + 2) * (accumulator + torch.finfo(torch.float64).eps) * magnitude
    storing = eps / 2 * (exact.abs() + summing) + tiny
    if bias is not None:
        rounded = bias.to(x.dtype).double()
        exact = exact + rounded
        storing = storing + eps / 2 * (exact.abs() + summing + storing) + tiny
        summing = summing + accumulator * (magnitude + rounded.abs())
    assert actual.dtype == x.dtype
    assert actual.shape == (*x.shape[:-1], dense.shape[0])
    assert ((actual.double() - exact).abs() <= summing + storing).all()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("lut_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_is_a_gather_without_any_error(dtype, lut_dtype, bits):
    for rows, inputs in ((1, 1), (5, 33), (9, 130)):
        codes, weight, lut = layer(bits, rows, inputs, lut_dtype)
        dense = lut_dequantize(weight, lut, inputs, dtype)
        assert dense.dtype == dtype
        assert dense.is_contiguous()
        assert torch.equal(dense.double(), dense64(codes, lut, dtype))


def test_dequantize_in_several_chunks_is_the_same(monkeypatch):
    codes, weight, lut = layer(3, 9, 70)
    monkeypatch.setattr(reference, "_CHUNK", 2 * 96)  # two rows at a time, and one left over
    assert torch.equal(lut_dequantize(weight, lut, 70, torch.float32).double(), dense64(codes, lut, torch.float32))


@pytest.mark.parametrize("tokens", [1, 2, 7, 33])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_against_float64_per_element(dtype, bits, tokens):
    for rows, inputs in ((1, 1), (3, 31), (7, 129), (13, 257)):
        codes, weight, lut = layer(bits, rows, inputs)
        x = activations(tokens, inputs, dtype=dtype, seed=tokens)
        bias = activations(rows, dtype=torch.float32, seed=5)
        dense = dense64(codes, lut, dtype)
        assert_close_to_truth(lut_linear(x, weight, lut), x, dense)
        assert_close_to_truth(lut_linear(x, weight, lut, bias), x, dense, bias)
        assert_close_to_truth(lut_linear(x.clone().requires_grad_(), weight, lut, bias).detach(), x, dense, bias)


def activations_of_all_shapes(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """``[..., 45]`` with various batch dimensions and strides."""
    base = activations(45, 6, 4, dtype=dtype)
    return {
        "vector": activations(45, dtype=dtype),
        "strided-vector": activations(90, dtype=dtype)[::2],
        "four-dims": activations(2, 3, 1, 45, dtype=dtype),
        "no-tokens": activations(0, 45, dtype=dtype),
        "transposed": base[:, :, 0].mT,
        "permuted": base.permute(1, 2, 0),
        "every-other": activations(4, 90, dtype=dtype)[:, ::2],
        "expanded": activations(45, dtype=dtype).expand(3, 2, 45),
        "offset": activations(4, 46, dtype=dtype)[:, 1:],
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_dimensions_and_strides_of_x(dtype):
    codes, weight, lut = layer(3, 7, 45)
    dense = dense64(codes, lut, dtype)
    for x in activations_of_all_shapes(dtype).values():
        assert_close_to_truth(lut_linear(x, weight, lut), x, dense)


def test_strided_weight_codebook_and_bias():
    codes, weight, lut = layer(2, 7, 45)
    x, bias = activations(3, 45, dtype=torch.float32), activations(14, dtype=torch.float32)
    strided_weight = weight.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    strided_lut = lut.mT.contiguous().mT
    assert not strided_weight.is_contiguous()
    assert not strided_lut.is_contiguous()
    dense = dense64(codes, lut, torch.float32)
    assert_close_to_truth(lut_linear(x, strided_weight, strided_lut, bias[::2]), x, dense, bias[::2])
    # A row slice, as a tensor-parallel shard makes it.
    assert_close_to_truth(lut_linear(x, weight[:, 2:5], lut[2:5], bias[2:5]), x, dense[2:5], bias[2:5])


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_activations_whose_partial_sums_leave_fp16_but_whose_result_does_not(dtype, tokens):
    inputs = 40
    codes = torch.arange(inputs).remainder(4).div(2, rounding_mode="floor").to(torch.uint8).expand(5, inputs)
    lut = torch.tensor([[-1.0, 1.0]]).half().expand(5, 2)
    x = torch.full((tokens, inputs), 6e4).to(dtype)  # pairs sum to 1.2e5 before they cancel
    x[:, -1] = 3.0
    result = lut_linear(x, pack_codes(codes, 1), lut)
    assert torch.isfinite(result).all()
    assert_close_to_truth(result, x, dense64(codes, lut, dtype))


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_denormal_activations_and_codewords_are_not_flushed(dtype, tokens):
    codes, weight, _ = layer(2, 5, 40)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    exact_lut = torch.tensor([[-2.0, -1.0, 1.0, 2.0]]).expand(5, 4)
    x = torch.full((tokens, 40), smallest, dtype=torch.float64).to(dtype)
    # Whole multiples of the smallest subnormal, small enough for every mantissa: nothing rounds.
    assert torch.equal(lut_linear(x, weight, exact_lut).double(), x.double() @ dense64(codes, exact_lut, dtype).mT)
    tiny_lut = (exact_lut.double() * smallest).to(torch.float64)
    ones = torch.ones(tokens, 40, dtype=dtype)
    dense = dense64(codes, tiny_lut, dtype)
    assert (dense != 0).all()
    assert torch.equal(lut_linear(ones, weight, tiny_lut).double(), ones.double() @ dense.mT)


@pytest.mark.parametrize("bias", [None, torch.zeros(5)])
def test_results_do_not_alias_each_other_or_the_inputs(bias):
    _, weight, lut = layer(2, 5, 33)
    lut = lut.float()
    x = activations(3, 33, dtype=torch.float32)
    inputs = [x.clone(), weight.clone(), lut.clone()]
    for call in (lambda: lut_linear(x, weight, lut, bias), lambda: lut_dequantize(weight, lut, 33, torch.float32)):
        first = call()
        kept = first.clone()
        second = call()
        assert torch.equal(first, second)
        second.fill_(float("nan"))
        assert torch.equal(first, kept)
        assert torch.equal(call(), kept)
    assert all(torch.equal(a, b) for a, b in zip(inputs, (x, weight, lut), strict=True))


def op_arguments() -> dict[str, tuple]:
    _, weight, lut = layer(3, 7, 45)
    x, bias = activations(3, 45, dtype=torch.float32), activations(7, dtype=torch.float32)
    permuted = activations(45, 6, 4, dtype=torch.float32).permute(1, 2, 0)
    return {
        "plain": (x, weight, lut, None),
        "bias": (x, weight, lut, bias),
        "vector": (x[0], weight, lut, bias),
        "no-tokens": (x[:0], weight, lut, None),
        "permuted": (permuted, weight, lut, None),
        "permuted-bias": (permuted, weight, lut, bias),
        "bfloat16": (x.bfloat16(), weight, lut, bias.bfloat16()),
        "float64": (x.double(), weight, lut, bias),
    }


@pytest.mark.parametrize("case", list(op_arguments()))
def test_opcheck_linear(case):
    torch.library.opcheck(OPS.lut_linear.default, op_arguments()[case])


# with the op. Whoever calls torch.ops directly gets torch's deprecated fallback and a warning of incorrect results.
def test_opcheck_linear_with_gradient():
    x, *rest = op_arguments()["plain"]
    torch.library.opcheck(OPS.lut_linear.default, (x.requires_grad_(), *rest))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_dequantize(dtype):
    _, weight, lut = layer(3, 7, 45)
    torch.library.opcheck(OPS.lut_dequantize.default, (weight, lut, 45, dtype))


def test_meta_tensors_give_shape_and_dtype_only():
    _, weight, lut = layer(3, 7, 45)
    x = torch.empty(2, 3, 45, dtype=torch.bfloat16, device="meta")
    result = lut_linear(x, weight.to("meta"), lut.to("meta"))
    assert (result.device.type, result.shape, result.dtype) == ("meta", (2, 3, 7), torch.bfloat16)
    dense = lut_dequantize(weight.to("meta"), lut.to("meta"), 45, torch.float16)
    assert (dense.device.type, dense.shape, dense.dtype) == ("meta", (7, 45), torch.float16)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_without_graph_breaks_it_equals_eager(backend, gradient):
    torch._dynamo.reset()
    _, weight, lut = layer(3, 7, 45)
    bias = activations(7, dtype=torch.float32, seed=1)

    def run(x):
        y = lut_linear(torch.tanh(x), weight, lut, bias)
        return y @ lut_dequantize(weight, lut, 45, x.dtype)

    compiled = torch.compile(run, fullgraph=True, backend=backend, dynamic=True)
    for tokens in (3, 5):
        x, same = (activations(tokens, 45, dtype=torch.float32).requires_grad_(gradient) for _ in range(2))
        expected, actual = run(x), compiled(same)
        assert torch.equal(actual, expected)
        if gradient:
            expected.square().sum().backward()
            actual.square().sum().backward()
            assert torch.equal(same.grad, x.grad)


# autocast dtype, while the op's fake implementation, so a compiled model, and the sum with a bias promise x's.
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("gradient", [False, True])
def test_autocast_does_not_change_the_promised_dtype(gradient, with_bias):
    _, weight, lut = layer(3, 7, 45)
    x = activations(3, 45, dtype=torch.float32).requires_grad_(gradient)
    bias = torch.ones(7) if with_bias else None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert lut_linear(x, weight, lut, bias).dtype == x.dtype


@pytest.mark.parametrize("shape", [(45,), (4, 45), (2, 3, 45)])
def test_gradient_of_x_is_that_of_the_dense_layer(shape):
    codes, weight, lut = layer(3, 7, 45, torch.float64)
    x = activations(*shape, dtype=torch.float64).requires_grad_()
    bias = activations(7, dtype=torch.float64, seed=1)
    assert torch.autograd.gradcheck(lambda x: lut_linear(x, weight, lut, bias), x)
    upstream = activations(*shape[:-1], 7, dtype=torch.float64, seed=2)
    (gradient,) = torch.autograd.grad(lut_linear(x, weight, lut, bias), x, upstream)
    dense = dense64(codes, lut, torch.float64)
    # N products, each rounded at most N times, here and there.
    bound = 2 * 7 * torch.finfo(torch.float64).eps * (upstream.abs() @ dense.abs())
    assert ((gradient - upstream @ dense).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradient_of_x_in_training_dtypes(dtype):
    codes, weight, lut = layer(4, 33, 45)
    x = activations(5, 45, dtype=dtype).requires_grad_()
    upstream = activations(5, 33, dtype=dtype, seed=2)
    (gradient,) = torch.autograd.grad(lut_linear(x, weight, lut), x, upstream)
    assert_close_to_truth(gradient, upstream, dense64(codes, lut, dtype).mT)


def test_bias_is_trained_whether_or_not_x_needs_a_gradient():
    _, weight, lut = layer(3, 7, 45)
    for needs in (False, True):
        bias = torch.zeros(7, requires_grad=True)
        x = activations(4, 45, dtype=torch.float32).requires_grad_(needs)
        lut_linear(x, weight, lut, bias).sum().backward()
        assert torch.equal(bias.grad, torch.full((7,), 4.0))


def broken_calls() -> dict[str, tuple]:
    """What is wrong -> (changed arguments, a piece of the message that helps)."""
    _, weight, lut = layer(2, 5, 40)
    return {
        "weight-int64": ({"weight": weight.long()}, "int32"),
        "weight-float": ({"weight": weight.float()}, "int32"),
        "weight-2d": ({"weight": weight[0]}, r"\[bits, out, words\]"),
        "weight-no-planes": ({"weight": weight[:0], "lut": lut[:, :1]}, "0 bit-planes; 1 to 8"),
        "weight-9-planes": ({"weight": weight[:1].expand(9, 5, 2), "lut": torch.zeros(5, 512)}, "9 bit-planes; 1 to 8"),
        "weight-too-wide": (
            {"weight": torch.zeros(2, 5, 3, dtype=torch.int32)},
            "40 inputs take 2 words a row.* has 3",
        ),
        "weight-too-narrow": ({"weight": weight[..., :1]}, "40 inputs take 2 words a row.* has 1"),
        "lut-integer": ({"lut": lut.int()}, "lut must be floating point.*int32"),
        "lut-1d": ({"lut": lut[0]}, r"lut must be \[5, 4\].*\(4,\)"),
        "lut-rows": ({"lut": lut[:4]}, r"lut must be \[5, 4\].*\(4, 4\)"),
        "lut-entries": ({"lut": lut[:, :3]}, r"lut must be \[5, 4\].*\(5, 3\)"),
    }


BROKEN_LINEAR = {
    "x-integer": ({"x": torch.ones(3, 40, dtype=torch.int64)}, "x must be floating point.*int64"),
    "x-scalar": ({"x": torch.ones(())}, "in_features"),
    "x-width": ({"x": torch.ones(3, 65)}, "65 inputs take 3 words a row.* has 2"),
    "bias-length": ({"bias": torch.ones(4)}, r"bias must be \[5\].*\(4,\)"),
    "bias-2d": ({"bias": torch.ones(1, 5)}, r"bias must be \[5\].*\(1, 5\)"),
}


# without a check (a wrong shape broadcasts in silence), and a scalar x raises IndexError.
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("what", [*broken_calls(), *BROKEN_LINEAR])
def test_linear_refuses_what_does_not_fit_and_says_what_would(what, gradient):
    change, message = (broken_calls() | BROKEN_LINEAR)[what]
    _, weight, lut = layer(2, 5, 40)
    arguments = {"x": torch.ones(3, 40), "weight": weight, "lut": lut, "bias": None} | change
    if gradient and arguments["x"].is_floating_point():
        arguments["x"] = arguments["x"].clone().requires_grad_()
    with pytest.raises(RuntimeError, match=message):
        lut_linear(**arguments)


BROKEN_DEQUANTIZE = {
    "too-many-inputs": ({"in_features": 65}, "65 inputs take 3 words a row.* has 2"),
    "too-few-inputs": ({"in_features": 32}, "32 inputs take 1 words a row.* has 2"),
    "negative-inputs": ({"in_features": -40}, "inputs"),
    "integer-dtype": ({"dtype": torch.int32}, "floating point"),
}


@pytest.mark.parametrize("what", [*broken_calls(), *BROKEN_DEQUANTIZE])
def test_dequantize_refuses_what_does_not_fit_and_says_what_would(what):
    change, message = (broken_calls() | BROKEN_DEQUANTIZE)[what]
    _, weight, lut = layer(2, 5, 40)
    arguments = {"weight": weight, "lut": lut, "in_features": 40, "dtype": torch.float32} | change
    with pytest.raises(RuntimeError, match=message):
        lut_dequantize(**arguments)


# RuntimeError that the docstring promises.
def test_no_inputs_at_all_is_an_empty_sum():
    result = lut_linear(torch.ones(3, 0), torch.zeros(2, 5, 0, dtype=torch.int32), torch.ones(5, 4))
    assert torch.equal(result, torch.zeros(3, 5))
