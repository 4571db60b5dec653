"""The quality ladder: perplexity and KL of every method at every width, on one model, from one command.

    python benchmarks/quality.py --model MODEL --calibration c4.txt --texts wikitext2_test.txt

Prints tables and writes JSON and, with matplotlib, a picture. Every cell starts from the full-precision model; cells
that need the same Hessians share them. With several seeds, tables tell means and half the range. A file that an earlier
run has left, or one that was interrupted, is gone on with.
"""

import argparse
import copy
import itertools
import json
import platform
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_guidedquant
from hf_guidedquant import GuidedQuantConfig
from hf_guidedquant.config import PRESETS
from hf_guidedquant.evaluate import compare, perplexity, token_ids
from hf_guidedquant.pictures import perplexity_curves

LADDER: dict[str, dict[str, Any]] = {
    "RTN": {"method": "rtn"},
    "SqueezeLLM": {"method": "squeezellm"},
    "GPTQ": {"method": "gptq", "guided": False},
    "GPTQ + guided": {"method": "gptq", "guided": True},
    "GPTVQ-1D": {"method": "gptvq1d", "guided": False},
    "GPTVQ-1D + guided": {"method": "gptvq1d", "guided": True},
    # As published.
    "LNQ": {"method": "lnq", "guided": False, "lnq_sweeps": 0},
    "LNQ + guided": {"method": "lnq", "guided": True, "lnq_sweeps": 0},
    "sweep + LNQ + guided": {"method": "lnq", "guided": True},
    "curvature + sweep + LNQ + guided": {"method": "lnq", "guided": True, "output_curvature": True},
    "SqueezeLLM + 0.45% sparse": {"method": "squeezellm", "outliers": 0.0045},
    "LNQ + 0.45% sparse": {"method": "lnq", "guided": False, "lnq_sweeps": 0, "outliers": 0.0045},
    "LNQ + guided + 0.45% sparse": {"method": "lnq", "guided": True, "lnq_sweeps": 0, "outliers": 0.0045},
    "sweep + LNQ + guided + 0.45% sparse": {"method": "lnq", "guided": True, "outliers": 0.0045},
    "sweep + LNQ + guided + distilled": {"method": "lnq", "guided": True, "distill": True},
    # Codes as they were solved: codebooks trained block by block, then end to end.
    "codebooks trained": {"method": "lnq", "guided": True, "reconstruct": {"codes": False}, "distill": True},
    "sweep + LNQ + guided + reconstructed": {"method": "lnq", "guided": True, "reconstruct": True},
    # With the preset's own number of rows, whatever the others have.
    "fast": {"preset": "fast", "num_samples": PRESETS["fast"]["num_samples"]},
    "best": {"preset": "best"},
    "curvature + best": {"preset": "best", "output_curvature": True},
}


def main() -> None:
    options = parse()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    dense: Any = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=getattr(torch, options.dtype), device_map=device
    )
    texts = {Path(text).stem: token_ids(tokenizer, Path(text).read_text(encoding="utf-8")) for text in options.texts}
    original = {name: perplexity(dense, tokenizer, ids, options.context) for name, ids in texts.items()}
    print(f"full precision ({options.dtype}): {original}", flush=True)
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    found = {"machine": machine(device), "protocol": protocol(options), "full_precision": original}
    results = kept(output, found)
    done = {(result["bits"], result["method"], result["seed"]) for result in results}
    with nullcontext(options.statistics) if options.statistics else tempfile.TemporaryDirectory() as folder:
        for seed, bits, method in itertools.product(options.seeds, options.bits, options.methods):
            if (bits, method, seed) not in done:
                results.append(cell(options, dense, tokenizer, texts, method, bits, seed, Path(folder)))
                output.write_text(json.dumps(found | {"results": results}, indent=1) + "\n", encoding="utf-8")
    for name in texts:
        for what in ("perplexity", "kl"):
            print("\n" + table(results, name, what))
    if find_spec("matplotlib"):
        picture(results, original, output.with_suffix(".png"))


def protocol(options: argparse.Namespace) -> dict[str, Any]:
    """What all cells have in common."""
    chosen = vars(options)
    same = {key: chosen[key] for key in ("num_samples", "seq_len", "num_groups", "context", "dtype")}
    names = {key: Path(chosen[key]).name for key in ("model", "calibration")}
    return same | names | {"texts": [Path(text).stem for text in options.texts]}


def kept(output: Path, found: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells that an earlier run with the same protocol has left in the file."""
    if not output.exists():
        return []
    earlier = json.loads(output.read_text(encoding="utf-8"))
    if earlier["protocol"] != found["protocol"] or earlier["machine"]["device"] != found["machine"]["device"]:
        raise SystemExit(f"{output} was measured in another way; choose another --output.")
    return earlier["results"]


def cell(
    options: argparse.Namespace,
    dense: Any,
    tokenizer: Any,
    texts: dict[str, torch.Tensor],
    method: str,
    bits: str,
    seed: int,
    folder: Path,
) -> dict[str, Any]:
    """One method at one width with one seed."""
    config = GuidedQuantConfig(
        bits=width(bits),
        dataset=options.calibration,
        tokenizer=tokenizer,
        seq_len=options.seq_len,
        num_groups=options.num_groups,
        seed=seed,
        cache_dequantized=True,
        **{"num_samples": options.num_samples, **LADDER[method]},
    )
    config.statistics = folder / f"{config.guided}-{config.num_samples}-{seed}"
    start = time.perf_counter()
    model: Any = hf_guidedquant.quantize(copy.deepcopy(dense), config)
    seconds = time.perf_counter() - start
    report = model.quantization_report
    found = {}
    for name, ids in texts.items():
        compared = compare(model, dense, tokenizer, ids, options.context)
        found[name] = {"perplexity": compared.perplexity, "kl": compared.kl, "top1": compared.top1}
    told = ", ".join(f"{name} {values['perplexity']:.3f} (KL {values['kl']:.4f})" for name, values in found.items())
    print(f"{bits} bits, {method}, seed {seed}: {told}  ({seconds:.0f} s)", flush=True)
    return {
        "bits": bits,
        "method": method,
        "seed": seed,
        "texts": found,
        "bits_per_weight": report.bits_per_weight,
        "seconds": {"total": seconds, **report.seconds},
        "trained": [part.describe() for part in (report.reconstruction, report.distillation) if part is not None],
        "calibration": model.config.quantization_config.provenance,
    }


def table(results: list[dict], text: str, what: str) -> str:
    """What was measured on a text, in Markdown: methods as rows, widths as columns; of several seeds mean and range."""
    lines = [f"| {what}, {text} | " + " | ".join(f"{bits} bits" for bits in widths(results)) + " |"]
    lines.append("|---" * (len(widths(results)) + 1) + "|")
    for method in methods_of(results):
        found = [[c["texts"][text][what] for c in cells(results, bits, method)] for bits in widths(results)]
        shown = (with_spread(values, 4 if what == "kl" else 2) for values in found)
        lines.append(f"| {method} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def cells(results: list[dict], bits: str, method: str) -> list[dict]:
    """Those of all seeds."""
    return [cell for cell in results if (cell["bits"], cell["method"]) == (bits, method)]


def widths(results: list[dict]) -> list[str]:
    return sorted({cell["bits"] for cell in results}, key=float)


def methods_of(results: list[dict]) -> list[str]:
    """In the ladder's order."""
    return [method for method in LADDER if any(cell["method"] == method for cell in results)]


def with_spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def picture(results: list[dict], original: dict[str, float], file: Path) -> None:
    """Perplexity against bits per weight, codebooks included: a line per method, a panel per text."""

    def points(text: str, method: str) -> list[tuple[float, float]]:
        seeds = [same for bits in widths(results) if (same := cells(results, bits, method))]
        return [
            (mean(c["bits_per_weight"] for c in same), mean(c["texts"][text]["perplexity"] for c in same))
            for same in seeds
        ]

    curves = {text: {method: points(text, method) for method in methods_of(results)} for text in original}
    perplexity_curves(curves, original).savefig(file, dpi=120)


def machine(device: str) -> dict[str, str]:
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    packages = ("torch", "transformers", "hf-guidedquant")
    return {"device": name, "python": platform.python_version(), **{p: version(p) for p in packages}}


def width(text: str) -> int | float:
    """Bits: an integer, or a mean with a decimal point."""
    return float(text) if "." in text else int(text)


def bits(text: str) -> str:
    """The same as a text, checked."""
    return str(width(text))


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults after every option, and the description as it is written."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Help)
    parser.add_argument("--model", required=True, help="folder or name of a full-precision model")
    parser.add_argument("--calibration", default="builtin", help="text file or name of the calibration data")
    parser.add_argument("--texts", required=True, nargs="+", help="text files to measure on")
    parser.add_argument(
        "--bits", type=bits, nargs="+", default=["2", "3", "4"], metavar="BITS", help="like 2 or, as a mean, 2.5"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=list(LADDER),
        default=["RTN", "SqueezeLLM", "LNQ", "LNQ + guided", "sweep + LNQ + guided", "best"],
    )
    parser.add_argument("--num-samples", type=int, default=128, help="calibration rows")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens per calibration row")
    parser.add_argument("--num-groups", type=int, default=4, help="row groups per guided Hessian")
    parser.add_argument("--context", type=int, default=2048, help="tokens per evaluation window")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--statistics", help="folder to keep Hessians in for another run; default: none is kept")
    parser.add_argument(
        "--output", default="outputs/quality.json", help="JSON file to write; the picture lies beside it"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
