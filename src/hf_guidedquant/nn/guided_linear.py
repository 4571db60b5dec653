"""A linear layer whose weights are codes and a codebook per output."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import OverlayError
from ..formats import lut as lut_format
from ..triton_kernels import (
    TILED_BITS,
    backend_for,
    lut_dequantize,
    lut_dequantize_tiled,
    lut_linear,
    lut_linear_tiled,
    pack_tiles,
    settle,
    unpack_tiles,
)
from .fusion import Fusion, version_of
from .tie import Tie


class GuidedLinear(nn.Module):
    """Drop-in for ``nn.Linear``: ``y = x @ W.T + bias`` with ``W[n, k] = lut[n, code[n, k]]``, plus an overlay if any.

    Args:
        in_features, out_features: As of ``nn.Linear``; any sizes.
        bits: Bits per weight, 1-8.
        bias: Whether there is a bias.
        lut_dtype: Storage dtype of the codebook. It stays what it is when the module is cast to another dtype.
        dtype: Dtype of the bias.
        device: Where to allocate; ``"meta"`` for a module that is about to be loaded.
        outliers: Weights of every row to which something is added.

    The state dict holds ``weight`` (int32 ``[bits, out, ceil(in / 32)]``), ``lut`` (``[out, 2**bits]``) and, if there
    is one, ``bias``; with outliers also ``overlay_values`` (``[out, outliers]``) and ``overlay_columns`` (int16 or
    int32; see :mod:`hf_guidedquant.formats.lut`). All are Parameters without gradient; gradients flow to the input. The
    packed tensor is called ``weight`` so that a load without this package fails on its shape instead of leaving random
    weights.

    On GPUs with tensor-core kernels :meth:`prepare` rearranges the codes into the tiles that they read, in place of the
    bit-planes; moving the module off the GPU undoes it, and the state dict shows bit-planes either way.
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
        outliers: int = 0,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits, self.outliers = in_features, out_features, bits, outliers
        for name, spec in lut_format.declare(out_features, in_features, bits, lut_dtype, outliers).items():
            empty = torch.zeros(spec.shape, dtype=spec.dtype, device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        empty_bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device), requires_grad=False)
        self.bias = empty_bias if bias else None
        self.weight: nn.Parameter
        self.lut: nn.Parameter
        self.overlay_values: nn.Parameter | None
        self.overlay_columns: nn.Parameter | None
        if not outliers:
            self.overlay_values = self.overlay_columns = None
        self._caching = False
        self._dense: Tensor | None = None
        self._dense_source: list[tuple[Tensor, int]] = []
        self._tiled = False
        # Layers multiplied together with this one (see fusion.py), and its place among them.
        self.fusion: Fusion | None = None
        self.position = 0
        # With the embedding or the head that has the same codes.
        self.tie: Tie | None = None

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], in_features: int, bias: Tensor | None) -> "GuidedLinear":
        """A module around the tensors of the format (see :func:`hf_guidedquant.formats.lut.encode`)."""
        bits, out_features, _ = tensors["weight"].shape
        outliers = tensors["overlay_values"].shape[1] if "overlay_values" in tensors else 0
        module = cls(in_features, out_features, bits, bias is not None, device="meta", outliers=outliers)
        for name, tensor in tensors.items():
            setattr(module, name, nn.Parameter(tensor, requires_grad=False))
        if bias is not None:
            module.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return module

    @property
    def tiled(self) -> bool:
        """Whether ``weight`` holds tiles (see :meth:`prepare`) instead of bit-planes."""
        return self._tiled

    @property
    def overlay(self) -> dict[str, Tensor]:
        """The tensors of the overlay, detached, by their names; empty without one."""
        if self.overlay_values is None or self.overlay_columns is None:
            return {}
        return {"overlay_values": self.overlay_values.data, "overlay_columns": self.overlay_columns.data}

    @property
    def packed_bytes(self) -> int:
        """Size of codes, codebook and overlay."""
        return sum(tensor.nbytes for tensor in (self.weight, self.lut, *self.overlay.values()))

    def prepare(self) -> None:
        """Lay the codes out for the kernels of the device that they are on. Takes a moment, and no memory to keep."""
        wanted = self.bits in TILED_BITS and backend_for(self.weight.device) == "tensor_core"
        if wanted and not self._tiled:
            self._set_weight(pack_tiles(self.weight.data, self.in_features))
            settle(self.weight.device)
        elif not wanted and self._tiled:
            self._set_weight(self.bit_planes())
        self._tiled = wanted
        if self.tie is not None:
            self.tie.share(self)

    def bit_planes(self) -> Tensor:
        """The codes as checkpoints hold them, int32 ``[bits, out_features, ceil(in_features / 32)]``."""
        if not self._tiled:
            return self.weight.data
        if self.weight.is_meta:
            spec = lut_format.declare(self.out_features, self.in_features, self.bits, self.lut.dtype)["weight"]
            return torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        planes = None if self.tie is None else self.tie.planes()
        if planes is None:
            planes = unpack_tiles(self.weight.data, self.out_features, self.in_features)
            if self.tie is not None:
                self.tie.remember(planes)
        return planes

    def _set_weight(self, tensor: Tensor) -> None:
        self.weight = nn.Parameter(tensor, requires_grad=False)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight ``[out_features, in_features]``, in ``dtype`` (default: the codebook's)."""
        op = lut_dequantize_tiled if self._tiled else lut_dequantize
        dtype = dtype or self.lut.dtype
        return op(self.weight, self.lut, self.in_features, dtype, self.overlay_values, self.overlay_columns)

    def cache_dequantized(self, enabled: bool = True) -> None:
        """Keep a dense copy of the weight, made at the first call, in the dtype of the activations; or drop it.

        It is made anew when the weight is loaded or changed; compiled code does not notice what is changed in place.
        """
        self._caching = enabled
        self._dense = None

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features] -> [..., out_features]`` in x's dtype."""
        if self._caching:
            return self._dense_product(x)
        if self.fusion is not None and self.fusion.serves(self, x):
            return self.fusion.product(self, x)
        op = lut_linear_tiled if self._tiled else lut_linear
        return op(x, self.weight, self.lut, self.bias, self.overlay_values, self.overlay_columns)

    def _dense_product(self, x: Tensor) -> Tensor:
        if self._dense is None or self._dense.dtype != x.dtype or not self._dense_is_current():
            # An inference tensor could not take part in a later backward pass.
            with torch.inference_mode(False), torch.no_grad():
                self._dense = self.dequantize(x.dtype)
            self._dense_source = self._source()
        return F.linear(x, self._dense, None if self.bias is None else self.bias.to(x.dtype))

    def _dense_is_current(self) -> bool:
        """Whether the dense copy is still one, and one that may be used here."""
        if torch.compiler.is_compiling():
            return True
        if self._dense.is_inference() and not torch.is_inference_mode_enabled():  # type: ignore[union-attr]
            return False
        now = self._source()
        return len(now) == len(self._dense_source) and all(
            tensor is other and version == before
            for (tensor, version), (other, before) in zip(now, self._dense_source, strict=True)
        )

    @property
    def copied_versions(self) -> tuple[int, ...]:
        """How often what the dense copy is made of has been changed in place; empty without a copy."""
        return () if self._dense is None else tuple(version_of(tensor) for tensor, _ in self._dense_source)

    def _source(self) -> list[tuple[Tensor, int]]:
        """What the dense copy is made of, and how often that was changed in place; nothing where torch compiles."""
        tensors = (self.weight, self.lut, self.overlay_values, self.overlay_columns)
        there = () if torch.compiler.is_compiling() else tensors
        return [(tensor, version_of(tensor)) for tensor in there if tensor is not None]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GuidedLinear":
        # .half(), .bfloat16() and .to(dtype) go through here. Codes are integers and pass unharmed; the codebook and
        # the overlay would be rounded, so only their device follows.
        names = ["lut"] + ["overlay_values"] * bool(self.outliers)
        kept = {name: getattr(self, name).data for name in names}
        super()._apply(fn, recurse)
        for name, data in kept.items():
            if getattr(self, name).dtype != data.dtype:
                getattr(self, name).data = data.to(self.weight.device)
        self._dense = None
        self.prepare()
        if self.fusion is not None:
            self.fusion.rebuild()
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._tiled:
            destination[prefix + "weight"] = self.bit_planes()
        for name in ("lut", "bias", *self.overlay):
            tensor = destination.get(prefix + name)
            if tensor is not None and tensor.untyped_storage().nbytes() != tensor.nbytes:
                # Part of a fusion's; whoever writes files expects tensors of their own.
                destination[prefix + name] = tensor.clone()

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any) -> None:
        self._check_columns(state_dict.get(prefix + "overlay_columns"), prefix.removesuffix("."))
        if self._tiled:
            self._set_weight(self.bit_planes())
            self._tiled = False
            if self.tie is not None:
                self.tie.share(self)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self.tie is not None and prefix + "weight" in state_dict:
            self.tie.share(self)
        self._dense = None
        self.prepare()
        if self.fusion is not None:
            self.fusion.rebuild()

    def _check_columns(self, new: Tensor | None, name: str) -> None:
        """Refuse columns that kernels would read beyond the activations by; torch refuses those of another shape."""
        own = self.overlay_columns
        if own is None or new is None or new.shape != own.shape or new.is_meta:
            return
        if not lut_format.are_columns(new.to(own.dtype), self.in_features):
            raise OverlayError([name])

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"bias={self.bias is not None}, lut_dtype={self.lut.dtype}"
            + (f", outliers={self.outliers}" if self.outliers else "")
        )
