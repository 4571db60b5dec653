"""The module that takes a linear layer's place."""

from .fusion import fuse, unfuse
from .guided_embedding import GuidedEmbedding, scale_of
from .guided_linear import GuidedLinear
from .latent_linear import LatentLinear
from .surgery import (
    cache_dequantized,
    dequantize_model,
    prepare_layers,
    quantized_modules,
    replace_module,
    without_copies,
)
from .trained_linear import TrainedLinear, codebook_gradient
from .vocabulary import refuse_resizing, tie_codes, tied_pairs, untie_codebooks

__all__ = [
    "GuidedEmbedding",
    "GuidedLinear",
    "LatentLinear",
    "TrainedLinear",
    "cache_dequantized",
    "codebook_gradient",
    "dequantize_model",
    "fuse",
    "prepare_layers",
    "quantized_modules",
    "refuse_resizing",
    "replace_module",
    "scale_of",
    "tie_codes",
    "tied_pairs",
    "unfuse",
    "untie_codebooks",
    "without_copies",
]
