"""The module that takes a linear layer's place."""

from .fusion import fuse, unfuse
from .guided_linear import GuidedLinear
from .latent_linear import LatentLinear
from .surgery import cache_dequantized, dequantize_model, prepare_layers, quantized_modules, replace_module
from .trained_linear import TrainedLinear, codebook_gradient

__all__ = [
    "GuidedLinear",
    "LatentLinear",
    "TrainedLinear",
    "cache_dequantized",
    "codebook_gradient",
    "dequantize_model",
    "fuse",
    "prepare_layers",
    "quantized_modules",
    "replace_module",
    "unfuse",
]
