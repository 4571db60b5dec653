"""The module that takes a linear layer's place."""

from .fusion import fuse, unfuse
from .guided_linear import GuidedLinear
from .surgery import cache_dequantized, dequantize_model, prepare_layers, quantized_modules, replace_module

__all__ = [
    "GuidedLinear",
    "cache_dequantized",
    "dequantize_model",
    "fuse",
    "prepare_layers",
    "quantized_modules",
    "replace_module",
    "unfuse",
]
