"""Published any-precision checkpoints, GuidedQuant's among them, as checkpoints of ours: same codes, same codebooks."""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME

from .card import model_card
from .checkpoint import check_output_folder, preflight, staged
from .checksums import write_checksums
from .companions import CARD_FILE
from .config import CONVERTED, GuidedQuantConfig
from .errors import (
    AnyPrecisionConfigError,
    CheckpointError,
    NonFiniteTensorError,
    UnavailableBitsError,
    UnsafeFileError,
    listed,
)
from .fingerprint import versions
from .formats import any_precision
from .formats import lut as lut_format
from .formats.lut import TensorSpec
from .inspection import empty_model
from .linears import is_linear, linear_shape, stored_weight
from .quantizer import tied_names
from .weights import WeightFiles, write_weights

logger = logging.getLogger(__name__)

_CONFIG = "config.json"
# Copied as they are: what generates with a model besides its weights, and its terms of use.
_COMPANIONS = (
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer.model*",
    "*.tiktoken",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
    "*processor_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
# Of config.json, not taken over: the format, code that is not copied or is on the Hub, and where the file once was.
_DROPPED = ("anyprec", "auto_map", "attn_implementation", "_attn_implementation", "_name_or_path")


@dataclass(frozen=True)
class AnyPrecision:
    """What config.json says of a published checkpoint.

    Attributes:
        widths: Bits that it can be read at, ascending. The last is the number of bit-planes.
        blocks: Name of the list of decoder blocks, as in the files.
        modules: Names of the quantized layers in a block.
    """

    widths: range
    blocks: str
    modules: tuple[str, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "AnyPrecision":
        """Read it from the contents of config.json.

        Raises:
            AnyPrecisionConfigError: A key is missing, or has a value outside its range.
        """
        if config.get("quantization_config") is not None:
            raise AnyPrecisionConfigError("quantization_config", config["quantization_config"], "absent")
        saved = _entry(config, "anyprec", dict, "a table")
        architecture = _entry(saved, "arch_config", dict, "a table", "anyprec")
        width = "an integer from 1 to 8"
        seed, parent = (_entry(saved, key, int, width, "anyprec") for key in ("seed_precision", "parent_precision"))
        if not 1 <= seed <= 8:
            raise AnyPrecisionConfigError("anyprec.seed_precision", seed, width)
        if not seed <= parent <= 8:
            raise AnyPrecisionConfigError("anyprec.parent_precision", parent, f"from seed_precision = {seed} to 8")
        if saved.get("group_count", 1) != 1:
            raise AnyPrecisionConfigError("anyprec.group_count", saved["group_count"], "1, a codebook per output")
        inside = "anyprec.arch_config"
        names = [_entry(architecture, key, str, "a name", inside) for key in ("model_name", "layers_name")]
        modules = _entry(architecture, "module_names", list, "a list of names", inside)
        if not modules or not all(isinstance(module, str) for module in modules):
            raise AnyPrecisionConfigError(f"{inside}.module_names", modules, "a list of names")
        return cls(range(seed, parent + 1), ".".join(names), tuple(dict.fromkeys(modules)))


@dataclass(frozen=True)
class _Layer:
    """A quantized layer: its name in the model, and its shape."""

    name: str
    out_features: int
    in_features: int


@dataclass(frozen=True)
class _Reading:
    """A published checkpoint read at one width: the tensors of ours, by the names that they get in its files."""

    weights: WeightFiles
    layers: dict[str, _Layer]
    others: list[str]
    bits: int

    def specs(self) -> dict[str, TensorSpec]:
        specs = {name: self.weights.specs[name] for name in self.others}
        for name, layer in self.layers.items():
            declared = lut_format.declare(layer.out_features, layer.in_features, self.bits, torch.float16)
            specs |= {f"{name}.{key}": spec for key, spec in declared.items()}
        return specs

    def tensor(self, name: str) -> Tensor:
        layer, _, key = name.rpartition(".")
        if layer in self.layers and key == "weight":
            return any_precision.bit_planes(self.weights[f"{layer}.qweight"], self.bits)
        if layer in self.layers and key == "lut":
            name = f"{layer}.lut{self.bits}"
        tensor = self.weights[name]
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise NonFiniteTensorError("values", [name])
        return tensor


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    bits: int | None = None,
    *,
    revision: str | None = None,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write a published any-precision checkpoint as one of ours, which ``from_pretrained`` loads.

    Codes, codebooks and all tensors that are not quantized stay what they are, bit for bit. Memory is needed for one
    file of the result at a time. An interrupted conversion leaves nothing behind.

    Args:
        source: A folder, or the name of a repository on the Hub: safetensors, or files of ``torch.save``, which are
            read without running anything that is in them.
        target: The folder to write; empty, or not there yet.
        bits: One of the widths that the checkpoint holds. Default: the largest.
        revision: Branch, tag or commit of the repository.
        max_shard_size: Largest size of a file of weights, like ``"5GB"``.

    Returns:
        The folder.

    Raises:
        OutputFolderError: ``target`` is not empty.
        UnavailableBitsError: The checkpoint does not hold this width.
        CheckpointError: It is no such checkpoint, or a damaged or dangerous one: :class:`AnyPrecisionConfigError`,
            :class:`UnknownArchitectureError`, :class:`TensorMismatchError`, :class:`NonFiniteTensorError`,
            :class:`DamagedFileError` or :class:`UnsafeFileError` where one of these fits.
    """
    target = check_output_folder(target)
    folder, origin = _fetched(source, revision)
    saved_config = _read_config(folder)
    published = AnyPrecision.from_config(saved_config)
    bits = published.widths[-1] if bits is None else bits
    if not isinstance(bits, int) or isinstance(bits, bool) or bits not in published.widths:
        raise UnavailableBitsError(bits, published.widths)
    model = empty_model(folder)
    layers = _layers(model, published)
    if origin:
        _fetch_weights(**origin)
    weights = WeightFiles(folder)
    others = _check(model, weights.specs, published, layers, bits)
    reading = _Reading(weights, layers, others, bits)
    config = GuidedQuantConfig(
        bits=bits,
        method=CONVERTED,
        guided=False,
        modules={layer.name: {"bits": bits} for layer in layers.values()},
        provenance={**origin, "format": "any-precision", "widths": list(published.widths), "versions": versions()},
    )
    with staged(target) as temporary:
        _copy_companions(folder, temporary)
        write_weights(temporary, reading.specs(), reading.tensor, max_shard_size)
        write_checksums(temporary)
        settings = _carried(saved_config)
        settings["quantization_config"] = config.to_dict()
        (temporary / _CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        (temporary / CARD_FILE).write_text(str(model_card(config.to_dict(), target.name)), encoding="utf-8")
    logger.info("Converted %d layers at %d bits.", len(layers), bits)
    return target


def _fetched(source: str | os.PathLike, revision: str | None) -> tuple[Path, dict[str, str]]:
    """The folder of a checkpoint, fetched but for its weights, and where it is from, unless that is somebody's disk."""
    if os.path.isdir(source):
        return Path(source), {}
    name = os.fspath(source)
    folder = _download(name, revision, [_CONFIG, *_COMPANIONS])
    return folder, {"source": name, "commit": folder.name}


def _fetch_weights(source: str, commit: str) -> None:
    folder = _download(source, commit, ["*.safetensors", SAFE_WEIGHTS_INDEX_NAME])
    if not any(folder.glob("*.safetensors")):
        _download(source, commit, ["pytorch_model*.bin", WEIGHTS_INDEX_NAME])


def _download(name: str, revision: str | None, patterns: list[str]) -> Path:
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name!r} is no folder, and cannot be fetched from the Hub: {error} Check the name, and the connection."
        ) from error


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / _CONFIG
    if not file.is_file():
        raise CheckpointError(f"{folder} is no folder of a saved model: there is no {_CONFIG} in it.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is no readable JSON: {error}. Download it again.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} describes no model: it holds a {type(config).__name__}. Download it again.")
    return config


def _entry(table: Mapping[str, Any], key: str, kind: type, allowed: str, inside: str = "") -> Any:
    """A value that must be there and of this type."""
    value = table.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise AnyPrecisionConfigError(f"{inside}.{key}".removeprefix("."), value, allowed)
    return value


def _layers(model: Any, published: AnyPrecision) -> dict[str, _Layer]:
    """The quantized layers by their names in the files, which for some architectures are not the model's own."""
    linear = {}
    for name, module in model.named_modules():
        if is_linear(module):
            saved = list(revert_weight_conversion(model, {f"{name}.weight": stored_weight(module)}))
            if len(saved) == 1:
                linear[saved[0].removesuffix(".weight")] = _Layer(name, *linear_shape(module))
    count = model.config.get_text_config().num_hidden_layers
    names = [f"{published.blocks}.{block}.{module}" for block in range(count) for module in published.modules]
    absent = [name for name in names if name not in linear]
    if absent:
        allowed = f"names of linear layers; {type(model).__name__} has no {listed(absent)}"
        raise AnyPrecisionConfigError("anyprec.arch_config", [published.blocks, *published.modules], allowed)
    odd = [name for name in names if linear[name].in_features % any_precision.INPUTS_PER_WORD]
    if odd:
        raise CheckpointError(
            f"{odd[0]} has {linear[odd[0]].in_features} inputs; the any-precision format holds multiples of "
            f"{any_precision.INPUTS_PER_WORD} only. Check {_CONFIG}."
        )
    return {name: linear[name] for name in names}


def _check(
    model: Any, found: Mapping[str, TensorSpec], published: AnyPrecision, layers: Mapping[str, _Layer], bits: int
) -> list[str]:
    """Compare the tensors that there are with those that there must be; the names of those to be carried over."""
    saved = revert_weight_conversion(model, model.state_dict())
    others = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in saved.items()}
    quantized: dict[str, TensorSpec] = {}
    for name, layer in layers.items():
        del others[f"{name}.weight"]
        declared = any_precision.declare(layer.out_features, layer.in_features, published.widths[-1], bits)
        quantized |= {f"{name}.{key}": spec for key, spec in declared.items()}
    other_widths = {f"{name}.lut{width}" for name in layers for width in published.widths}
    # Older versions of Transformers saved what later ones compute.
    computed = {name for name in found if name.endswith("rotary_emb.inv_freq")}
    ignored = tied_names(model, found) | other_widths - quantized.keys() | computed
    preflight(found, quantized, others, exact=True, ignore=ignored)
    return [name for name in found if name in others]


def _carried(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are taken over, of configs inside the config too."""
    return {k: _carried(v) if isinstance(v, dict) else v for k, v in config.items() if k not in _DROPPED}


def _copy_companions(folder: Path, target: Path) -> None:
    """Copy the files beside the weights.

    Raises:
        UnsafeFileError: One is a link to a file elsewhere, which would be published with the result.
    """
    # A folder of the Hub's cache holds links to the cache's own files.
    root = folder.resolve()
    allowed = (root, root.parent.parent / "blobs")
    for pattern in _COMPANIONS:
        for file in filter(Path.is_file, folder.glob(pattern)):
            if not any(file.resolve().is_relative_to(place) for place in allowed):
                raise UnsafeFileError(f"{file} is a link to {file.resolve()}, outside the model's folder. Remove it.")
            copy = target / file.relative_to(folder)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
