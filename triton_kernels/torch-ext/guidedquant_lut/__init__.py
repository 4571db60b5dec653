"""Linear layers whose weights are a codebook per output row and a code per weight."""

from .backend import backend_for, requested_backend, set_backend, settle
from .ops import OPS_NAMESPACE, decode_attention, lut_dequantize, lut_dequantize_tiled, lut_linear, lut_linear_tiled
from .reference import pack_codes, unpack_codes, words_per_row
from .tiles import TILE_ROWS, TILED_BITS, pack_tiles, unpack_tile_rows, unpack_tiles

__all__ = [
    "OPS_NAMESPACE",
    "TILED_BITS",
    "TILE_ROWS",
    "backend_for",
    "decode_attention",
    "lut_dequantize",
    "lut_dequantize_tiled",
    "lut_linear",
    "lut_linear_tiled",
    "pack_codes",
    "pack_tiles",
    "requested_backend",
    "set_backend",
    "settle",
    "unpack_codes",
    "unpack_tile_rows",
    "unpack_tiles",
    "words_per_row",
]
