"""What a saved model is, from its config and the headers of its files; no weight is loaded."""

import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedModel

from .checkpoint import check_tensors, read_headers, weight_files
from .checksums import CHECKSUM_FILE, check_checksums
from .config import QUANT_METHOD, GuidedQuantConfig, check_method
from .errors import CheckpointError, UnknownArchitectureError
from .nn import quantized_modules, without_copies
from .quantizer import GuidedQuantizer, aliases
from .report import align, megabytes

# More decoder blocks than any model has: building them would take hours.
_MOST_BLOCKS = 1000
# What reading a config, and building a model by it, ends with if it holds nonsense.
_CONFIG_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    StrictDataclassError,
)


@dataclass(frozen=True)
class SavedLayer:
    """A quantized layer of a saved model.

    ``nbytes`` counts codes, codebook and overlay; ``outliers`` are those of a row.
    """

    name: str
    out_features: int
    in_features: int
    bits: int
    method: str
    lut_dtype: str
    nbytes: int
    outliers: int = 0


@dataclass(frozen=True)
class Inspection:
    """A saved model.

    Attributes:
        model: Class of the model.
        layers: The quantized layers, in model order.
        nbytes: Size of all its tensors.
        files: Number of files that these are in.
        settings: What config.json says of the quantization, but for the layers: format version, method, provenance...
        verified: Whether all tensors were read and found sound.
        compared: Number of files, those that hold tensors, that agree with their checksums; None if there were none
            to compare with, or it was not asked for.
    """

    model: str
    layers: tuple[SavedLayer, ...]
    nbytes: int
    files: int
    settings: dict[str, Any]
    verified: bool = False
    compared: int | None = None

    @property
    def bits_per_weight(self) -> float:
        """Mean bits per quantized weight, codebooks and overlays included."""
        return 8 * sum(x.nbytes for x in self.layers) / sum(x.out_features * x.in_features for x in self.layers)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "bits_per_weight": self.bits_per_weight}

    def table(self) -> str:
        """A line per kind of layer (same last name, shape and settings), sizes, and where the model comes from."""
        sparse = any(x.outliers for x in self.layers)
        kinds = Counter(
            (
                x.name.rpartition(".")[2],
                f"{x.out_features} x {x.in_features}",
                str(x.bits),
                x.method,
                x.lut_dtype,
                *([str(x.outliers)] * sparse),
            )
            for x in self.layers
        )
        rows = [["layer", "count", "out x in", "bits", "method", "codebook", *(["outliers a row"] * sparse)]]
        rows += [[name, str(count), *rest] for (name, *rest), count in kinds.items()]
        quantized = sum(layer.nbytes for layer in self.layers)
        lines = [
            f"{self.model}, guidedquant format {self.settings['format_version']}",
            *align(rows),
            f"{len(self.layers)} layers at {self.bits_per_weight:.3f} bits per weight: {megabytes(quantized)} of "
            f"{megabytes(self.nbytes)} in {self.files} file{'s' if self.files > 1 else ''}",
        ]
        # From a file that anybody may have written: no control sequences for the terminal.
        lines += ["".join(filter(str.isprintable, f"{k}: {v}")) for k, v in self.settings["provenance"].items()]
        if self.verified:
            sums = f"no {CHECKSUM_FILE}: the files were compared with nothing"
            if self.compared is not None:
                sums = f"{self.compared} file{'s' if self.compared > 1 else ''} of weights as in {CHECKSUM_FILE}"
            lines.append(f"verified: all tensors are there, of the right shapes and dtypes, and finite; {sums}")
            lines.append("not verified: all other files, such as the tokenizer's")
        return "\n".join(lines)


def inspect(folder: str | os.PathLike, verify: bool = False) -> Inspection:
    """What the model saved in ``folder`` is. Names, shapes and dtypes in its files are checked against its config.

    Args:
        folder: Where the model was saved.
        verify: Also compare the files of weights with their checksums, and look for NaN and infinity in every tensor.

    Raises:
        CheckpointError: This is no model of ours, or not what its config promises. The message says what is wrong.
        ConfigError: Its config has a value outside its range.
    """
    path = Path(folder)
    if not path.is_dir():
        raise CheckpointError(
            f"There is no folder {path}. Of a model on the Hub, fetch the files first, which runs nothing: "
            f"hf download {path} --local-dir FOLDER"
        )
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} is no folder of a saved model: there is no config.json in it.")
    model = empty_model(path)
    saved = getattr(model.config, "quantization_config", None)
    if not isinstance(saved, dict) or saved.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(f"{path} holds a model that was not quantized with hf-guidedquant.")
    files = weight_files(path)
    config: Any = GuidedQuantConfig.from_dict(saved)
    # The same steps as before the weights of a model are loaded, its checks included.
    GuidedQuantizer(config, pre_quantized=True)._process_model_before_weight_loading(model, checkpoint_files=files)
    compared = check_checksums(path, files) if verify else None
    if verify:
        check_tensors(files, {name: module.in_features for name, module in quantized_modules(model).items()})
    layers = tuple(
        SavedLayer(
            name,
            module.out_features,
            module.in_features,
            module.bits,
            method=_method(next(n for n in aliases(model, name) if n in config.modules), config),
            lut_dtype=str(module.lut.dtype).removeprefix("torch."),
            nbytes=module.packed_bytes,
            outliers=module.outliers,
        )
        for name, module in without_copies(model).items()
    )
    settings = {name: value for name, value in config.to_dict().items() if name != "modules"}
    nbytes = sum(spec.nbytes for spec in read_headers(files).values())
    return Inspection(type(model).__name__, layers, nbytes, len(files), settings, verify, compared)


def _method(name: str, config: GuidedQuantConfig) -> str:
    method = config.modules[name].get("method", config.method)
    check_method(f"modules[{name!r}]['method']", method, saved=True)
    return method


def empty_model(folder: Path) -> Any:
    """The model on the meta device, of the class that was saved: its names are then those in the files.

    Raises:
        UnknownArchitectureError: Transformers has no such class.
        CheckpointError: config.json describes no model.
    """
    file = folder / "config.json"
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        name = str(next(iter(config.architectures or ()), None))
        architecture = getattr(transformers, name, None)
        if not (isinstance(architecture, type) and issubclass(architecture, PreTrainedModel)):
            raise UnknownArchitectureError(f"Transformers has no model class {name!r}, which {file} asks for.")
        blocks = getattr(config.get_text_config(), "num_hidden_layers", 0)
        if blocks > _MOST_BLOCKS:
            raise CheckpointError(f"{file}: num_hidden_layers is {blocks}; up to {_MOST_BLOCKS:,} are allowed.")
        # Only names and shapes are wanted. Another attention could be code that is fetched from the Hub.
        config._attn_implementation = "eager"
        with torch.device("meta"):
            return architecture(config)
    except _CONFIG_ERRORS as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file} describes no model: {error}") from error
