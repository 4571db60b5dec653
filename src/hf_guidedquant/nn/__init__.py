"""The module that takes a linear layer's place."""

from .code_sums import sums_by_code
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
from .trained_linear import WEIGHTS_AT_A_TIME, TrainedLinear, codebook_gradient, spacing
from .vocabulary import refuse_resizing, tie_codes, tied_pairs, untie_codebooks

__all__ = [
    "WEIGHTS_AT_A_TIME",
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
    "spacing",
    "sums_by_code",
    "tie_codes",
    "tied_pairs",
    "unfuse",
    "untie_codebooks",
    "without_copies",
]
