"""The whole job on a model with random weights: seconds of every stage, tokens per second, memory, and the file.

    python benchmarks/quantize.py --model llama-3.1-8b --bits 2
    python benchmarks/quantize.py --model llama-3.1-8b --bits 2 --memory 24
    python benchmarks/quantize.py --model llama-3.1-8b --bits 2 --memory 12 --weights-on cpu
    python benchmarks/quantize.py --model llama-3.1-70b --layers 2 --num-samples 8

With `--layers` the model has fewer decoder layers, and what is printed goes for those; two runs with different numbers
tell what a layer costs. Weights and tokens are random: time and memory do not depend on them, quality does.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from models import CONFIGS, random_model
from tqdm.auto import tqdm

import hf_guidedquant
from hf_guidedquant import GuidedQuantConfig
from hf_guidedquant.linears import is_linear, linear_shape


def matrix_rate() -> float:
    """Operations per second of a large bf16 product."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(12):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        torch.mm(a, b)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return 2 * 8192**3 / sorted(times)[len(times) // 2]


def pass_operations(model: Any, num_groups: int) -> float:
    """Operations of a token's forward pass, its gradients of activations, and its Gram products, attention left out."""
    shapes = [linear_shape(module) for module in model.modules() if is_linear(module)]
    head = linear_shape(model.get_output_embeddings())
    products = sum(rows * inputs for rows, inputs in shapes)
    grams = num_groups * (sum(inputs**2 for _, inputs in shapes) - head[1] ** 2)
    # A Gram matrix is symmetric: half of it is all there is to compute. Recomputation is no part of the job.
    return 2 * products * 2 + grams


class Promises:
    """While entered, notes what every progress bar says after its first tenth, and how it came: (title, said, took)."""

    def __enter__(self) -> list[tuple[str, float, float]]:
        self.kept: list[tuple[str, float, float]] = []
        self.own = own_update, own_close = tqdm.update, tqdm.close
        said: dict[Any, float] = {}

        def update(bar: Any, n: float = 1) -> Any:
            result = own_update(bar, n)
            if bar.total and bar not in said and bar.n >= bar.total / 10:
                now = bar.format_dict
                rate = now["rate"] or now["n"] / now["elapsed"]
                said[bar] = now["elapsed"] + (bar.total - bar.n) / rate
            return result

        def close(bar: Any) -> None:
            if bar in said:
                self.kept.append((bar.desc, said.pop(bar), bar.format_dict["elapsed"]))
            own_close(bar)

        tqdm.update, tqdm.close = update, close
        return self.kept

    def __exit__(self, *error: object) -> None:
        tqdm.update, tqdm.close = self.own


def main() -> None:
    options = parse()
    cuda = options.device == "cuda"
    dtype = getattr(torch, options.dtype)
    start = time.perf_counter()
    model = random_model(options.model, dtype, options.device, options.layers)
    built = time.perf_counter() - start
    vocabulary = model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(vocabulary, (options.seq_len,), generator=generator) for _ in range(options.num_samples)]
    operations = pass_operations(model, options.num_groups)
    dense_bytes = sum(parameter.nbytes for parameter in model.parameters())
    config = GuidedQuantConfig(
        bits=options.bits,
        dataset=rows,
        seq_len=options.seq_len,
        num_samples=options.num_samples,
        num_groups=options.num_groups,
        reconstruct=options.reconstruct,
        distill=options.distill,
    )
    model.to(options.weights_on or options.device)
    if cuda:
        torch.cuda.empty_cache()
        if options.memory:
            torch.cuda.set_per_process_memory_fraction(
                options.memory * 2**30 / torch.cuda.get_device_properties(0).total_memory
            )
    forecast = hf_guidedquant.plan(model, config)
    print(forecast.table(), flush=True)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with Promises() as promises:
        model = hf_guidedquant.quantize(model, config)
    report = model.quantization_report
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved_bytes = sum(path.stat().st_size for path in Path(folder).iterdir())
    seconds = {"build": built, **report.seconds, "save": time.perf_counter() - start}
    tokens = options.num_samples * options.seq_len
    name = torch.cuda.get_device_name() if cuda else "CPU"
    layers = model.config.num_hidden_layers
    size = f"{options.num_samples} x {options.seq_len} tokens"
    print(f"\n{options.model}, {layers} layers, {options.bits} bits, {size}, {name}")
    for stage, value in seconds.items():
        print(f"  {stage:14} {value:8.1f} s")
    rate = tokens * operations / report.seconds["calibration"]
    print(f"  calibration: {tokens / report.seconds['calibration']:.0f} tokens/s, {rate / 1e12:.0f} TFLOP/s", end="")
    print(f" = {rate / matrix_rate():.0%} of a bf16 product's" if cuda else "")
    sizes = {"peak GPU memory": peak, "weights before": dense_bytes, "files": saved_bytes}
    expected = ", ".join(f"{stage} {value:.0f} s" for stage, value in forecast.seconds.items())
    print(f"  planned: {expected}, {forecast.memory.get('cuda:0', 0) / 2**30:.2f} GiB")
    print("  " + ", ".join(f"{what} {nbytes / 2**30:.2f} GiB" for what, nbytes in sizes.items()))
    for title, said, took in promises:
        print(f"  {title}: {said:.1f} s, said the bar after a tenth; it took {took:.1f} s ({said / took - 1:+.0%})")
    if options.output:
        result = vars(options) | {"output": None, "device_name": name, "seconds": seconds, "peak_bytes": peak}
        result |= {"planned_seconds": forecast.seconds, "planned_bytes": forecast.memory, "segments": forecast.segments}
        result["promises"] = promises
        options.output.write_text(json.dumps(result | {"saved_bytes": saved_bytes, "rate": rate}, indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(CONFIGS), default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="decoder layers; all by default")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--num-groups", type=int, default=1)
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--reconstruct", action="store_true", help="train block by block afterwards")
    parser.add_argument("--distill", action="store_true", help="train codebooks end to end afterwards")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--weights-on", choices=["cpu", "cuda"], help="where the weights wait for their turn")
    parser.add_argument("--memory", type=float, help="GiB of GPU memory to get along with")
    parser.add_argument("--output", type=Path, help="JSON to write")
    return parser.parse_args()


if __name__ == "__main__":
    main()
