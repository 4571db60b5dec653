"""What quantized embeddings cost: perplexity and size with the rest of the model as it was.

python benchmarks/embeddings.py --model FOLDER --calibration c4_calibration.txt --text wikitext2_test.txt --windows 20
"""

import argparse
import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_guidedquant
from hf_guidedquant import GuidedQuantConfig
from hf_guidedquant.evaluate import perplexity, token_ids
from hf_guidedquant.nn import without_copies

_CONTEXT = 2048


def sizes(model: Any) -> dict[str, float]:
    """MB of the embeddings and the head, and of all."""
    parts = {
        id(p): p.nbytes for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in m.parameters()
    }
    return {"vocabulary_mb": sum(parts.values()) / 1e6, "model_mb": sum(p.nbytes for p in model.parameters()) / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the full-precision model")
    parser.add_argument("--calibration", required=True, help="text file, or a name that GuidedQuantConfig knows")
    parser.add_argument("--text", required=True, help="text file to measure on")
    parser.add_argument("--windows", type=int, default=20, help="windows of 2048 tokens (default: %(default)s)")
    parser.add_argument("--bits", type=int, nargs="+", default=[6, 5, 4])
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--output", help="JSON file to write")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    original = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    ids = token_ids(tokenizer, Path(options.text).read_text(encoding="utf-8"))[: options.windows * _CONTEXT]
    rows: list[dict[str, Any]] = []

    def measure(model: Any, bits: int | None, bits_per_weight: float) -> None:
        found = {"bits": bits, "bits_per_weight": bits_per_weight, "perplexity": perplexity(model, None, ids, _CONTEXT)}
        rows.append(found | sizes(model))
        print(json.dumps(rows[-1]), flush=True)

    measure(original, None, 32.0)
    with tempfile.TemporaryDirectory() as statistics:
        for bits in options.bits:
            config = GuidedQuantConfig(
                embedding_bits=bits,
                modules_to_not_convert=["layers"],
                dataset=options.calibration,
                tokenizer=tokenizer,
                num_samples=options.num_samples,
                seq_len=options.seq_len,
                statistics=statistics,
            )
            model = hf_guidedquant.quantize(copy.deepcopy(original), config)
            hf_guidedquant.cache_dequantized(model)
            layers = without_copies(model).values()
            packed = sum(x.weight.nbytes + x.lut.nbytes for x in layers)
            measure(model, bits, 8 * packed / sum(x.in_features * x.out_features for x in layers))
    if options.output:
        report = {"arguments": vars(options), "torch": torch.__version__, "results": rows}
        Path(options.output).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
