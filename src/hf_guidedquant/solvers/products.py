"""Products with a symmetric fp32 matrix: plain ones, and ones on bf16 tensor cores with the accuracy of fp32.

An fp32 number is the exact sum of three bf16 numbers (three times 8 of its 24 bits), and products of bf16 numbers are
exact in fp32. What is left is rounding in the fp32 sum, as in any fp32 product, and the smallest three of the nine
products of pieces, which are left out: at most ``2⁻²⁴ Σ|h||x|``.
"""

import torch
from torch import Tensor

from .base import parts

_PIECES = 3


def split(matrix: Tensor) -> Tensor:
    """fp32 ``[..., n, m]`` -> bf16 ``[..., 3, n, m]``, large to small, whose sum is the matrix exactly.

    Exact for finite values that bf16 can round, down to 2⁻¹³³, the smallest bf16 number.
    """
    pieces = []
    for _ in range(_PIECES):
        pieces.append(matrix.bfloat16())
        matrix = matrix - pieces[-1]
    return torch.stack(pieces, dim=-3)


class PlainProduct:
    """Products with ``hessian [G, K, K]`` in its own dtype."""

    def __init__(self, hessian: Tensor) -> None:
        self.hessian = hessian

    def operand(self, right: Tensor) -> Tensor:
        """``right [G, n, R]`` in the form that :meth:`rows` takes; its dimension -2 runs over the n inputs."""
        return right

    def rows(self, which: slice, operand: Tensor) -> Tensor:
        """``H[which] @ right`` ``[G, rows, R]``, right ``[G, K, R]`` given as an operand."""
        return torch.bmm(self.hessian[:, which], operand)

    def one_hot(self, left: Tensor) -> Tensor:
        """``left @ H`` for a boolean ``left [G, n, K]``."""
        return torch.bmm(left.to(self.hessian.dtype), self.hessian)


class LowerProduct(PlainProduct):
    """Products with lower triangular matrices in the place of a Hessian, without the zeros on the right."""

    def rows(self, which: slice, operand: Tensor) -> Tensor:
        return torch.bmm(self.hessian[:, which, : which.stop], operand[:, : which.stop])


class SplitProduct:
    """Products with an fp32 ``hessian [G, K, K]`` on tensor cores. Methods as those of :class:`PlainProduct`."""

    def __init__(self, hessian: Tensor) -> None:
        # [G, K, 3 K], small to large: next to operands from large to small, the k-th pieces meet the (4 - k)-th.
        groups, inputs, _ = hessian.shape
        self.pieces = torch.empty(groups, inputs, _PIECES * inputs, dtype=torch.bfloat16, device=hessian.device)
        for rows in parts(inputs, groups * inputs):
            self.pieces[:, rows] = torch.cat(split(hessian[:, rows]).unbind(-3)[::-1], dim=-1)

    def operand(self, right: Tensor) -> Tensor:
        return split(right)  # [G, 3, n, R]

    def rows(self, which: slice, operand: Tensor) -> Tensor:
        left, right = self.pieces[:, which], operand.flatten(1, 2)
        inputs = operand.shape[-2]
        total = _bmm(left, right)  # H₃ x₁ + H₂ x₂ + H₁ x₃, then H₂ x₁ + H₁ x₂, then H₁ x₁
        for skipped in range(1, _PIECES):
            total += _bmm(left[:, :, skipped * inputs :], right[:, : (_PIECES - skipped) * inputs])
        return total

    def one_hot(self, left: Tensor) -> Tensor:
        return _bmm(left.bfloat16().repeat(1, 1, _PIECES), self.pieces.mT)


def has_tensor_cores(device: torch.device) -> bool:
    """Whether bf16 products with fp32 results run there at full speed."""
    if device.type != "cuda" or torch.version.hip or "dtype" not in torch.ops.aten.bmm.overloads():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _bmm(left: Tensor, right: Tensor) -> Tensor:
    """bf16 times bf16, summed and returned in fp32."""
    if left.device.type == "cpu":
        return torch.bmm(left.float(), right.float())
    return torch.bmm(left, right, out_dtype=torch.float32)
