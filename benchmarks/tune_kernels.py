"""Find the fastest launch parameters of the tensor-core kernels and write them to `launch_table.py`.

    python benchmarks/tune_kernels.py --output triton_kernels/torch-ext/guidedquant_lut/launch_table.py

Times every candidate on every shape (about two minutes on an H100, compiling included).
Token counts that are not asked for keep what the table has. Without `--output` it only prints.
"""

import argparse
import itertools
import json
import multiprocessing
import time
from functools import partial
from pathlib import Path

import torch
from gpu_timing import copies, graph_time, random_layer

from hf_guidedquant.triton_kernels import tensor_core
from hf_guidedquant.triton_kernels.configs import Config, MatrixConfig, PrefillConfig, VectorConfig
from hf_guidedquant.triton_kernels.launch_table import CHOICES

BITS = (2, 3, 4)
# Linear layers, fused where they would be, of SmolLM2-135M, Qwen3-0.6B, Llama-3.1-8B and -70B.
SHAPES = [
    (576, 576), (960, 576), (3072, 576), (576, 1536),
    (4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072),
    (1024, 4096), (4096, 4096), (6144, 4096), (14336, 4096), (28672, 4096), (4096, 14336),
    (8192, 8192), (8192, 28672),
]  # fmt: skip

TABLE = '''\
"""Measured launch parameters of the tensor-core kernels. Written by `benchmarks/tune_kernels.py`; not by hand."""

DEVICE = "{}"
TORCH = "{}"

# Bits, tokens at most, rows, inputs, then the fields of a launch in configs.py; without them a dense product is faster.
# fmt: off
CHOICES: list[tuple[int, ...]] = [
{}]
# fmt: on
'''


def candidates(tokens: int, rows: int, inputs: int) -> list[Config]:
    """What to try for a product."""
    return [
        *vector_candidates(tokens),
        *matrix_candidates(tokens, rows, inputs),
        *prefill_candidates(tokens, rows, inputs),
    ]


def vector_candidates(tokens: int) -> list[VectorConfig]:
    """Row tiles, token tiles, unroll, warps, overlap, ahead."""
    if tokens <= 8:
        shapes = [(1, 4, 8), (1, 2, 8), (1, 1, 8), (1, 4, 4), (1, 2, 4), (2, 1, 4), (2, 2, 4), (2, 1, 8), (1, 2, 16)]
        ahead = [(1, 1, 8), (1, 2, 4), (1, 4, 8), (2, 1, 8), (2, 2, 4), (2, 2, 8)]
        overlaps = (0, 1, 2) if tokens == 1 else (0, 1)
        plain = [VectorConfig(r, 1, u, w, o, 0) for r, u, w in shapes for o in overlaps]
        return plain + [VectorConfig(r, 1, u, w, o, 1) for r, u, w in ahead for o in overlaps[1:]]
    if tokens <= 16:
        shapes = [(1, 2, 8), (1, 1, 8), (1, 2, 4), (2, 1, 4), (2, 1, 8), (4, 1, 4)]
        return [VectorConfig(r, 2, u, w, o, 0) for r, u, w in shapes for o in (0, 1)]
    if tokens <= 32:
        shapes = [(1, 1, 8), (1, 1, 4), (2, 1, 4), (2, 1, 8), (1, 2, 8)]
        return [VectorConfig(r, 4, u, w, o, 0) for r, u, w in shapes for o in (0, 1)]
    if tokens <= 64:
        shapes = [(2, 4, 4), (2, 4, 8), (2, 8, 4), (1, 8, 4), (2, 8, 2), (1, 4, 8)]
        return [VectorConfig(r, t, 1, w, 0, 0) for r, t, w in shapes]
    return []


def matrix_candidates(tokens: int, rows: int, inputs: int) -> list[MatrixConfig]:
    """Warps, tokens, stages, and as many splits as keep the GPU busy."""
    if tokens > 256:
        return []
    result = []
    for width in (16, 32, 64, 128):
        if width < min(tokens, 128) / 2 or width >= 2 * tokens:
            continue
        for warps, stages in ((4, 3), (4, 4), (8, 3)) if width < 128 else ((4, 3), (8, 3)):
            programs = -(-rows // (16 * warps)) * -(-tokens // width)
            splits = [n for n in (1, 2, 4, 8, 16) if n == 1 or (programs * n <= 800 and 256 * n <= inputs)]
            result += [MatrixConfig(warps, width, stages, n) for n in splits if n == splits[-1] or programs * n >= 128]
    return result


def prefill_candidates(tokens: int, rows: int, inputs: int) -> list[PrefillConfig]:
    """Splits, as many as keep the GPU busy."""
    if tokens < 128 or torch.cuda.get_device_capability()[0] != 9 or tensor_core.prefill() is None:
        return []
    programs = -(-rows // 128) * -(-tokens // 256)
    return [PrefillConfig(n) for n in (1, 2, 4, 8) if n == 1 or (programs * n <= 300 and 256 * n <= inputs)]


def compile_one(job: tuple[int, int, int, int, Config]) -> None:
    bits, rows, inputs, tokens, config = job
    tiles, lut = random_layer(bits, rows, inputs, 1)
    x, y = (torch.zeros(tokens, n, dtype=torch.float16, device="cuda") for n in (inputs, rows))
    tensor_core.launch(x, tiles[0], lut, None, y, config)
    torch.cuda.synchronize()


def compile_all(counts: list[int]) -> None:
    """Fill Triton's cache in several processes: once with masks and once without."""
    jobs = set()
    for bits, (rows, inputs), tokens in itertools.product(BITS, SHAPES, counts):
        for config in candidates(tokens, rows, inputs):
            if isinstance(config, VectorConfig):
                jobs |= {(bits, 16, length, tokens, config) for length in (128, 128 * config.warps * config.unroll)}
            elif isinstance(config, PrefillConfig):
                jobs |= {(bits, 16, 256, 16, PrefillConfig(splits)) for splits in (1, 2)}
            else:
                jobs.add((bits, 16, 128, 16, config._replace(splits=min(config.splits, 2))))
    with multiprocessing.get_context("spawn").Pool(14) as pool:
        pool.map(compile_one, sorted(jobs), chunksize=1)


def main() -> None:
    options = parse()
    begin = time.perf_counter()
    compile_all(options.tokens)
    print(f"compiled in {time.perf_counter() - begin:.0f} s", flush=True)
    choices, everything = [], []
    for rows, inputs in SHAPES:
        count = min(512, copies(2 * rows * inputs))
        dense = [torch.randn(rows, inputs, dtype=torch.float16, device="cuda") for _ in range(count)]
        for tokens in options.tokens:
            x = torch.randn(tokens, inputs, dtype=torch.float16, device="cuda")
            y = torch.empty(tokens, rows, dtype=torch.float16, device="cuda")
            reference = graph_time([partial(torch.nn.functional.linear, x, weight) for weight in dense], 6)
            line = f"{rows:6}x{inputs:<6} M {tokens:4}  fp16 {reference:7.2f} us"
            for bits in BITS:
                matrices, lut = random_layer(bits, rows, inputs, min(512, copies(rows * inputs * bits // 8)))
                times: dict[Config | None, float] = {}
                for config in candidates(tokens, rows, inputs):
                    calls = [partial(tensor_core.launch, x, tiles, lut, None, y, config) for tiles in matrices]
                    times[config] = graph_time(calls, 6)
                if tokens >= 64:
                    calls = [partial(tensor_core.linear_by_chunks, x, tiles, lut, None, y) for tiles in matrices[:8]]
                    times[None] = graph_time(calls, 6)
                best = min(times, key=times.__getitem__)
                choices.append([bits, tokens, rows, inputs, *(best or ())])
                everything.append([bits, tokens, rows, inputs, reference, [[t, c] for c, t in times.items()]])
                line += f" | {bits}-bit {times[best]:7.2f} {reference / times[best]:5.2f}x {tuple(best or ())}"
            print(line, flush=True)
    if options.output:
        choices += [list(choice) for choice in CHOICES if choice[1] not in options.tokens]
        lines = "".join(f"    {tuple(choice)},\n" for choice in sorted(choices))
        options.output.write_text(TABLE.format(torch.cuda.get_device_name(), torch.__version__, lines))
    if options.timings:
        options.timings.write_text(json.dumps(everything))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=[1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096],
        help="token counts",
    )
    parser.add_argument("--output", type=Path, help="launch_table.py to write")
    parser.add_argument("--timings", type=Path, help="JSON of all timings")
    return parser.parse_args()


if __name__ == "__main__":
    main()
