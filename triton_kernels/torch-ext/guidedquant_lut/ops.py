"""The `torch.library` ops: schemas, shape checks, fake implementations, and the gradient of the activations.

Two layouts of the codes have a product and a dense matrix each: bit-planes, as checkpoints hold them (``lut_linear``,
``lut_dequantize``), and tiles, as the tensor-core kernels read them (``lut_linear_tiled``, ``lut_dequantize_tiled``).
``decode_attention`` is what else of a decoding step took long.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .reference import Overlay, words_per_row
from .tiles import TILED_BITS, tiles_shape

try:  # written by the Hub kernel builder, absent in an ordinary install
    from ._ops import add_op_namespace_prefix
except ImportError:

    def add_op_namespace_prefix(name: str) -> str:
        return f"hf_guidedquant::{name}"


OPS_NAMESPACE = add_op_namespace_prefix("").removesuffix("::")

_library = torch.library.Library(OPS_NAMESPACE, "FRAGMENT")
_ops = getattr(torch.ops, OPS_NAMESPACE)


def _check(condition: Any, message: Callable[[], str]) -> None:
    """``torch._check``, which takes its time over what is plainly true; there are many of them in a token's time."""
    if condition is not True:
        torch._check(condition, message)


def _check_codes(weight: Tensor, lut: Tensor, bits: int, rows: int) -> None:
    _check(weight.dtype == torch.int32, lambda: f"weight must be int32, got {weight.dtype}")
    _check(lut.is_floating_point(), lambda: f"lut must be floating point, got {lut.dtype}")
    _check(
        lut.dim() == 2 and lut.shape[0] == rows and lut.shape[1] == 2**bits,
        lambda: f"lut must be [{rows}, {2**bits}] for weight {tuple(weight.shape)}, got {tuple(lut.shape)}",
    )


def _check_planes(weight: Tensor, lut: Tensor, in_features: int) -> None:
    _check(weight.dim() == 3, lambda: f"weight must be [bits, out, words], got {tuple(weight.shape)}")
    bits, rows, words = weight.shape
    _check(1 <= bits <= 8, lambda: f"weight has {bits} bit-planes; 1 to 8 are allowed")
    _check_codes(weight, lut, bits, rows)
    _check(
        words == words_per_row(in_features),
        lambda: f"{in_features} inputs take {words_per_row(in_features)} words a row, weight has {words}",
    )


def _check_tiles(tiles: Tensor, lut: Tensor, in_features: int) -> None:
    _check(tiles.dim() == 3, lambda: f"tiles must be [row tiles, blocks, words], got {tuple(tiles.shape)}")
    bits, rest = tiles.shape[2] // 64, tiles.shape[2] % 64
    _check(
        rest == 0 and bits in TILED_BITS,
        lambda: f"tiles have {tiles.shape[2]} words; 64 a bit, for {TILED_BITS} bits, are allowed",
    )
    _check(lut.dim() == 2, lambda: f"lut must be [out, {2**bits}], got {tuple(lut.shape)}")
    _check_codes(tiles, lut, bits, lut.shape[0])
    expected = tiles_shape(bits, lut.shape[0], in_features)
    _check(
        tuple(tiles.shape) == expected,
        lambda: f"{lut.shape[0]} outputs of {in_features} inputs take tiles {expected}, got {tuple(tiles.shape)}",
    )


def _check_overlay(values: Tensor | None, columns: Tensor | None, rows: int) -> Overlay:
    """Both or none. Which columns they are is not looked at, because a GPU would have to be waited for."""
    if values is None or columns is None:
        _check(values is columns, lambda: "overlay_values and overlay_columns belong together")
        return None
    _check(values.is_floating_point(), lambda: f"overlay_values must be floating point, got {values.dtype}")
    _check(
        columns.dtype in (torch.int16, torch.int32),
        lambda: f"overlay_columns must be int16 or int32, got {columns.dtype}",
    )
    _check(
        values.dim() == 2 and values.shape[0] == rows and values.shape == columns.shape,
        lambda: (
            f"overlay_values and overlay_columns must be [{rows}, n], "
            f"got {tuple(values.shape)} and {tuple(columns.shape)}"
        ),
    )
    return values, columns


def _define(
    suffix: str,
    check_weight: Callable[[Tensor, Tensor, int], None],
    linear: Callable[[Tensor, Tensor, Tensor, Tensor | None, Overlay], Tensor],
    dequantize: Callable[[Tensor, Tensor, int, torch.dtype, Overlay], Tensor],
) -> None:
    """Define both ops of a layout."""
    names = [f"lut_linear{suffix}", f"lut_dequantize{suffix}"]
    overlay = "Tensor? overlay_values=None, Tensor? overlay_columns=None"
    _library.define(f"{names[0]}(Tensor x, Tensor weight, Tensor lut, Tensor? bias, {overlay}) -> Tensor")
    _library.define(f"{names[1]}(Tensor weight, Tensor lut, int in_features, ScalarType dtype, {overlay}) -> Tensor")

    def check_linear(
        x: Tensor, weight: Tensor, lut: Tensor, bias: Tensor | None, values: Tensor | None, columns: Tensor | None
    ) -> Overlay:
        _check(x.is_floating_point(), lambda: f"x must be floating point, got {x.dtype}")
        _check(x.dim() >= 1, lambda: "x must be [..., in_features]")
        check_weight(weight, lut, x.shape[-1])
        if bias is not None:
            _check(
                bias.dim() == 1 and bias.shape[0] == lut.shape[0],
                lambda: f"bias must be [{lut.shape[0]}], got {tuple(bias.shape)}",
            )
        return _check_overlay(values, columns, lut.shape[0])

    def run_linear(
        x: Tensor,
        weight: Tensor,
        lut: Tensor,
        bias: Tensor | None,
        values: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> Tensor:
        overlay = check_linear(x, weight, lut, bias, values, columns)
        if torch.is_autocast_enabled(x.device.type):
            # Autocast would change the product's dtype behind the schema's back.
            with torch.autocast(x.device.type, enabled=False):
                result = linear(x, weight, lut, bias, overlay)
        else:
            result = linear(x, weight, lut, bias, overlay)
        # torch's own product is a view of another result at times, and then could not be changed in place by its user.
        return torch.ops.aten._unsafe_view(result, result.shape) if result._is_view() else result

    def fake_linear(
        x: Tensor,
        weight: Tensor,
        lut: Tensor,
        bias: Tensor | None,
        values: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> Tensor:
        check_linear(x, weight, lut, bias, values, columns)
        return x.new_empty(*x.shape[:-1], lut.shape[0])

    def check_dequantize(
        weight: Tensor,
        lut: Tensor,
        in_features: int,
        dtype: torch.dtype,
        values: Tensor | None,
        columns: Tensor | None,
    ) -> Overlay:
        _check(dtype.is_floating_point, lambda: f"dtype must be floating point, got {dtype}")
        check_weight(weight, lut, in_features)
        return _check_overlay(values, columns, lut.shape[0])

    def run_dequantize(
        weight: Tensor,
        lut: Tensor,
        in_features: int,
        dtype: torch.dtype,
        values: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> Tensor:
        overlay = check_dequantize(weight, lut, in_features, dtype, values, columns)
        return dequantize(weight, lut, in_features, dtype, overlay)

    def fake_dequantize(
        weight: Tensor,
        lut: Tensor,
        in_features: int,
        dtype: torch.dtype,
        values: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> Tensor:
        check_dequantize(weight, lut, in_features, dtype, values, columns)
        return lut.new_empty(lut.shape[0], in_features, dtype=dtype)

    def save_for_backward(ctx, inputs, output) -> None:
        x, weight, lut, _, values, columns = inputs
        ctx.save_for_backward(weight, lut, values, columns)
        ctx.in_features = x.shape[-1]

    def backward(ctx, grad: Tensor):
        """Gradients of x and the bias; codes, codebooks and overlays are constants here."""
        weight, lut, values, columns = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ getattr(_ops, names[1])(weight, lut, ctx.in_features, grad.dtype, values, columns)
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0) if ctx.needs_input_grad[3] else None
        return grad_x, None, None, grad_bias, None, None

    for name, run, fake in zip(names, (run_linear, run_dequantize), (fake_linear, fake_dequantize), strict=True):
        _library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{OPS_NAMESPACE}::{name}", fake, lib=_library)  # type: ignore[arg-type]
    torch.library.register_autograd(
        f"{OPS_NAMESPACE}::{names[0]}", backward, setup_context=save_for_backward, lib=_library
    )


_define("", _check_planes, dispatch.linear, dispatch.dequantize)
_define("_tiled", _check_tiles, dispatch.linear_tiled, dispatch.dequantize_tiled)

_library.define("decode_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale) -> Tensor")
_library.impl("decode_attention", dispatch.decode_attention, "CompositeExplicitAutograd")


@torch.library.register_fake(f"{OPS_NAMESPACE}::decode_attention", lib=_library)
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])


def lut_linear(
    x: Tensor,
    weight: Tensor,
    lut: Tensor,
    bias: Tensor | None = None,
    overlay_values: Tensor | None = None,
    overlay_columns: Tensor | None = None,
) -> Tensor:
    """Multiply activations with a quantized matrix.

    Args:
        x: Activations ``[..., K]``, fp16, bf16, fp32 or fp64. Differentiable.
        weight: Codes as bit-planes, int32 ``[bits, N, ceil(K / 32)]`` (see :func:`pack_codes`).
        lut: Codebook of every row, floating point ``[N, 2**bits]``. Converted to x's dtype.
        bias: ``[N]`` or None.
        overlay_values: What is added to the codewords of the outliers, so many in every row: floating point ``[N, n]``.
        overlay_columns: Their inputs, int16 or int32 ``[N, n]``, ascending, each from 0 to K - 1. Whoever reads them
            from a file checks that, for a kernel does not.

    Returns:
        ``[..., N]`` in x's dtype, products summed in at least fp32.

    Raises:
        RuntimeError: Shapes or dtypes do not fit together.
    """
    return _ops.lut_linear(x, weight, lut, bias, overlay_values, overlay_columns)


def lut_linear_tiled(
    x: Tensor,
    tiles: Tensor,
    lut: Tensor,
    bias: Tensor | None = None,
    overlay_values: Tensor | None = None,
    overlay_columns: Tensor | None = None,
) -> Tensor:
    """:func:`lut_linear` with the codes as tiles, int32 ``[ceil(N / 16), ceil(K / 128), 64 bits]``, of 2, 3 or 4 bits.

    On NVIDIA GPUs from sm_80 on, products of fp16 and bf16 activations run on tensor cores (see README.md). Tiles,
    codebook and overlay may then be read before kernels that are running on the stream have ended: call :func:`settle`
    after writing them.
    """
    return _ops.lut_linear_tiled(x, tiles, lut, bias, overlay_values, overlay_columns)


def lut_dequantize(
    weight: Tensor,
    lut: Tensor,
    in_features: int,
    dtype: torch.dtype,
    overlay_values: Tensor | None = None,
    overlay_columns: Tensor | None = None,
) -> Tensor:
    """The dense matrix ``[N, in_features]`` in ``dtype``, on the device of ``weight``, with its overlay, if any."""
    return _ops.lut_dequantize(weight, lut, in_features, dtype, overlay_values, overlay_columns)


def decode_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of one query per row, without gradient: ``softmax(scale * query @ key.T, where mask) @ value``.

    Args:
        query: ``[batch, heads, 1, K]``.
        key, value: ``[batch, key heads, length, K]`` and ``[batch, key heads, length, V]``; heads are a multiple of
            key heads, and neighbouring ones share keys.
        mask: bool, broadcastable to ``[batch, 1, 1, length]``, or None. What it excludes is not read by the Triton
            kernel; a row without any True is undefined.
        scale: Of the scores.

    Returns:
        ``[batch, heads, 1, V]`` in query's dtype.
    """
    return _ops.decode_attention(query, key, value, mask, scale)


def lut_dequantize_tiled(
    tiles: Tensor,
    lut: Tensor,
    in_features: int,
    dtype: torch.dtype,
    overlay_values: Tensor | None = None,
    overlay_columns: Tensor | None = None,
) -> Tensor:
    """:func:`lut_dequantize` with the codes as tiles."""
    return _ops.lut_dequantize_tiled(tiles, lut, in_features, dtype, overlay_values, overlay_columns)
