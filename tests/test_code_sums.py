"""Sums by code, in torch, in the interpreter and on a GPU, against float64."""

import pytest
import torch
from interpreter import interpreter_only, not_interpreted, run_interpreted_tests

from hf_guidedquant.nn.code_sums import sums_by_code
from hf_guidedquant.triton_kernels import pack_codes

EPS32 = torch.finfo(torch.float32).eps
SHAPES = [(1, 1), (3, 31), (5, 33), (4, 255), (2, 257), (7, 1000)]


def check(sums, rows, inputs, bits, device="cpu"):
    """Both forms of the codes, as parts of larger tensors too."""
    generator = torch.Generator().manual_seed(1000 * rows + inputs + bits)
    values = torch.randn(rows, inputs, generator=generator)
    codes = torch.randint(2**bits, (rows, inputs), generator=generator, dtype=torch.uint8)
    one_hot = torch.nn.functional.one_hot(codes.long(), 2**bits).double()  # [N, K, levels]
    exact = (values.double().unsqueeze(-1) * one_hot).sum(dim=1)
    bound = inputs * EPS32 * (values.double().abs().unsqueeze(-1) * one_hot).sum(dim=1)
    more = torch.cat([codes.flip(0), codes, codes.flip(0)])
    values, codes, more, planes, part = (
        tensor.to(device) for tensor in (values, codes, more, pack_codes(codes, bits), pack_codes(more, bits))
    )
    middle = slice(rows, 2 * rows)
    for form in (codes, more[middle], planes, part[:, middle]):
        found = sums(values, form, 2**bits)
        assert found.shape == (rows, 2**bits)
        assert found.dtype == torch.float32
        assert ((found.cpu() - exact).abs() <= bound).all()
        assert torch.equal(found, sums(values, form, 2**bits))
    strided = torch.stack([values, values], dim=-1)[..., 0]
    assert torch.equal(sums(strided, codes, 2**bits), sums(values, codes, 2**bits))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "inputs"), SHAPES)
def test_in_torch(rows, inputs, bits):
    check(sums_by_code, rows, inputs, bits)


def test_an_infinite_value_spoils_its_own_code_only():
    values, codes = torch.tensor([[1.0, float("inf"), 2.0]]), torch.tensor([[0, 1, 2]], dtype=torch.uint8)
    assert sums_by_code(values, codes, 4).tolist() == [[1.0, float("inf"), 2.0, 0.0]]


@not_interpreted
@pytest.mark.timeout(900)
def test_what_is_below_in_a_process_with_the_interpreter():
    run_interpreted_tests(__file__)


@interpreter_only
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
@pytest.mark.parametrize(("rows", "inputs"), SHAPES)
def test_kernel_interpreted(rows, inputs, bits):
    from hf_guidedquant.nn.code_sums_kernel import sums_by_code as fused

    check(fused, rows, inputs, bits)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_on_a_gpu(bits):
    for rows, inputs in (*SHAPES, (300, 14336)):
        check(sums_by_code, rows, inputs, bits, "cuda")
