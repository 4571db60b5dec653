"""The quality ladder: perplexity of every method at every width, on one model, from one command.

    python benchmarks/quality.py --model MODEL --calibration c4.txt --evaluation wikitext2_test.txt

Prints a table and writes JSON. Every cell starts from the full-precision model.
"""

import argparse
import copy
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_guidedquant
from hf_guidedquant import GuidedQuantConfig
from hf_guidedquant.evaluate import perplexity, token_ids

LADDER: dict[str, dict[str, Any]] = {
    "RTN": {"method": "rtn"},
    "SqueezeLLM": {"method": "squeezellm"},
    "GPTQ": {"method": "gptq", "guided": False},
    "GPTQ + guided": {"method": "gptq", "guided": True},
    "GPTVQ-1D": {"method": "gptvq1d", "guided": False},
    "GPTVQ-1D + guided": {"method": "gptvq1d", "guided": True},
    "LNQ": {"method": "lnq", "guided": False},
    "LNQ + guided": {"method": "lnq", "guided": True},
}
DEFAULT = ["RTN", "SqueezeLLM", "LNQ", "LNQ + guided"]


def main() -> None:
    options = parse()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, options.dtype)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    dense: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, device_map=device)
    ids = token_ids(tokenizer, Path(options.evaluation).read_text(encoding="utf-8"))

    original = perplexity(dense, tokenizer, ids, options.context)
    print(f"full precision ({options.dtype}): {original:.3f}", flush=True)
    results = []
    for bits in options.bits:
        for name in options.methods:
            config = GuidedQuantConfig(
                bits=bits,
                dataset=options.calibration,
                tokenizer=tokenizer,
                num_samples=options.num_samples,
                seq_len=options.seq_len,
                num_groups=options.num_groups,
                seed=options.seed,
                cache_dequantized=True,
                **LADDER[name],
            )
            start = time.perf_counter()
            model = hf_guidedquant.quantize(copy.deepcopy(dense), config)
            seconds = time.perf_counter() - start
            report = model.quantization_report
            results.append(
                {
                    "bits": bits,
                    "method": name,
                    "perplexity": perplexity(model, tokenizer, ids, options.context),
                    "bits_per_weight": report.bits_per_weight,
                    "seconds": {"total": seconds, **report.seconds},
                    "calibration": model.config.quantization_config.provenance,
                }
            )
            print(f"{bits} bits, {name}: {results[-1]['perplexity']:.3f}  ({seconds:.0f} s)", flush=True)
            del model
    print(table(original, results, options))
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    protocol = {k: v for k, v in vars(options).items() if k not in ("model", "output", "calibration", "evaluation")}
    protocol |= {k: Path(getattr(options, k)).name for k in ("model", "calibration", "evaluation")}
    output.write_text(
        json.dumps(
            {"machine": machine(device), "protocol": protocol, "full_precision": original, "results": results}, indent=1
        )
        + "\n",
        encoding="utf-8",
    )


def table(original: float, results: list[dict], options: argparse.Namespace) -> str:
    """Methods as columns, widths as rows, in Markdown."""
    cells = {(r["bits"], r["method"]): f"{r['perplexity']:.2f}" for r in results}
    lines = [f"| bits (full precision {original:.2f}) | " + " | ".join(options.methods) + " |"]
    lines.append("|---" * (len(options.methods) + 1) + "|")
    lines += [f"| {bits} | " + " | ".join(cells[bits, m] for m in options.methods) + " |" for bits in options.bits]
    return "\n".join(lines)


def machine(device: str) -> dict[str, str]:
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    packages = ("torch", "transformers", "hf-guidedquant")
    return {"device": name, "python": platform.python_version(), **{p: version(p) for p in packages}}


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults after every option, and the description as it is written."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Help)
    parser.add_argument("--model", required=True, help="folder or name of a full-precision model")
    parser.add_argument("--calibration", default="builtin", help="text file or name of the calibration data")
    parser.add_argument("--evaluation", required=True, help="text file to measure perplexity on")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--methods", nargs="+", choices=list(LADDER), default=DEFAULT)
    parser.add_argument("--num-samples", type=int, default=128, help="calibration rows")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens per calibration row")
    parser.add_argument("--num-groups", type=int, default=4, help="row groups per guided Hessian")
    parser.add_argument("--context", type=int, default=2048, help="tokens per evaluation window")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="outputs/quality.json", help="JSON file to write")
    return parser.parse_args()


if __name__ == "__main__":
    main()
