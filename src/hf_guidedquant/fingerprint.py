"""Whether two models, tokenizers or machines are the same, as far as the result of a run depends on them."""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .resources import compute_device

# Entries of a model's config that no result depends on: where it came from, and how it is stored and run.
_INCIDENTAL = {
    "_name_or_path",
    "architectures",
    "dtype",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
_THREADS = 8


def model_fingerprint(model: PreTrainedModel) -> dict[str, str]:
    """Class, config and all weights of a model. Every byte is hashed, by several threads: some seconds for 10 GB."""
    return {
        "model class": type(model).__name__,
        "model config": json_sha256(_essential(model.config.to_diff_dict())),
        "model weights": tensors_sha256(model.state_dict()),
    }


def tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """Hash of a tokenizer's vocabulary and chat template; None for something that has none."""
    if not hasattr(tokenizer, "get_vocab"):
        return None
    return json_sha256([sorted(tokenizer.get_vocab().items()), getattr(tokenizer, "chat_template", None)])


def versions() -> dict[str, str]:
    """The packages that take part in the result, with their versions."""
    return {package: version(package) for package in ("hf-guidedquant", "torch", "transformers")}


def environment(model: PreTrainedModel, device: str | None = None) -> dict[str, Any]:
    """What can change the rounding of sums: versions, the kinds of device that compute, the attention.

    ``device`` is the one that is asked for.
    """
    places = {compute_device(parameter.device, device) for parameter in model.parameters()}
    return {
        "versions": versions(),
        "devices": sorted({torch.cuda.get_device_name(d) if d.type == "cuda" else d.type for d in places}),
        "attention": getattr(model.config, "_attn_implementation", None),
    }


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hash of the names, shapes, dtypes and bytes of tensors on any devices, in order of their names."""
    names = sorted(tensors)
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(_tensor_sha256, (tensors[name] for name in names)))
    return json_sha256(list(zip(names, digests, strict=True)))


def json_sha256(value: Any) -> str:
    """Hash of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _tensor_sha256(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    digest.update(tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _essential(config: Any) -> Any:
    """A config without its incidental entries, nested configs included."""
    if isinstance(config, dict):
        return {str(key): _essential(value) for key, value in config.items() if key not in _INCIDENTAL}
    return [_essential(value) for value in config] if isinstance(config, list | tuple) else str(config)
