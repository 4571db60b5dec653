"""Products in bf16 pieces against float64: as accurate as fp32, which a product of single bf16 numbers is not."""

import pytest
import torch

from hf_guidedquant.solvers.products import LowerProduct, PlainProduct, SplitProduct, split

EPS32 = torch.finfo(torch.float32).eps
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def operands(groups: int, inputs: int, rows: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A symmetric matrix and a right side, entries over six orders of magnitude."""
    generator = torch.Generator().manual_seed(inputs)
    matrix = torch.randn(groups, inputs, inputs, generator=generator)
    size = torch.randn(groups, inputs, 1, generator=generator).mul(3).exp()
    right = torch.randn(groups, inputs, rows, generator=generator) * size.flip(1)
    return ((matrix + matrix.mT) * size * size.mT).to(device), right.to(device)


@pytest.mark.parametrize("device", DEVICES)
def test_three_pieces_hold_every_bit(device):
    bits = torch.randint(-(2**31), 2**31 - 1, (3, 40, 500), generator=torch.Generator().manual_seed(0))
    values = bits.to(torch.int32).view(torch.float32).to(device)
    # From 2⁻¹⁰⁸ on the last of 24 bits is at least 2⁻¹³¹, which bf16 has; below 2¹²⁷ nothing is rounded to infinity.
    values = torch.where((values.abs() >= 2.0**-108) & (values.abs() < 2.0**127), values, 1.0)
    pieces = split(values)
    assert pieces.dtype == torch.bfloat16
    assert pieces.shape == (3, 3, 40, 500)
    assert torch.equal(pieces.double().sum(dim=1), values.double())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("groups", "inputs", "rows"), [(1, 1, 1), (2, 37, 5), (1, 300, 40), (1, 1000, 8)])
def test_products_are_as_accurate_as_fp32(groups, inputs, rows, device):
    hessian, right = operands(groups, inputs, rows, device)
    which = slice(inputs // 3, inputs)
    exact = hessian[:, which].double() @ right.double()
    # K terms are added in fp32, each sum rounded to nearest or, on tensor cores, towards zero. Smaller pieces and the
    # products left out add less than four units more.
    bound = (inputs + 4) * EPS32 * (hessian[:, which].double().abs() @ right.double().abs())
    for product in (PlainProduct(hessian), SplitProduct(hessian)):
        result = product.rows(which, product.operand(right))
        assert result.dtype == torch.float32
        assert ((result.double() - exact).abs() <= bound).all()
    rough = hessian[:, which].bfloat16().double() @ right.bfloat16().double()
    assert not ((rough - exact).abs() <= bound).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("which", [slice(0, 7), slice(7, 30), slice(30, 41)])
def test_of_a_triangular_matrix_no_zeros_are_multiplied(device, which):
    matrix, right = operands(2, 41, 5, device)
    lower = matrix.tril()
    exact = lower[:, which].double() @ right.double()
    # What would be multiplied with a zero is not read.
    right[:, which.stop :] = torch.nan
    result = LowerProduct(lower).rows(which, right)
    bound = 41 * EPS32 * (lower[:, which].double().abs() @ right.nan_to_num().double().abs())
    assert ((result.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("device", DEVICES)
def test_one_hot_products_are_as_accurate_as_fp32(device):
    hessian, _ = operands(2, 200, 1, device)
    left = (torch.rand(2, 33, 200, generator=torch.Generator().manual_seed(1)) < 0.25).to(device)
    exact = left.double() @ hessian.double()
    bound = (200 + 4) * EPS32 * (left.double() @ hessian.double().abs())
    for product in (PlainProduct(hessian), SplitProduct(hessian)):
        result = product.one_hot(left)
        assert ((result.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("device", DEVICES)
def test_an_operand_is_replaced_in_part(device):
    hessian, right = operands(2, 60, 7, device)
    for product in (PlainProduct(hessian), SplitProduct(hessian)):
        operand = product.operand(torch.zeros_like(right))
        operand[..., 20:50, :] = product.operand(right[:, 20:50])
        expected = product.operand(torch.nn.functional.pad(right[:, 20:50], (0, 0, 20, 10)))
        assert torch.equal(operand, expected)
