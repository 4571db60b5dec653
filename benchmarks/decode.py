"""Tokens per second of whole models with random weights, quantized and not, in one run.

    python benchmarks/decode.py --model llama-3.1-8b --bits 16 4 3 2 --loop graphed plain

Speed does not depend on the values of weights, so models are built from their configs. `plain` is `generate()` with a
static cache, which compiles; `graphed` is `generate(custom_generate=graphed_decode)`. Beside each figure stands the
ceiling: the bytes that a step must read, over the read bandwidth measured in the same run.
"""

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

import torch
from gpu_timing import read_bandwidth
from models import CONFIGS, random_model
from torch import nn

from hf_guidedquant import GuidedLinear, graphed_decode
from hf_guidedquant.nn import prepare_layers, quantized_modules, replace_module


def dense_model(name: str) -> Any:
    """The model in fp16 on the GPU."""
    model = random_model(name, torch.float16, "cuda")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def quantize_at_random(model: Any, bits: int) -> None:
    """Random codes and codebooks instead of every linear layer but the head."""
    layers = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | GuidedLinear) and not name.endswith("lm_head")
    }
    for name, (rows, inputs) in layers.items():
        words = torch.randint(-(2**31), 2**31 - 1, (bits, rows, -(-inputs // 32)), dtype=torch.int32, device="cuda")
        lut = torch.randn(rows, 2**bits, device="cuda").mul(0.02).sort(dim=-1).values.half()
        replace_module(model, name, GuidedLinear.from_tensors({"weight": words, "lut": lut}, inputs, None))
    prepare_layers(model, fuse_layers=True, dense=False)
    model.eval()


def step_bytes(model: Any, batch: int, context: int) -> int:
    """Bytes that a decoding step reads: all weights but the embeddings of other tokens, and the cache."""
    tied = model.config.tie_word_embeddings
    weights = sum(p.nbytes for n, p in model.named_parameters() if tied or "embed_tokens" not in n)
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return weights + 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head * context * batch


def speed(model: Any, loop: str, batch: int, options: argparse.Namespace) -> tuple[float, float]:
    """New tokens per second, median of the rounds, and the seconds that the first call took."""
    prompt = torch.randint(100, 1000, (batch, options.prompt), device="cuda")
    arguments: dict[str, Any] = {"max_new_tokens": options.new_tokens, "do_sample": False}
    if loop == "graphed":
        arguments["custom_generate"] = graphed_decode
    else:
        arguments["cache_implementation"] = "static"
    seconds = []
    for _ in range(options.rounds + 1):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), **arguments)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
        assert tokens.shape == (batch, options.prompt + options.new_tokens)
    return batch * options.new_tokens / sorted(seconds[1:])[options.rounds // 2], seconds[0]


def main() -> None:
    options = parse()
    bandwidth = read_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {bandwidth / 1e12:.2f} TB/s read", flush=True)
    print(f"{options.model}, prompt {options.prompt}, {options.new_tokens} new tokens, greedy")
    model = dense_model(options.model)
    results = []
    for bits in options.bits:
        if bits != 16:
            quantize_at_random(model, bits)
            assert all(module.tiled for module in quantized_modules(model).values())
        for batch in options.batch:
            ceiling = batch * bandwidth / step_bytes(model, batch, options.prompt + options.new_tokens // 2)
            for loop in options.loop:
                tokens, first = speed(model, loop, batch, options)
                case = {"bits": bits, "batch": batch, "loop": loop}
                results.append(case | {"tokens_per_s": tokens, "ceiling": ceiling})
                print(
                    f"{bits:3} bit  batch {batch:3}  {loop:8} {tokens:8.1f} tok/s  {batch * 1e3 / tokens:6.3f} ms"
                    f" a step  ceiling {ceiling:7.0f}  {tokens / ceiling:5.1%}  (first call {first:.0f} s)",
                    flush=True,
                )
                graphed_decode.release(model)
                torch.compiler.reset()
                model.__dict__.pop("_compiled_call", None)
                gc.collect()
                torch.cuda.empty_cache()
                if options.output:
                    options.output.write_text(json.dumps({"model": options.model, "results": results}, indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(CONFIGS), default="llama-3.1-8b")
    parser.add_argument("--bits", type=int, nargs="+", default=[16, 4, 3, 2], help="16 is the dense fp16 model; first")
    parser.add_argument("--loop", nargs="+", choices=["graphed", "plain"], default=["graphed", "plain"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON to write")
    return parser.parse_args()


if __name__ == "__main__":
    main()
