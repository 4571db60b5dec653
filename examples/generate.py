"""Load a quantized model and let it write, token by token.

    python examples/generate.py outputs/quickstart "Tell me about the sea."

The import of hf_guidedquant is what makes the format known; without it Transformers stops with a size mismatch.
"""

import argparse
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import hf_guidedquant


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or name of a quantized model")
    parser.add_argument("prompt")
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--lean", action="store_true", help="on a CPU: no dense copies of the weights")
    options = parser.parse_args()

    device = "auto" if torch.cuda.is_available() else None
    model: Any = AutoModelForCausalLM.from_pretrained(options.model, device_map=device)
    hf_guidedquant.cache_dequantized(model, device is None and not options.lean)
    tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
    text = options.prompt
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(text, add_special_tokens=not tokenizer.chat_template, return_tensors="pt")
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**inputs.to(model.device), max_new_tokens=options.max_new_tokens, streamer=streamer)


if __name__ == "__main__":
    main()
