"""A layer whose codebook is trained: its product, its gradients against float64, and the way back."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_guidedquant.nn import GuidedLinear, TrainedLinear, codebook_gradient, trained_linear
from hf_guidedquant.triton_kernels import pack_codes, unpack_codes

SHAPES = [(1, 5, 3), (7, 33, 40), (65, 48, 96)]  # tokens, outputs, inputs
EPS = torch.finfo(torch.float32).eps


def random_layer(bits, out_features, in_features, seed=0, bias=True, lut_dtype=torch.float16):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (out_features, in_features), generator=generator, dtype=torch.uint8)
    lut = torch.randn(out_features, 2**bits, generator=generator).sort(dim=-1).values.to(lut_dtype)
    offset = torch.randn(out_features, generator=generator) if bias else None
    return codes, GuidedLinear.from_tensors({"weight": pack_codes(codes, bits), "lut": lut}, in_features, offset)


def float64_gradient(codes, grad, x, levels):
    """The codebook's gradient by autograd, and the same sums of absolute values, which bound their rounding."""
    found = []
    for function in (lambda t: t, torch.abs):
        codebook = torch.zeros(codes.shape[0], levels, dtype=torch.float64, requires_grad=True)
        weight = codebook.gather(1, codes.long())
        (function(x.double()) @ weight.T).backward(function(grad.double()))
        found.append(codebook.grad)
    return found


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("tokens", "outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows_at_a_time", [5, None])
def test_the_codebooks_gradient_is_that_of_float64_autograd(
    bits, tokens, outputs, inputs, dtype, rows_at_a_time, monkeypatch
):
    if rows_at_a_time:
        monkeypatch.setattr(trained_linear, "WEIGHTS_AT_A_TIME", rows_at_a_time * inputs)
    codes, layer = random_layer(bits, outputs, inputs)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, inputs, generator=generator).to(dtype)
    grad = torch.randn(tokens, outputs, generator=generator).to(dtype)
    expected, magnitudes = float64_gradient(codes, grad, x, 2**bits)
    found = codebook_gradient(grad, x, layer.bit_planes())
    assert found.dtype == torch.float32
    # A sum of at most T products each, and of at most K such sums.
    assert ((found - expected).abs() <= (tokens + inputs) * EPS * magnitudes).all()


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_products_and_gradients_of_a_layer(bits, bias):
    codes, layer = random_layer(bits, 33, 40, bias=bias)
    trained = TrainedLinear(layer)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 7, 40, generator=generator, requires_grad=True)
    grad = torch.randn(2, 7, 33, generator=generator)
    y = trained(x)
    y.backward(grad)
    weight = layer.lut.double().gather(1, codes.long())
    exact = x.detach().double()
    bound = 41 * EPS * (exact.abs() @ weight.abs().T + (layer.bias.abs() if bias else 0))
    assert ((y - (exact @ weight.T + (layer.bias if bias else 0))).abs() <= bound).all()
    bound = 33 * EPS * (grad.double().abs() @ weight.abs())
    assert ((x.grad - grad.double() @ weight).abs() <= bound).all()
    expected, magnitudes = float64_gradient(codes, grad.flatten(0, 1), exact.flatten(0, 1), 2**bits)
    assert ((trained.codebook.grad - expected).abs() <= (14 + 40) * EPS * magnitudes).all()
    assert [name for name, parameter in trained.named_parameters() if parameter.requires_grad] == ["codebook"]


class LargestTensor(TorchDispatchMode):
    """Size of the largest tensor that an operation returned."""

    nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.nbytes = max(self.nbytes, result.nbytes)
        return result


def test_memory_does_not_grow_with_the_layer(monkeypatch):
    monkeypatch.setattr(trained_linear, "WEIGHTS_AT_A_TIME", 1 << 13)
    for outputs in (64, 1024):
        _, layer = random_layer(2, outputs, 128)
        with LargestTensor() as largest:
            codebook_gradient(torch.ones(4, outputs), torch.ones(4, 128), layer.bit_planes())
        # An fp32 weight gradient of a chunk; all else is smaller here. That of the layer would be 16 times as large.
        assert largest.nbytes == 4 << 13


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("lut_dtype", [torch.float16, torch.float32])
def test_codes_keep_their_meaning_when_codebooks_are_sorted(bits, lut_dtype):
    codes, layer = random_layer(bits, 33, 40, lut_dtype=lut_dtype)
    trained = TrainedLinear(layer)
    values = torch.randn(33, 2**bits, generator=torch.Generator().manual_seed(1))
    values[0], values[1] = values[0].sort().values, 0.5  # a row in order, and one of equal values
    trained.codebook.data.copy_(values)
    back = trained.quantized()
    assert torch.equal(back.dequantize(), values.to(lut_dtype).gather(1, codes.long()))
    assert back.lut.dtype == lut_dtype
    assert (back.lut.diff(dim=-1) >= 0).all()
    assert torch.equal(unpack_codes(back.weight, 40)[:2], codes[:2])
    assert torch.equal(back.bias, layer.bias)
    assert not torch.equal(back.weight, layer.weight)


def test_products_are_those_of_the_stored_codebook():
    _, layer = random_layer(2, 33, 40)
    trained = TrainedLinear(layer)
    trained.codebook.data += 1e-3 * torch.rand_like(trained.codebook)
    trained.codebook.data[0, 0] = -1e6  # beyond fp16
    assert torch.equal(trained.stored_codebook().float().clamp(-65504, 65504), trained.stored_codebook().float())
    x = torch.eye(40)
    assert torch.equal(trained(x).T, trained.quantized().dequantize(torch.float32) + layer.bias[:, None])


def test_training_does_not_touch_the_layer_it_replaces():
    for lut_dtype in (torch.float16, torch.float32):
        _, layer = random_layer(2, 33, 40, lut_dtype=lut_dtype)
        before = layer.lut.clone()
        TrainedLinear(layer).codebook.data.zero_()
        assert torch.equal(layer.lut, before)
