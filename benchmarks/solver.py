"""Seconds of LNQ on a GPU: the fused solver and the plain torch loop over the inputs, in one run.

    python benchmarks/solver.py --bits 2 3 4 --output solver.json

Random weights; the Hessian of 2 K random samples of which some inputs are large. Arithmetic is reproducible, as it is
when a model is quantized: torch's deterministic kernels can take longer. Prints, for every shape and bit width,
the seconds of a whole solve and of the plain loop, their ratio, the parts of the solve that k-means, sweeps, descent
and codebook steps take, and the final objectives. Then the sum over the linears of Llama-3.1-8B, a shape at a time.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_guidedquant.resources import reproducible
from hf_guidedquant.solvers import Solution, SolverSpec, gptq, kmeans, lnq, quadratic
from hf_guidedquant.solvers.hessian import condition
from hf_guidedquant.triton_kernels import set_backend

# Rows x inputs -> linears of that shape in Llama-3.1-8B.
LLAMA_8B = {(4096, 4096): 64, (1024, 4096): 64, (14336, 4096): 64, (4096, 14336): 32}
OUTLIERS = 97  # every so many inputs, one is ten times larger


def problem(rows: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight [1, rows, inputs]`` and ``hessian [1, inputs, inputs]``."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(2 * inputs, inputs, generator=generator, device="cuda")
    x[:, ::OUTLIERS] *= 10
    weight = torch.randn(1, rows, inputs, generator=generator, device="cuda") * 0.02
    return weight, condition((x.mT @ x).unsqueeze(0), "benchmark")[0]


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    result = call()
    torch.cuda.synchronize()
    return time.perf_counter() - begin, result


class Parts:
    """While entered, the parts of a solve add their seconds to ``spent``."""

    places: tuple[tuple[Any, str, str], ...] = (
        (kmeans, "cluster", "k-means"),
        (gptq.Sweep, "codes", "sweep"),
        (quadratic.Problem, "assign", "descent"),
        (quadratic.Problem, "fit_codebook", "codebook"),
    )

    def __enter__(self) -> "Parts":
        self.spent: dict[str, float] = defaultdict(float)
        self.originals = [getattr(owner, name) for owner, name, _ in self.places]
        for (owner, name, part), original in zip(self.places, self.originals, strict=True):
            setattr(owner, name, self._timed(original, part))
        return self

    def __exit__(self, *error: object) -> None:
        for (owner, name, _), original in zip(self.places, self.originals, strict=True):
            setattr(owner, name, original)

    def _timed(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            spent, result = seconds(lambda: call(*arguments))
            self.spent[part] += spent
            return result

        return timed


def measure(rows: int, inputs: int, bits: int, sweeps: int, repeats: int, plain: bool) -> dict[str, Any]:
    """Times of one shape and bit width; the first solve, which compiles, is not counted."""
    weight, hessian = problem(rows, inputs)
    spec = SolverSpec(bits, lnq_sweeps=sweeps)

    def solve() -> Solution:
        return lnq.solve(weight, hessian, spec)

    solve()
    times = sorted(seconds(solve)[0] for _ in range(repeats))
    with Parts() as parts:
        _, solution = seconds(solve)
    result: dict[str, Any] = {"rows": rows, "inputs": inputs, "bits": bits, "parts": dict(parts.spent)}
    result["seconds"] = times[len(times) // 2]
    result["objective"] = float(solution.objectives["lnq"].sum())
    if plain:
        set_backend("torch")
        result["plain_seconds"], solution = seconds(solve)
        result["plain_objective"] = float(solution.objectives["lnq"].sum())
        set_backend("auto")
    return result


def show(result: dict[str, Any]) -> None:
    parts, total = result["parts"], result["seconds"]
    shares = "".join(f" {parts.get(part, 0) / total:.0%} |" for part in ("k-means", "sweep", "descent", "codebook"))
    line = f"| {result['rows']} x {result['inputs']} | {result['bits']} | {total:.3f} |"
    if "plain_seconds" in result:
        plain = result["plain_seconds"]
        line += f" {plain:.2f} | {plain / total:.0f} |{shares} {result['objective'] / result['plain_objective']:.5f} |"
    else:
        line += f" | |{shares} |"
    print(line, flush=True)


def show_sum(results: list[dict[str, Any]]) -> None:
    """Seconds for all linears of Llama-3.1-8B, from those of each shape."""
    for bits in sorted({result["bits"] for result in results}):
        mine = {(r["rows"], r["inputs"]): r["seconds"] for r in results if r["bits"] == bits}
        if mine.keys() >= LLAMA_8B.keys():
            total = sum(count * mine[shape] for shape, count in LLAMA_8B.items())
            print(f"All linears of Llama-3.1-8B at {bits} bits, one after the other: {total:.1f} s")


def shape(text: str) -> tuple[int, int]:
    rows, inputs = text.split("x")
    return int(rows), int(inputs)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=shape, nargs="+", default=list(LLAMA_8B), help="rows x inputs, as 4096x14336")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument(
        "--sweeps", type=int, default=SolverSpec(2).lnq_sweeps, help="before the descent; 0 is the paper"
    )
    parser.add_argument("--repeats", type=int, default=3, help="solves that the median is of")
    parser.add_argument(
        "--no-plain", action="store_true", help="leave out the plain loop, which takes most of the time"
    )
    parser.add_argument("--output", type=Path, help="JSON to write")
    return parser.parse_args()


def main() -> None:
    options = parse()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"LNQ, {options.sweeps} sweeps, two rounds of four cycles\n")
    print("| shape | bits | seconds | plain | ratio | k-means | sweep | descent | codebook | objective / plain |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    results = []
    with reproducible():
        for rows, inputs in options.shapes:
            for bits in options.bits:
                results.append(measure(rows, inputs, bits, options.sweeps, options.repeats, not options.no_plain))
                show(results[-1])
    show_sum(results)
    if options.output:
        content = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "results": results}
        options.output.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
