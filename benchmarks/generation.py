"""Generation speed of a saved quantized model beside its dense original, in one run.

    python benchmarks/generation.py --dense ORIGINAL --quantized FOLDER

Prints tokens per second and memory of the weights, for the original, the quantized model as it loads, and the
quantized model with cached dense weights (`cache_dequantized`).
"""

import argparse
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import hf_guidedquant


def main() -> None:
    options = parse()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dense: Any = AutoModelForCausalLM.from_pretrained(options.dense, device_map=device)
    quantized: Any = AutoModelForCausalLM.from_pretrained(options.quantized, device_map=device)
    prompt = torch.randint(100, 1000, (1, options.prompt), device=device)
    size = sum(p.nbytes for p in quantized.parameters())
    dense_size = sum(p.nbytes for p in dense.parameters())
    cached_size = size + sum(m.in_features * m.out_features * 4 for m in _layers(quantized))

    rounds: dict[str, list[float]] = {"original": [], "quantized": [], "quantized, cached": []}
    for _ in range(options.rounds):  # interleaved, so that a machine that slows down hits all alike
        rounds["original"].append(speed(dense, prompt, options.new_tokens))
        hf_guidedquant.cache_dequantized(quantized, False)
        rounds["quantized"].append(speed(quantized, prompt, max(4, options.new_tokens // 8)))
        hf_guidedquant.cache_dequantized(quantized, True)
        speed(quantized, prompt, 2)  # fills the cache
        rounds["quantized, cached"].append(speed(quantized, prompt, options.new_tokens))
    print(f"{device}, {torch.get_num_threads()} threads, batch 1, prompt {options.prompt}, greedy")
    reference = median(rounds["original"])
    for (name, values), memory in zip(rounds.items(), (dense_size, size, cached_size), strict=True):
        value = median(values)
        print(f"{name:20} {value:8.2f} tok/s  {value / reference:6.2f} x original  {memory / 1e6:8.1f} MB of weights")


def _layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, hf_guidedquant.GuidedLinear)]


def speed(model: Any, prompt: torch.Tensor, new_tokens: int) -> float:
    """New tokens per second of greedy generation."""
    start = time.perf_counter()
    model.generate(prompt, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    if prompt.is_cuda:
        torch.cuda.synchronize()
    return new_tokens / (time.perf_counter() - start)


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", required=True, help="name or folder of the original model")
    parser.add_argument("--quantized", required=True, help="folder of the quantized model")
    parser.add_argument("--prompt", type=int, default=32, help="prompt tokens (default 32)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens to generate (default 64)")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved repetitions (default 3)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
