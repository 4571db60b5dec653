"""A quantized layer while its codes and its codebook are trained."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..triton_kernels import pack_codes, unpack_codes
from .code_sums import sums_by_code
from .guided_linear import GuidedLinear
from .trained_linear import multiplied, stored

# How near to the end of its codeword's reach a weight may start, in shares of the way there.
_REACH = 0.5


class LatentLinear(nn.Module):
    """Takes a :class:`GuidedLinear`'s place: every weight is the codeword next to a latent number, which can move.

    Gradients go straight through to the latent numbers. They start where the original weights are, but not outside of
    the inner half of what is nearest to the weight's own codeword: so the layer starts as it was solved, with
    codes that are not the nearest included. How far they have moved is the parameter, so that an optimizer's weight
    decay draws them back to where they started. An overlay stays as it is; the latent numbers are what it leaves of the
    weights.

    Args:
        layer: The solved layer.
        weight: The original's ``[out_features, in_features]``, any float dtype.

    Attributes:
        codebook: fp32 ``[out_features, 2**bits]``, ascending.
        start: Where the latent numbers start, fp32 ``[out_features, in_features]``.
        shift: How far each has moved, of the same shape.
    """

    def __init__(self, layer: GuidedLinear, weight: Tensor) -> None:
        super().__init__()
        self.lut_dtype, self.bits, self.bias = layer.lut.dtype, layer.bits, layer.bias
        self.overlay = layer.overlay
        codebook = layer.lut.detach().float()
        weight = _with_overlay(weight.detach().float(), *self.overlay.values(), sign=-1)
        codes = unpack_codes(layer.bit_planes(), layer.in_features).long()
        ends = codebook.new_full((len(codebook), 1), torch.inf)
        borders = torch.cat([-ends, _borders(codebook), ends], dim=1)
        own = codebook.gather(1, codes)
        low, high = (own + _REACH * (borders.gather(1, codes + side) - own) for side in (0, 1))
        self.codebook = nn.Parameter(codebook.clone())
        self.register_buffer("start", torch.minimum(torch.maximum(weight, low), high).contiguous(), persistent=False)
        self.start: Tensor
        self.shift = nn.Parameter(torch.zeros_like(self.start))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features] -> [..., out_features]``, in the dtype of mixed precision, else in x's."""
        x = multiplied(x)
        weight = _Nearest.apply(self.latent, self.codebook, self.lut_dtype, x.dtype, *self.overlay.values())
        return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))

    @property
    def latent(self) -> Tensor:
        """The latent numbers as they are now."""
        return self.start + self.shift

    @torch.no_grad()
    def settle(self) -> None:
        """Sort the codebook after a step. Latent numbers keep their places; their codewords may be others then."""
        self.codebook.copy_(self.codebook.sort(dim=-1).values)

    def quantized(self) -> GuidedLinear:
        """The layer as it is now."""
        lut = stored(self.codebook, self.lut_dtype)
        codes = _codes(self.latent.detach(), lut.float())
        planes = pack_codes(codes.to(torch.uint8), self.bits)
        tensors = {"weight": planes, "lut": lut, **self.overlay}
        return GuidedLinear.from_tensors(tensors, self.start.shape[1], self.bias)


def _with_overlay(weight: Tensor, *overlay: Tensor, sign: int = 1) -> Tensor:
    """The weight with an overlay, values and columns, added or taken away; without one the weight."""
    if not overlay:
        return weight
    values, places = sign * overlay[0].float(), overlay[1].long()
    return weight.scatter(1, places, (weight.gather(1, places).float() + values).to(weight.dtype))


def _borders(codebook: Tensor) -> Tensor:
    """Where the nearest codeword changes: ``[N, L] -> [N, L - 1]``."""
    return (codebook[:, 1:] + codebook[:, :-1]) / 2


def _codes(latent: Tensor, codebook: Tensor) -> Tensor:
    """Numbers of the nearest codewords, int32 ``[N, K]``."""
    return torch.searchsorted(_borders(codebook), latent, out_int32=True)


class _Nearest(torch.autograd.Function):
    """The weight in the codewords nearest to the latent numbers, as they would be stored, and with the overlay."""

    @staticmethod
    def forward(
        ctx: Any, latent: Tensor, codebook: Tensor, lut_dtype: torch.dtype, dtype: torch.dtype, *overlay: Tensor
    ) -> Tensor:
        lut = stored(codebook, lut_dtype).float()
        codes = _codes(latent, lut)
        ctx.save_for_backward(codes.to(torch.uint8))
        ctx.levels = lut.shape[1]
        return _with_overlay(lut.gather(1, codes.long()).to(dtype), *overlay)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (codes,) = ctx.saved_tensors
        grad = grad.float()
        return grad, sums_by_code(grad, codes, ctx.levels), *(None for _ in ctx.needs_input_grad[2:])
