"""Launching the kernels on tiles."""

import functools
import importlib
import logging
from types import ModuleType

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from .backend import launching_on
from .configs import Config, MatrixConfig, PrefillConfig, VectorConfig, choose
from .reference import Overlay, lut_dequantize, pack_codes
from .sparse import add_product, add_to_dense
from .tile_kernels import add_splits_kernel, dequantize_kernel, matrix_kernel, vector_kernel
from .tiles import pack_tiles

logger = logging.getLogger(__name__)

# Rows to expand at a time, beside many tokens: enough for a good dense product, and most of them still in the L2 then.
_DENSE_ROWS = 4096
# What a program of `prefill_kernel` takes: the most that registers and shared memory of Hopper hold.
_PREFILL = {"TOKENS": 256, "WARPS": 8, "STAGES": 4}


def linear(x: Tensor, tiles: Tensor, lut: Tensor, bias: Tensor | None, overlay: Overlay = None) -> Tensor:
    """``x @ (W + overlay).T + bias`` for fp16 and bf16 activations ``[..., K]``: ``[..., N]``."""
    rows, inputs = lut.shape[0], x.shape[-1]
    flat = x.reshape(-1, inputs)
    result = x.new_empty(*x.shape[:-1], rows)
    y = result.view(-1, rows)
    config = None
    if overlay is None or _worth_a_product(flat.shape[0], rows * inputs):
        config = choose(_capability(x.device.index), tiles.shape[2] // 64, flat.shape[0], rows, inputs)
    if isinstance(config, PrefillConfig) and prefill() is None:
        config = None
    with launching_on(x.device):
        if config is None:
            linear_by_chunks(flat, tiles, lut, bias, y, overlay)
        else:
            launch(_aligned(flat), tiles, lut, bias, y, config)
            if overlay is not None:
                add_product(y, flat, *overlay)
    return result


def _worth_a_product(tokens: int, weights: int) -> bool:
    """Whether an overlay is faster multiplied by itself than added to expanded rows."""
    return tokens <= (256 if weights > 2**25 else 64)


def launch(x: Tensor, tiles: Tensor, lut: Tensor, bias: Tensor | None, y: Tensor, config: Config) -> None:
    """Compute y ``[M, N]``, contiguous, from x ``[M, K]`` with aligned rows (:func:`_aligned`)."""
    if isinstance(config, PrefillConfig):
        _launch_prefill(x, tiles, lut, bias, y, config)
    elif isinstance(config, MatrixConfig):
        _launch_matrix(x, tiles, lut, bias, y, config)
    else:
        _launch_vector(x, tiles, lut, bias, y, config)


def _launch_vector(x: Tensor, tiles: Tensor, lut: Tensor, bias: Tensor | None, y: Tensor, config: VectorConfig) -> None:
    lut, convert, converted = _codebook(lut, x.dtype)
    converted = converted or not tiles.is_contiguous()
    tiles = tiles.contiguous()
    tokens, rows, inputs = x.shape[0], lut.shape[0], x.shape[1]
    grid = (-(-rows // (16 * config.row_tiles)), -(-tokens // (8 * config.token_tiles)))
    # What was converted a moment ago must not be read ahead of the conversion's end.
    overlap = 0 if converted else config.overlap
    vector_kernel[grid](
        x, tiles, lut, lut if bias is None else bias.contiguous(), y, tokens, rows, inputs, x.stride(0) // 8,
        BITS=tiles.shape[2] // 64, ROW_TILES=config.row_tiles, TOKEN_TILES=config.token_tiles, UNROLL=config.unroll,
        WARPS=config.warps, BF16=x.dtype == torch.bfloat16, CONVERT=convert, HAS_BIAS=bias is not None,
        EVEN=inputs % (128 * config.warps * config.unroll) == 0, PDL=overlap,
        AHEAD=config.ahead, ASM=True,
        num_warps=config.warps, launch_pdl=overlap > 0,
    )  # fmt: skip


def _launch_matrix(x: Tensor, tiles: Tensor, lut: Tensor, bias: Tensor | None, y: Tensor, config: MatrixConfig) -> None:
    lut, convert, _ = _codebook(lut, x.dtype)
    tokens, rows, inputs = x.shape[0], lut.shape[0], x.shape[1]
    split = config.splits > 1
    parts = torch.empty(config.splits, tokens, rows, device=x.device) if split else y
    matrix_kernel[(-(-rows // (16 * config.warps)), -(-tokens // config.tokens), config.splits)](
        x, tiles.contiguous(), lut, lut if bias is None else bias.contiguous(), parts, tokens, rows, inputs,
        x.stride(0) // 8,
        BITS=tiles.shape[2] // 64, TOKENS=config.tokens, WARPS=config.warps, STAGES=config.stages,
        BF16=x.dtype == torch.bfloat16, CONVERT=convert, HAS_BIAS=bias is not None and not split, ASM=True,
        num_warps=config.warps,
    )  # fmt: skip
    if split:
        _add_splits(parts, bias, y)


def _launch_prefill(
    x: Tensor, tiles: Tensor, lut: Tensor, bias: Tensor | None, y: Tensor, config: PrefillConfig
) -> None:
    kernels = prefill()
    if kernels is None:
        raise RuntimeError("This Triton has no Gluon for Hopper, which the kernel for many tokens is written in.")
    lut, convert, _ = _codebook(lut, x.dtype)
    tokens, rows, inputs = x.shape[0], lut.shape[0], x.shape[1]
    blocks = tiles.shape[1]
    # As many as have a block each.
    splits = -(-blocks // -(-blocks // min(config.splits, blocks)))
    split = splits > 1
    parts = torch.empty(splits, tokens, rows, device=x.device) if split else y
    works = -(-rows // (16 * _PREFILL["WARPS"])) * -(-tokens // _PREFILL["TOKENS"]) * splits
    kernels.prefill_kernel[(min(works, _multiprocessors(x.device.index)),)](
        kernels.describe_inputs(x, _PREFILL["TOKENS"]), tiles.contiguous(), lut,
        lut if bias is None else bias.contiguous(), parts, tokens, rows, inputs, splits,
        BITS=tiles.shape[2] // 64, BF16=x.dtype == torch.bfloat16, CONVERT=convert,
        HAS_BIAS=bias is not None and not split, **_PREFILL, num_warps=_PREFILL["WARPS"],
    )  # fmt: skip
    if split:
        _add_splits(parts, bias, y)


def _add_splits(parts: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """y ``[M, N]`` = parts ``[splits, M, N]`` + bias, in order."""
    splits, tokens, rows = parts.shape
    add_splits_kernel[(-(-tokens * rows // 1024),)](
        parts, y if bias is None else bias.contiguous(), y, tokens * rows, rows, splits,
        HAS_BIAS=bias is not None, BLOCK=1024,
    )  # fmt: skip


@functools.cache
def prefill() -> ModuleType | None:
    """The module of the kernel for many tokens, or None where this Triton has no Gluon, which is experimental."""
    try:
        return importlib.import_module(".prefill_kernel", __package__)
    except (ImportError, AttributeError):
        logger.info("Triton %s has no Gluon for Hopper; many tokens take a dense product.", triton.__version__)
        return None


def dequantize(tiles: Tensor, lut: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    """The dense matrix ``[N, in_features]`` in fp16 or bf16."""
    padded = -(-in_features // 8) * 8
    dense = torch.empty(lut.shape[0], padded, dtype=dtype, device=tiles.device)
    with launching_on(tiles.device):
        _launch_dequantize(tiles, lut, dense)
    return dense if padded == in_features else dense[:, :in_features].contiguous()


def _launch_dequantize(tiles: Tensor, lut: Tensor, dense: Tensor) -> None:
    lut, convert, _ = _codebook(lut, dense.dtype)
    tiles = tiles.contiguous()
    warps = 4
    dequantize_kernel[(tiles.shape[0], -(-tiles.shape[1] // warps))](
        tiles, lut, dense.view(torch.int32), lut.shape[0], dense.shape[1], dense.shape[1] // 8,
        BITS=tiles.shape[2] // 64, WARPS=warps, CONVERT=convert, ASM=True, num_warps=warps,
    )  # fmt: skip


def linear_by_chunks(
    x: Tensor, tiles: Tensor, lut: Tensor, bias: Tensor | None, y: Tensor, overlay: Overlay = None
) -> None:
    """Expand some rows and multiply them with a dense product, over and over in one buffer."""
    padded = -(-x.shape[1] // 8) * 8
    x = F.pad(x, (0, padded - x.shape[1])) if padded != x.shape[1] else x
    step = min(tiles.shape[0], _DENSE_ROWS // 16)
    buffer = torch.empty(16 * step, padded, dtype=x.dtype, device=x.device)
    for start in range(0, tiles.shape[0], step):
        rows = slice(16 * start, min(16 * (start + step), lut.shape[0]))
        dense = buffer[: rows.stop - rows.start]
        _launch_dequantize(tiles[start : start + step], lut[rows], dense)
        if overlay is not None:
            add_to_dense(dense, overlay[0][rows], overlay[1][rows])
        if bias is None:
            torch.mm(x, dense.mT, out=y[:, rows])
        else:
            torch.addmm(bias[rows].to(x.dtype), x, dense.mT, out=y[:, rows])


def _aligned(x: Tensor) -> Tensor:
    """x, or a copy of it, whose rows are contiguous, a multiple of 8 elements apart and begin at 16 bytes."""
    inputs = x.shape[1]
    if inputs % 8:
        return F.pad(x, (0, -inputs % 8))
    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        return x.contiguous() if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)
    return x


def _codebook(lut: Tensor, dtype: torch.dtype) -> tuple[Tensor, bool, bool]:
    """The codebook as the kernels take it, whether they must convert it to bf16, and whether it was converted here."""
    converted = lut.dtype not in (dtype, torch.float16) or not lut.is_contiguous()
    if converted:
        lut = lut.to(dtype).contiguous()
    return lut, lut.dtype != dtype, converted


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def works(device: torch.device) -> bool:
    """Whether a small product comes out right.

    The kernels rely on the order in which Triton spreads a tensor over threads, which no documentation promises.
    """
    try:
        with torch.cuda.device(device), torch.inference_mode():
            codes = torch.arange(32 * 1024, device=device).mul(40503).bitwise_right_shift(7).bitwise_and(7)
            weight = pack_codes(codes.view(32, 1024).to(torch.uint8), 3)
            lut = torch.linspace(-1, 1, 256, device=device, dtype=torch.float16).view(32, 8)
            x = torch.linspace(-1, 1, 3 * 1024, device=device, dtype=torch.float16).sin().view(3, 1024)
            y = torch.full((3, 32), torch.nan, device=device, dtype=torch.float16)
            tiles = pack_tiles(weight, 1024)
            launch(x, tiles, lut, None, y, VectorConfig(1, 1, 1, 4, 0, 0))
            dense = lut_dequantize(weight, lut, 1024, torch.float16)
            expected, bound = x.double() @ dense.double().mT, x.double().abs() @ dense.double().abs().mT
            # The result is rounded to fp16 (twice what that may cost), the sum of 1024 products to fp32 at every step.
            right = ((y.double() - expected).abs() <= 2.0**-10 * expected.abs() + 1024 * 2.0**-23 * bound).all()
            return bool(right) and torch.equal(dequantize(tiles, lut, 1024, torch.float16), dense)
    except Exception:
        logger.warning("The tensor-core kernels failed their self-test on %s", device, exc_info=True)
        return False
