"""Quantized products against fp16 cuBLAS on a GPU, layer by layer, in one run.

    python benchmarks/kernel_speed.py --output kernels.json --picture roofline.png

Prints, for one token and every shape, the time, its ratio to fp16 and the part of the measured read bandwidth that it
reaches; then the ratios over the number of tokens. CUDA graphs, medians, weights rotated beyond L2 (see gpu_timing.py).
With ``--outliers 0.0045`` also what that share of outliers adds to every product.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from gpu_timing import copies, graph_time, random_layer, random_overlay, read_bandwidth

from hf_guidedquant.formats.lut import outliers_per_row
from hf_guidedquant.triton_kernels import lut_linear_tiled

BITS = (2, 3, 4)
SHAPES = [
    (4096, 4096), (14336, 4096), (28672, 4096), (4096, 14336), (8192, 28672),
    (4096, 1024), (6144, 1024), (1024, 2048), (1024, 3072),
    (960, 576), (576, 576), (3072, 576), (576, 1536),
]  # fmt: skip
SWEPT = [(28672, 4096), (4096, 4096), (4096, 14336)]


def measure(rows: int, inputs: int, counts: list[int], replays: int, share: float = 0) -> list[dict[str, Any]]:
    """Microseconds of fp16 and of every bit width, for every number of tokens; and with a share of outliers."""
    results = []
    dense = [torch.randn(rows, inputs, dtype=torch.float16, device="cuda") for _ in range(copies(2 * rows * inputs))]
    layers = {bits: random_layer(bits, rows, inputs, copies(rows * inputs * bits // 8)) for bits in BITS}
    overlays = {
        bits: [random_overlay(rows, inputs, outliers_per_row(inputs, share)) for _ in matrices]
        for bits, (matrices, _) in layers.items()
        if share
    }
    for tokens in counts:
        x = torch.randn(tokens, inputs, dtype=torch.float16, device="cuda")
        products: dict[int, list[Callable[[], object]]] = {
            16: [partial(torch.nn.functional.linear, x, weight) for weight in dense]
        }
        for bits, (matrices, lut) in layers.items():
            products[bits] = [partial(lut_linear_tiled, x, tiles, lut) for tiles in matrices]
        sparse: dict[int, list[Callable[[], object]]] = {}
        for bits, pairs in overlays.items():
            matrices, lut = layers[bits]
            sparse[bits] = [
                partial(lut_linear_tiled, x, tiles, lut, None, *pair)
                for tiles, pair in zip(matrices, pairs, strict=True)
            ]
        times, with_outliers = (
            {bits: graph_time(calls if tokens <= 64 else calls[:8], replays) for bits, calls in kind.items()}
            for kind in (products, sparse)
        )
        results.append({"rows": rows, "inputs": inputs, "tokens": tokens, "us": times, "us_outliers": with_outliers})
    return results


def layer_bytes(rows: int, inputs: int, bits: int) -> float:
    """Bytes of a layer's weights and codebooks."""
    return rows * inputs * bits / 8 + (rows * 2**bits * 2 if bits < 16 else 0)


def show_one_token(results: Iterable[dict[str, Any]], bandwidth: float) -> None:
    print("\n|  N x K, one token | fp16 us |" + "".join(f" {bits}-bit us | ratio | of bandwidth |" for bits in BITS))
    print("|---|---|" + "---|---|---|" * len(BITS), flush=True)
    for result in results:
        rows, inputs, us = result["rows"], result["inputs"], result["us"]
        line = f"| {rows} x {inputs} | {us[16]:.2f} |"
        for bits in BITS:
            part = layer_bytes(rows, inputs, bits) / (us[bits] * 1e-6) / bandwidth
            line += f" {us[bits]:.2f} | {us[16] / us[bits]:.2f} | {part:.0%} |"
        print(line, flush=True)


def show_sweep(shapes: Iterable[list[dict[str, Any]]], counts: list[int]) -> None:
    """Of every shape its results, in order of the counts."""
    print("\n| ratio to fp16 | bits |" + "".join(f" {count} |" for count in counts))
    print("|---|---|" + "---|" * len(counts), flush=True)
    for results in shapes:
        for bits in BITS:
            ratios = "".join(f" {result['us'][16] / result['us'][bits]:.2f} |" for result in results)
            print(f"| {results[0]['rows']} x {results[0]['inputs']} | {bits} |{ratios}", flush=True)


def show_outliers(results: list[dict[str, Any]], share: float) -> None:
    print(f"\n| {share:.2%} outliers, N x K | tokens | a row |" + "".join(f" {b}-bit us | added |" for b in BITS))
    print("|---|---|---|" + "---|---|" * len(BITS))
    for result in results:
        line = f"| {result['rows']} x {result['inputs']} | {result['tokens']} |"
        line += f" {outliers_per_row(result['inputs'], share)} |"
        for bits in BITS:
            without, with_them = result["us"][bits], result["us_outliers"][bits]
            line += f" {with_them:.2f} | {with_them - without:.2f} ({with_them / without - 1:.0%}) |"
        print(line, flush=True)


def draw(results: list[dict[str, Any]], bandwidth: float, device: str, path: Path) -> None:
    """Roofline: products per byte of weights against products per second, one line per bit width.

    The roof is what the read bandwidth allows for, up to the best rate of the dense products.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves: dict[int, list[tuple[float, float]]] = {bits: [] for bits in (16, *BITS)}
    for bits, points in curves.items():
        for result in results:
            operations = 2 * result["tokens"] * result["rows"] * result["inputs"]
            weights = layer_bytes(result["rows"], result["inputs"], bits)
            points.append((operations / weights, operations / result["us"][bits] * 1e-6))
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for bits, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", label="fp16, cuBLAS" if bits == 16 else f"{bits} bit")
    best = max(rate for _, rate in curves[16])
    corner = best * 1e12 / bandwidth
    roof = [(i, min(best, i * bandwidth * 1e-12)) for i in (0.5, corner, axes.dataLim.x1)]
    axes.plot(*zip(*roof, strict=True), "k--", lw=1, label="read bandwidth, best dense rate")
    axes.set(xscale="log", yscale="log", xlabel="operations per byte of weights", ylabel="TFLOP/s")
    rows, inputs = results[0]["rows"], results[0]["inputs"]
    counts = [result["tokens"] for result in results]
    axes.set_title(f"{rows} x {inputs}, {counts[0]} to {counts[-1]} tokens, {device}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    options = parse()
    bandwidth, device = read_bandwidth(), torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, {bandwidth / 1e12:.2f} TB/s read", flush=True)
    share = options.outliers
    content = {"device": device, "torch": torch.__version__, "bandwidth": bandwidth}
    one_token: list[dict[str, Any]] = []
    swept: list[dict[str, Any]] = []

    def measured(shapes: list[tuple[int, int]], counts: list[int], kept: list[dict[str, Any]]) -> Iterator[list]:
        """Results of shape after shape; what there is so far is in the file, should the run be cut off."""
        for shape in shapes:
            found = measure(*shape, counts, options.replays, share)
            kept += found
            if options.output:
                options.output.write_text(json.dumps(content | {"one_token": one_token, "swept": swept}, indent=1))
            yield found

    show_one_token(chain.from_iterable(measured(SHAPES, [1], one_token)), bandwidth)
    show_sweep(measured(SWEPT, options.tokens, swept), options.tokens)
    if share:
        show_outliers(one_token + [result for result in swept if result["tokens"] > 1], share)
    if options.picture:
        draw([r for r in swept if (r["rows"], r["inputs"]) == SWEPT[0]], bandwidth, device, options.picture)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
    parser.add_argument("--tokens", type=int, nargs="+", default=default, help="numbers of tokens for the sweep")
    parser.add_argument("--outliers", type=float, default=0.0, help="share of outliers whose cost to measure as well")
    parser.add_argument("--replays", type=int, default=12, help="graph replays that a median is of")
    parser.add_argument("--output", type=Path, help="JSON to write")
    parser.add_argument("--picture", type=Path, help="PNG of a roofline to write")
    return parser.parse_args()


if __name__ == "__main__":
    main()
