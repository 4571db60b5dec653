"""A linear layer whose weights are codes and a codebook per output."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..formats import lut as lut_format
from ..triton_kernels import lut_dequantize, lut_linear


class GuidedLinear(nn.Module):
    """Drop-in for ``nn.Linear``: ``y = x @ W.T + bias`` with ``W[n, k] = lut[n, code[n, k]]``.

    Args:
        in_features, out_features: As of ``nn.Linear``; any sizes.
        bits: Bits per weight, 1-8.
        bias: Whether there is a bias.
        lut_dtype: Storage dtype of the codebook. It stays what it is when the module is cast to another dtype.
        dtype: Dtype of the bias.
        device: Where to allocate; ``"meta"`` for a module that is about to be loaded.

    The state dict holds ``weight`` (int32 ``[bits, out, ceil(in / 32)]``), ``lut`` (``[out, 2**bits]``) and, if there
    is one, ``bias``. All are Parameters without gradient; gradients flow to the input. The packed tensor is called
    ``weight`` so that a load without this package fails on its shape instead of leaving random weights.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        bias: bool = False,
        *,
        lut_dtype: torch.dtype = torch.float16,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        for name, spec in lut_format.declare(out_features, in_features, bits, lut_dtype).items():
            empty = torch.zeros(spec.shape, dtype=spec.dtype, device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        empty_bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device), requires_grad=False)
        self.bias = empty_bias if bias else None
        self.weight: nn.Parameter
        self.lut: nn.Parameter
        self._caching = False
        self._dense: Tensor | None = None

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], in_features: int, bias: Tensor | None) -> "GuidedLinear":
        """A module around the tensors of the format (see :func:`hf_guidedquant.formats.lut.encode`)."""
        bits, out_features, _ = tensors["weight"].shape
        module = cls(in_features, out_features, bits, bias is not None, device="meta")
        for name, tensor in tensors.items():
            setattr(module, name, nn.Parameter(tensor, requires_grad=False))
        if bias is not None:
            module.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return module

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight ``[out_features, in_features]``, in ``dtype`` (default: the codebook's)."""
        return lut_dequantize(self.weight, self.lut, self.in_features, dtype or self.lut.dtype)

    def cache_dequantized(self, enabled: bool = True) -> None:
        """Keep a dense copy of the weight, made at the first call, in the dtype of the activations; or drop it."""
        self._caching = enabled
        self._dense = None

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features] -> [..., out_features]`` in x's dtype."""
        if not self._caching:
            return lut_linear(x, self.weight, self.lut, self.bias)
        if self._dense is None or self._dense.dtype != x.dtype:
            # An inference tensor could not take part in a later backward pass.
            with torch.inference_mode(False), torch.no_grad():
                self._dense = self.dequantize(x.dtype)
        return F.linear(x, self._dense, None if self.bias is None else self.bias.to(x.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GuidedLinear":
        # .half(), .bfloat16() and .to(dtype) go through here. Codes are integers and pass unharmed; the codebook
        # would be rounded, so only its device follows.
        lut = self.lut.data
        super()._apply(fn, recurse)
        if self.lut.dtype != lut.dtype:
            self.lut.data = lut.to(self.weight.device)
        self._dense = None
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"bias={self.bias is not None}, lut_dtype={self.lut.dtype}"
        )
