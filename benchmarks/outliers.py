"""What outliers beside the codes do to the objective of single layers, and what they cost in size.

    python benchmarks/outliers.py --model MODEL --layers model.layers.0.self_attn.q_proj model.layers.12.mlp.down_proj

Prints a table in Markdown: per layer and share, the objective relative to that of dropping all weights, and the size.
"""

import argparse
import copy
import tempfile
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_guidedquant
from hf_guidedquant import GuidedQuantConfig
from hf_guidedquant.linears import is_linear
from hf_guidedquant.nn import quantized_modules


def main() -> None:
    options = parse()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    dense: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, device_map=device)
    head = dense.get_output_embeddings()
    linears = [name for name, module in dense.named_modules() if is_linear(module) and module is not head]
    print("| layer | N x K | bits | share | objective | bits per weight |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for bits in options.bits:
            for share in options.shares:
                config = GuidedQuantConfig(
                    bits=bits,
                    method=options.method,
                    outliers=share,
                    dataset=options.calibration,
                    tokenizer=tokenizer,
                    num_samples=options.num_samples,
                    seq_len=options.seq_len,
                    modules_to_not_convert=[name for name in linears if name not in options.layers],
                    statistics=folder,
                )
                model: Any = hf_guidedquant.quantize(copy.deepcopy(dense), config)
                sizes = {name: module.packed_bytes for name, module in quantized_modules(model).items()}
                for layer in model.quantization_report.layers:
                    plan, objective = layer.plan, list(layer.objectives.values())[-1]
                    print(
                        f"| {plan.name} | {plan.out_features} x {plan.in_features} | {bits} | {share:.2%} "
                        f"| {objective:.5f} | {8 * sizes[plan.name] / plan.weights:.2f} |",
                        flush=True,
                    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or name of a full-precision model")
    parser.add_argument("--layers", required=True, nargs="+", help="names of linear layers")
    parser.add_argument("--method", default="lnq")
    parser.add_argument("--bits", type=int, nargs="+", default=[2])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.0045])
    parser.add_argument("--calibration", default="builtin", help="text file or name of the calibration data")
    parser.add_argument("--num-samples", type=int, default=48, help="calibration rows")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens per calibration row")
    return parser.parse_args()


if __name__ == "__main__":
    main()
