"""How to launch a product: the measured choices of `launch_table.py`, and a rule for what is not among them."""

import functools
import math
from typing import NamedTuple

from .launch_table import CHOICES


class VectorConfig(NamedTuple):
    """Launch parameters of `vector_kernel`."""

    row_tiles: int  # 16 rows each, for every program
    token_tiles: int  # 8 tokens each, for every program
    unroll: int  # blocks of 128 inputs that a warp has under way
    warps: int  # that share out the inputs of a program's rows
    overlap: int  # with the kernels before and after: PDL of the kernel
    ahead: int  # 1: activations are fetched a block of inputs ahead


class MatrixConfig(NamedTuple):
    """Launch parameters of `matrix_kernel`."""

    warps: int  # 16 rows each
    tokens: int  # for every program
    stages: int  # blocks of 128 inputs under way
    splits: int  # of the inputs


class PrefillConfig(NamedTuple):
    """Launch parameters of `prefill_kernel`."""

    splits: int  # of the inputs


Config = VectorConfig | MatrixConfig | PrefillConfig


@functools.lru_cache(maxsize=4096)
def choose(capability: tuple[int, int], bits: int, tokens: int, rows: int, inputs: int) -> Config | None:
    """The launch parameters for a product, or None if a dense matrix and a dense product are faster.

    That of the measured shape which is nearest in log rows and log inputs, among those for as many tokens or the next
    larger count measured; the largest count stands for more as well. `matrix_kernel` and `prefill_kernel` are for
    Hopper alone; GPUs older than that cannot overlap kernels.
    """
    measured = table()[bits]
    count = next((count for count in sorted(measured) if count >= tokens), max(measured))
    shapes = {
        shape: config
        for shape, config in measured[count].items()
        if capability[0] == 9 or not isinstance(config, MatrixConfig | PrefillConfig)
    }
    if not shapes:
        return None
    config = shapes[min(shapes, key=lambda s: abs(math.log(s[0] / rows)) + abs(math.log(s[1] / inputs)))]
    if not isinstance(config, VectorConfig):
        return config
    unroll = config.unroll
    while unroll > 1 and config.warps * unroll * 128 >= 2 * inputs:
        unroll //= 2
    return config._replace(unroll=unroll, overlap=config.overlap if capability >= (9, 0) else 0)


@functools.cache
def table() -> dict[int, dict[int, dict[tuple[int, int], Config | None]]]:
    """Bits -> largest number of tokens -> (rows, inputs) -> launch parameters."""
    result: dict[int, dict[int, dict[tuple[int, int], Config | None]]] = {}
    for bits, tokens, rows, inputs, *config in CHOICES:
        shapes = result.setdefault(bits, {}).setdefault(tokens, {})
        shapes[rows, inputs] = _KINDS[len(config)](*config) if config else None
    return result


_KINDS: dict[int, type[Config]] = {len(kind._fields): kind for kind in (VectorConfig, MatrixConfig, PrefillConfig)}
