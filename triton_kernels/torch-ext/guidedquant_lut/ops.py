"""The `torch.library` ops: schemas, shape checks, fake implementations, and the gradient of the activations."""

import torch
from torch import Tensor

from . import reference

try:  # written by the Hub kernel builder, absent in an ordinary install
    from ._ops import add_op_namespace_prefix
except ImportError:

    def add_op_namespace_prefix(name: str) -> str:
        return f"hf_guidedquant::{name}"


OPS_NAMESPACE = add_op_namespace_prefix("").removesuffix("::")

_library = torch.library.Library(OPS_NAMESPACE, "FRAGMENT")
_library.define("lut_linear(Tensor x, Tensor weight, Tensor lut, Tensor? bias) -> Tensor")
_library.define("lut_dequantize(Tensor weight, Tensor lut, int in_features, ScalarType dtype) -> Tensor")


def _check_packed(weight: Tensor, lut: Tensor, in_features: int) -> None:
    torch._check(weight.dtype == torch.int32, lambda: f"weight must be int32 bit-planes, got {weight.dtype}")
    torch._check(weight.dim() == 3, lambda: f"weight must be [bits, out, words], got {tuple(weight.shape)}")
    bits, rows, words = weight.shape
    torch._check(1 <= bits <= 8, lambda: f"weight has {bits} bit-planes; 1 to 8 are allowed")
    torch._check(lut.is_floating_point(), lambda: f"lut must be floating point, got {lut.dtype}")
    torch._check(
        lut.dim() == 2 and lut.shape[0] == rows and lut.shape[1] == 2**bits,
        lambda: f"lut must be [{rows}, {2**bits}] for weight {tuple(weight.shape)}, got {tuple(lut.shape)}",
    )
    torch._check(
        words == reference.words_per_row(in_features),
        lambda: f"{in_features} inputs take {reference.words_per_row(in_features)} words a row, weight has {words}",
    )


def _linear(x: Tensor, weight: Tensor, lut: Tensor, bias: Tensor | None) -> Tensor:
    _check_linear(x, weight, lut, bias)
    if torch.is_autocast_enabled(x.device.type):
        # Autocast would change the product's dtype behind the schema's back.
        with torch.autocast(x.device.type, enabled=False):
            return reference.lut_linear(x, weight, lut, bias)
    return reference.lut_linear(x, weight, lut, bias)


def _linear_fake(x: Tensor, weight: Tensor, lut: Tensor, bias: Tensor | None) -> Tensor:
    _check_linear(x, weight, lut, bias)
    return x.new_empty(*x.shape[:-1], weight.shape[1])


def _check_linear(x: Tensor, weight: Tensor, lut: Tensor, bias: Tensor | None) -> None:
    torch._check(x.is_floating_point(), lambda: f"x must be floating point, got {x.dtype}")
    torch._check(x.dim() >= 1, lambda: "x must be [..., in_features]")
    _check_packed(weight, lut, x.shape[-1])
    if bias is not None:
        torch._check(
            bias.dim() == 1 and bias.shape[0] == weight.shape[1],
            lambda: f"bias must be [{weight.shape[1]}], got {tuple(bias.shape)}",
        )


def _dequantize(weight: Tensor, lut: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    _check_dequantize(weight, lut, in_features, dtype)
    return reference.lut_dequantize(weight, lut, in_features, dtype)


def _check_dequantize(weight: Tensor, lut: Tensor, in_features: int, dtype: torch.dtype) -> None:
    torch._check(dtype.is_floating_point, lambda: f"dtype must be floating point, got {dtype}")
    _check_packed(weight, lut, in_features)


def _dequantize_fake(weight: Tensor, lut: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    _check_dequantize(weight, lut, in_features, dtype)
    return lut.new_empty(weight.shape[1], in_features, dtype=dtype)


_library.impl("lut_linear", _linear, "CompositeExplicitAutograd")
_library.impl("lut_dequantize", _dequantize, "CompositeExplicitAutograd")
torch.library.register_fake(f"{OPS_NAMESPACE}::lut_linear", _linear_fake, lib=_library)
torch.library.register_fake(f"{OPS_NAMESPACE}::lut_dequantize", _dequantize_fake, lib=_library)

_ops = getattr(torch.ops, OPS_NAMESPACE)


def _save_for_backward(ctx, inputs, output) -> None:
    x, weight, lut, _ = inputs
    ctx.save_for_backward(weight, lut)
    ctx.in_features = x.shape[-1]


def _backward(ctx, grad: Tensor):
    """Gradients of x and the bias; codes and codebooks are constants here."""
    weight, lut = ctx.saved_tensors
    grad_x = grad @ _ops.lut_dequantize(weight, lut, ctx.in_features, grad.dtype) if ctx.needs_input_grad[0] else None
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0) if ctx.needs_input_grad[3] else None
    return grad_x, None, None, grad_bias


torch.library.register_autograd(
    f"{OPS_NAMESPACE}::lut_linear", _backward, setup_context=_save_for_backward, lib=_library
)


def lut_linear(x: Tensor, weight: Tensor, lut: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply activations with a quantized matrix.

    Args:
        x: Activations ``[..., K]``, fp16, bf16, fp32 or fp64. Differentiable.
        weight: Codes as bit-planes, int32 ``[bits, N, ceil(K / 32)]`` (see :func:`pack_codes`).
        lut: Codebook of every row, floating point ``[N, 2**bits]``. Converted to x's dtype.
        bias: ``[N]`` or None.

    Returns:
        ``[..., N]`` in x's dtype.

    Raises:
        RuntimeError: Shapes or dtypes do not fit together.
    """
    return _ops.lut_linear(x, weight, lut, bias)


def lut_dequantize(weight: Tensor, lut: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    """The dense matrix ``[N, in_features]`` in ``dtype``, on the device of ``weight``."""
    return _ops.lut_dequantize(weight, lut, in_features, dtype)
