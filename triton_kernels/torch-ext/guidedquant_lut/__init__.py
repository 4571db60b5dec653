"""Linear layers whose weights are per-row codebooks behind bit-plane codes."""

from .ops import OPS_NAMESPACE, lut_dequantize, lut_linear
from .reference import pack_codes, unpack_codes, words_per_row

__all__ = ["OPS_NAMESPACE", "lut_dequantize", "lut_linear", "pack_codes", "unpack_codes", "words_per_row"]
