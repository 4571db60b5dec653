"""A layer whose codes are trained too: it starts as it was solved, and its gradients go straight through."""

import pytest
import torch
from test_trained_linear import EPS, float64_gradient, random_layer

from hf_guidedquant.nn import LatentLinear
from hf_guidedquant.training.steps import Steps
from hf_guidedquant.triton_kernels import unpack_codes


def weight_of(layer, distance=1.0, seed=3):
    """Weights around the layer's own, many of them nearer to other codewords."""
    dense = layer.dequantize(torch.float32)
    return dense + distance * torch.randn(dense.shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("distance", [0.0, 0.1, 10.0])
def test_it_starts_as_the_solved_layer(bits, distance):
    codes, layer = random_layer(bits, 33, 40)
    latent = LatentLinear(layer, weight_of(layer, distance))
    assert torch.equal(latent(torch.eye(40)).T, layer.dequantize(torch.float32) + layer.bias[:, None])
    back = latent.quantized()
    # Of equal codewords any will do.
    assert bits > 2 or torch.equal(unpack_codes(back.bit_planes(), 40), codes)
    assert torch.equal(back.dequantize(), layer.dequantize())
    assert torch.equal(back.lut, layer.lut)
    assert torch.equal(back.bias, layer.bias)


def test_it_starts_as_the_solved_layer_whatever_codewords_are_equal():
    _, layer = random_layer(3, 33, 40)
    layer.lut.data[:, 1:5] = layer.lut.data[:, 1:2]
    layer.lut.data[7] = 0.0
    latent = LatentLinear(layer, weight_of(layer))
    assert torch.equal(latent.quantized().dequantize(), layer.dequantize())


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_latent_weights_are_the_originals_inside_of_half_their_reach(bits):
    """Half the way from the codeword to where another is nearer; beyond, at that end."""
    codes, layer = random_layer(bits, 5, 12)
    weight = weight_of(layer, 2.0)
    latent = LatentLinear(layer, weight).latent.detach()
    for row in range(5):
        words = [float(word) for word in layer.lut[row]]
        for column in range(12):
            code = int(codes[row, column])
            low = -torch.inf if code == 0 else words[code] + 0.5 * ((words[code - 1] + words[code]) / 2 - words[code])
            last = code == len(words) - 1
            high = torch.inf if last else words[code] + 0.5 * ((words[code + 1] + words[code]) / 2 - words[code])
            assert float(latent[row, column]) == pytest.approx(
                min(max(float(weight[row, column]), low), high), rel=4 * EPS, abs=1e-30
            )


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_gradients_are_those_of_the_weight_and_of_the_codebook(bits):
    codes, layer = random_layer(bits, 33, 40, bias=False)
    latent = LatentLinear(layer, weight_of(layer))
    generator = torch.Generator().manual_seed(1)
    x, grad = torch.randn(7, 40, generator=generator), torch.randn(7, 33, generator=generator)
    latent(x).backward(grad)
    straight = grad.double().T @ x.double()
    bound = 8 * EPS * (grad.double().abs().T @ x.double().abs())
    assert ((latent.shift.grad - straight).abs() <= bound).all()
    expected, magnitudes = float64_gradient(codes, grad, x, 2**bits)
    assert ((latent.codebook.grad - expected).abs() <= 47 * EPS * magnitudes).all()


def test_codes_follow_the_latent_weights_and_the_codebook():
    _, layer = random_layer(2, 33, 40)
    latent = LatentLinear(layer, weight_of(layer))
    generator = torch.Generator().manual_seed(2)
    latent.shift.data += torch.randn(33, 40, generator=generator)
    latent.codebook.data += torch.randn(33, 4, generator=generator)
    latent.settle()
    assert (latent.codebook.diff(dim=-1) >= 0).all()
    back = latent.quantized()
    stored = back.lut.double()
    nearest = (latent.latent.double()[..., None] - stored[:, None]).abs().amin(dim=-1)
    found = (latent.latent.double() - back.dequantize(torch.float64)).abs()
    # A latent weight in the middle between two codewords may have either.
    assert torch.allclose(found, nearest, rtol=0, atol=1e-6)
    assert torch.equal(latent(torch.eye(40)).T, back.dequantize(torch.float32) + layer.bias[:, None])


def test_latent_weights_go_back_to_where_they_started():
    """A decay of 1 undoes all steps but the last, so that a small one moves no code."""
    _, layer = random_layer(2, 33, 40, bias=False)
    latent = LatentLinear(layer, weight_of(layer, 0.1))
    start = latent.latent.detach().clone()
    for decay, distance in ((0.0, 30.0), (1.0, 1.0)):
        latent.shift.data.zero_()
        steps = Steps(
            lambda x: latent(x).sum(), [{"params": [latent.shift], "largest": 0.01, "decay": decay}], eps=1e-20
        )
        for _ in range(30):
            steps.add([torch.ones(1, 40)])
            steps.step(1.0)
        assert torch.allclose(start - latent.latent, torch.full_like(start, 0.01 * distance), rtol=1e-3, atol=1e-6)


def test_training_does_not_touch_the_solved_layer():
    for lut_dtype in (torch.float16, torch.float32):
        _, layer = random_layer(2, 33, 40, lut_dtype=lut_dtype)
        before = layer.lut.clone()
        LatentLinear(layer, weight_of(layer)).codebook.data.zero_()
        assert torch.equal(layer.lut, before)
