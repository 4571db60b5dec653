"""The module that takes a linear layer's place."""

from .guided_linear import GuidedLinear
from .surgery import cache_dequantized, dequantize_model, quantized_modules, replace_module

__all__ = ["GuidedLinear", "cache_dequantized", "dequantize_model", "quantized_modules", "replace_module"]
