"""The layout that the tensor-core kernels read: codes in the order in which a warp's lanes hold MMA fragments.

A tile is 16 output rows by 128 inputs. Lane 4 g + t of a warp (g in 0..7, t in 0..3) holds the codes of rows g and
g + 8 at the inputs 32 p + 8 t + e (p in 0..3, e in 0..7): code i = 8 p + e of 32 codes a row. A tile takes
``64 * bits`` int32 words, first a vector of four words for every lane, then what is left:

====  ==================================  ==============================================================================
bits  words of a lane                     place of code i
====  ==================================  ==============================================================================
2     2 of row g, 2 of row g + 8          word i / 16; with j = i % 16 at bit ``16 (j / 2 % 2) + 8 (j % 2) + 2 (j / 4)``
3     4 as above, low two bits; then      word i / 16 at bit ``4 (i % 8) + 2 (i / 8 % 2)``
      1 of row g, 1 of row g + 8          third bit at bit ``4 (i % 8) + i / 8``
4     4 of row g; then 4 of row g + 8     word i / 8 at bit ``4 (i % 8)``
====  ==================================  ==============================================================================

Rows and inputs are padded with code 0 to whole tiles. See README.md for why a decoder wants the bits there.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import pack_codes, unpack_codes, words_per_row

TILE_ROWS, TILE_INPUTS = 16, 128
TILED_BITS = (2, 3, 4)
# Codes to rearrange at a time: their int32 copies stay below a few hundred MB.
_CHUNK = 1 << 24


def tiles_shape(bits: int, rows: int, inputs: int) -> tuple[int, int, int]:
    """Shape of the tiles of a ``[rows, inputs]`` matrix."""
    return -(-rows // TILE_ROWS), -(-inputs // TILE_INPUTS), 64 * bits


def code_places(bits: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Word and bit of the 32 codes that a lane holds of one row; of their lowest two bits at 3 bits."""
    i = torch.arange(32, device=device)
    if bits == 2:
        j = i % 16
        return i // 16, 16 * (j // 2 % 2) + 8 * (j % 2) + 2 * (j // 4)
    if bits == 3:
        return i // 16, 4 * (i % 8) + 2 * (i // 8 % 2)
    return i // 8, 4 * (i % 8)


def pack_tiles(weight: Tensor, in_features: int) -> Tensor:
    """Bit-planes int32 ``[bits, N, ceil(K / 32)]`` -> tiles int32 ``[ceil(N / 16), ceil(K / 128), 64 bits]``."""
    bits, rows, _ = weight.shape
    shape = tiles_shape(bits, rows, in_features)
    tiles = torch.empty(shape, dtype=torch.int32, device=weight.device)
    step = _tiles_at_once(shape[1])
    for start in range(0, shape[0], step):
        codes = unpack_codes(weight[:, start * TILE_ROWS : (start + step) * TILE_ROWS], in_features)
        here = min(step, shape[0] - start)
        padding = (0, shape[1] * TILE_INPUTS - in_features, 0, here * TILE_ROWS - codes.shape[0])
        # row tile, half, g, block, p, t, e -> row tile, block, lane (g, t), half, code (p, e)
        lanes = F.pad(codes, padding).view(here, 2, 8, shape[1], 4, 4, 8).permute(0, 3, 2, 5, 1, 4, 6)
        tiles[start : start + here] = _pack_lanes(lanes.reshape(here, shape[1], 32, 2, 32).int(), bits)
    return tiles


def unpack_tiles(tiles: Tensor, rows: int, in_features: int) -> Tensor:
    """Inverse of :func:`pack_tiles`: the bit-planes int32 ``[bits, N, ceil(K / 32)]``."""
    bits = tiles.shape[2] // 64
    if in_features == 0:
        return tiles.new_empty(bits, rows, 0)
    planes = [tiles.new_empty(bits, 0, words_per_row(in_features))]
    step = _tiles_at_once(tiles.shape[1])
    for start in range(0, tiles.shape[0], step):
        part = tiles[start : start + step]
        codes = _unpack_lanes(part, bits).view(*part.shape[:2], 8, 4, 2, 4, 8).permute(0, 4, 2, 1, 5, 3, 6)
        codes = codes.reshape(part.shape[0] * TILE_ROWS, -1)[: rows - start * TILE_ROWS, :in_features]
        planes.append(pack_codes(codes.to(torch.uint8), bits))
    return torch.cat(planes, dim=1)


def unpack_tile_rows(tiles: Tensor, rows: Tensor, in_features: int) -> Tensor:
    """The codes of some rows alone.

    Args:
        tiles: int32 ``[ceil(N / 16), ceil(K / 128), 64 bits]``.
        rows: Numbers of rows, int64 ``[n]``.
        in_features: K.

    Returns:
        uint8 ``[n, K]``.
    """
    bits = tiles.shape[2] // 64
    tile, half, g = rows // TILE_ROWS, rows % TILE_ROWS // 8, rows % 8
    # Made on the device, because nothing can be copied there while a CUDA graph is captured.
    word, place = code_places(bits, tiles.device)
    if bits == 4:
        words = tiles.unflatten(-1, (2, 8, 4, 4))[tile, :, half, g]  # [n, block, t, word]
    else:
        words = tiles[..., :128].unflatten(-1, (8, 4, 2, 2))[tile, :, g, :, half]
    codes = (words[..., word] >> place) & (15 if bits == 4 else 3)
    if bits == 3:
        i = torch.arange(32, device=tiles.device)
        third = tiles[..., 128:].unflatten(-1, (8, 4, 2))[tile, :, g, :, half].unsqueeze(-1)
        codes = codes | (((third >> (4 * (i % 8) + i // 8)) & 1) << 2)
    # block, t, (p, e) -> block, p, t, e
    codes = codes.unflatten(-1, (4, 8)).transpose(-3, -2).flatten(1)
    return codes[:, :in_features].to(torch.uint8)


def _tiles_at_once(blocks: int) -> int:
    """Row tiles of so many blocks to rearrange at a time."""
    return max(1, _CHUNK // max(1, blocks * TILE_INPUTS * TILE_ROWS))


def _pack_lanes(codes: Tensor, bits: int) -> Tensor:
    """int32 codes ``[..., 32 lanes, 2 rows, 32]`` -> words ``[..., 64 bits]``."""
    word, place = (table.to(codes.device) for table in code_places(bits))
    low = (codes & (3 if bits == 3 else 15)) << place
    # The fields of a word do not overlap, so adding is joining; int32 wraps into the sign bit as it should.
    words = torch.stack([low[..., word == w].sum(-1, dtype=torch.int32) for w in range(int(word[-1]) + 1)], dim=-1)
    if bits == 2:
        return words.flatten(-3)
    if bits == 4:
        return words.transpose(-3, -2).flatten(-3)
    i = torch.arange(32, device=codes.device)
    third = ((codes >> 2) << (4 * (i % 8) + i // 8)).sum(-1, dtype=torch.int32)
    return torch.cat([words.flatten(-3), third.flatten(-2)], dim=-1)


def _unpack_lanes(tiles: Tensor, bits: int) -> Tensor:
    """Words ``[..., 64 bits]`` -> int32 codes ``[..., 32 lanes, 2 rows, 32]``."""
    word, place = (table.to(tiles.device) for table in code_places(bits))
    lead = tiles.shape[:-1]
    first = tiles[..., :128].view(*lead, 32, 2, 2)
    words = tiles.view(*lead, 2, 32, 4).transpose(-3, -2) if bits == 4 else first
    codes = (words[..., word] >> place) & (15 if bits == 4 else 3)
    if bits == 3:
        i = torch.arange(32, device=tiles.device)
        third = (tiles[..., 128:].view(*lead, 32, 2, 1) >> (4 * (i % 8) + i // 8)) & 1
        codes = codes | (third << 2)
    return codes
