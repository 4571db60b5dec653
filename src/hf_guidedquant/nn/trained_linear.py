"""A quantized layer while its codebook is trained."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..triton_kernels import lut_dequantize, pack_codes, unpack_codes
from .code_sums import sums_by_code
from .guided_linear import GuidedLinear

# Numbers of a weight gradient that exist at a time.
WEIGHTS_AT_A_TIME = 1 << 25


class TrainedLinear(nn.Module):
    """Takes a :class:`GuidedLinear`'s place: the same product, with a gradient of the codebook.

    Attributes:
        codebook: fp32 ``[out_features, 2**bits]``, the only parameter with a gradient. Products are computed with what
            would be stored of it.
    """

    def __init__(self, layer: GuidedLinear) -> None:
        super().__init__()
        self.in_features = layer.in_features
        self.lut_dtype = layer.lut.dtype
        self.codebook = nn.Parameter(layer.lut.detach().to(torch.float32, copy=True))
        self.register_buffer("planes", layer.bit_planes(), persistent=False)
        self.planes: Tensor
        self.bias = layer.bias
        # It stays as it is.
        self.overlay = layer.overlay

    def stored_codebook(self) -> Tensor:
        """The codebook in the dtype that it is stored in."""
        return stored(self.codebook, self.lut_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features] -> [..., out_features]``, in the dtype of mixed precision, else in x's."""
        x = multiplied(x)
        y = _Product.apply(x, self.codebook, self.stored_codebook(), self.planes, *self.overlay.values())
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def quantized(self) -> GuidedLinear:
        """The layer with the codebook as it is now, in ascending order; the codes are renumbered to match."""
        lut, order = self.stored_codebook().sort(dim=-1, stable=True)
        planes = self.planes
        if not torch.equal(order, torch.arange(order.shape[-1], device=order.device).expand_as(order)):
            codes = unpack_codes(planes, self.in_features)
            ranks = order.argsort(dim=-1).to(torch.uint8)
            planes = pack_codes(ranks.gather(1, codes.long()), planes.shape[0])
        return GuidedLinear.from_tensors({"weight": planes, "lut": lut, **self.overlay}, self.in_features, self.bias)


def multiplied(x: Tensor) -> Tensor:
    """Activations in the dtype that they are multiplied in: that of mixed precision, else their own."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x


def stored(codebook: Tensor, dtype: torch.dtype) -> Tensor:
    """A codebook in the dtype that it is stored in, without gradient; what is too large becomes the largest."""
    limit = torch.finfo(dtype).max
    return codebook.detach().clamp(-limit, limit).to(dtype)


def spacing(codebook: Tensor) -> float:
    """Mean distance between neighbouring codewords of an ascending codebook, the unit of steps in training."""
    return float(codebook.detach().diff(dim=-1).abs().mean())


class _Product(torch.autograd.Function):
    """``x Wᵀ``. ``W`` is expanded whenever it is needed and never kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codebook: Tensor, lut: Tensor, planes: Tensor, *overlay: Tensor) -> Tensor:
        ctx.save_for_backward(x, lut, planes, *overlay)
        return F.linear(x, lut_dequantize(planes, lut, x.shape[-1], x.dtype, *overlay))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, lut, planes, *overlay = ctx.saved_tensors
        grad_x = grad_codebook = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ lut_dequantize(planes, lut, x.shape[-1], grad.dtype, *overlay)
        if ctx.needs_input_grad[1]:
            grad_codebook = codebook_gradient(grad.flatten(0, -2), x.flatten(0, -2), planes)
        return grad_x, grad_codebook, *(None for _ in ctx.needs_input_grad[2:])


def codebook_gradient(grad: Tensor, x: Tensor, planes: Tensor) -> Tensor:
    """Gradient of the codebook from the gradient of the product.

    ``∂ℓ/∂c[n, l] = Σ_{k: code[n, k] = l} (gradᵀ x)[n, k]``: weight gradients of some rows at a time, summed by code.
    Beside its arguments it takes some 0.5 GiB at most, and without 16-bit products with fp32 sums fp32 copies of both.

    Args:
        grad: Of the outputs, ``[T, N]``.
        x: Inputs ``[T, K]``, of the same dtype.
        planes: Codes as bit-planes, int32 ``[bits, N, ceil(K / 32)]``.

    Returns:
        fp32 ``[N, 2**bits]``; products are summed in fp32, or in fp64 if the arguments are.
    """
    inputs, levels = x.shape[1], 2 ** planes.shape[0]
    mixed = x.device.type == "cuda" and x.dtype in (torch.float16, torch.bfloat16) and _mixed_product()
    if not mixed:
        wide = torch.promote_types(x.dtype, torch.float32)
        grad, x = grad.to(wide), x.to(wide)
    result = torch.empty(grad.shape[1], levels, dtype=torch.float32, device=grad.device)
    step = max(1, WEIGHTS_AT_A_TIME // inputs)
    for start in range(0, grad.shape[1], step):
        rows = slice(start, start + step)
        transposed = grad[:, rows].mT
        weight_gradient = torch.mm(transposed, x, out_dtype=torch.float32) if mixed else transposed @ x
        result[rows] = sums_by_code(weight_gradient, planes[:, rows], levels)
    return result


@functools.cache
def _mixed_product() -> bool:
    """Whether torch multiplies 16-bit matrices into an fp32 one; it can since 2.8."""
    return "dtype" in torch.ops.aten.mm.overloads()
