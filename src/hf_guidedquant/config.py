"""What to do and with which data: :class:`GuidedQuantConfig`."""

import copy
import dataclasses
import functools
import logging
import math
import os
import re
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from .errors import CheckpointError, ConfigError, listed, printable
from .solvers import SOLVERS

logger = logging.getLogger(__name__)

QUANT_METHOD = "guidedquant"
FORMAT_VERSION = "1.0"
METHODS = tuple(SOLVERS)
# The method of a model that another program has quantized: its files do not tell.
CONVERTED = "converted"
OVERRIDABLE = ("bits", "method")

# Settings by the name of what they are for; what is given beside the name counts instead.
PRESETS: dict[str, dict[str, Any]] = {
    # Forward passes only, over fewer rows, and one round of codebook updates.
    "fast": {"guided": False, "num_samples": 32, "lnq_sweeps": 1, "lnq_iterations": 1},
    # Guided LNQ as published: four Hessians per layer, nothing trained.
    "paper": {"method": "lnq", "guided": True, "num_groups": 4, "lnq_sweeps": 0},
    # Codes and codebooks trained block by block, then codebooks end to end.
    "best": {
        "method": "lnq",
        "guided": True,
        "num_groups": 4,
        "reconstruct": True,
        "distill": {"epochs": 3, "learning_rate": 0.005},
    },
}

# Fields that count when a model is loaded that is quantized already.
_LOADING = ("cache_dequantized", "fuse_layers")

# Fields that are written to config.json. Everything else concerns one run and never reaches a file.
PERSISTED = (
    "format_version",
    "bits",
    "embedding_bits",
    "method",
    "guided",
    "num_groups",
    "output_curvature",
    "lnq_sweeps",
    "lnq_iterations",
    "lnq_cycles",
    "kmeans_iterations",
    "outliers",
    "reconstruct",
    "distill",
    "modules_to_not_convert",
    "modules",
    "provenance",
)


@dataclass(frozen=True, kw_only=True)
class DistillSpec:
    """How the codebooks are trained after solving, with the KL divergence to the original model as the loss.

    Args:
        epochs: Passes over the calibration rows. 1-100.
        learning_rate: Largest step of AdamW, in units of a layer's mean distance between neighbouring codewords.
            Positive, at most 1.
        batch_tokens: Tokens per step, about. 1-16,777,216.
        held_back: Share of the rows that is not trained on, but tells which epoch was best; a row at least. Positive,
            at most 0.5.

    Raises:
        ConfigError: A value is outside its range.
    """

    epochs: int = 3
    learning_rate: float = 0.01
    batch_tokens: int = 8192
    held_back: float = 1 / 16

    def __post_init__(self) -> None:
        _check_training("distill", self)


@dataclass(frozen=True, kw_only=True)
class ReconstructSpec:
    """How codes and codebooks are trained block by block after solving, to give what the original blocks give.

    Args:
        codes: Whether codes move, too; else codebooks alone are trained, in less memory.
        epochs: Passes over the calibration rows, for every block. 1-100.
        learning_rate: Largest step of AdamW for codebooks, in units of a layer's mean distance between neighbouring
            codewords. Positive, at most 1.
        latent_learning_rate: The same for the latent weights that the codes follow.
        latent_decay: Share of the way back to where they started that latent weights go beside a step of the largest
            size. 0-1.
        batch_tokens: Tokens per step, about. 1-16,777,216.
        held_back: Share of the rows that is not trained on, but tells whether a block is better than it was; a row at
            least. Positive, at most 0.5.

    Raises:
        ConfigError: A value is outside its range.
    """

    codes: bool = True
    epochs: int = 8
    learning_rate: float = 0.005
    latent_learning_rate: float = 0.02
    latent_decay: float = 0.02
    batch_tokens: int = 8192
    held_back: float = 1 / 16

    def __post_init__(self) -> None:
        _check_training("reconstruct", self)
        _check_bool("reconstruct['codes']", self.codes)
        _check_positive("reconstruct['latent_learning_rate']", self.latent_learning_rate, 1)
        _check_share("reconstruct['latent_decay']", self.latent_decay, 1)


def _with_presets(cls: Any) -> Any:
    """The class, with ``preset`` filling in what its constructor is not given."""
    plain = cls.__init__

    @functools.wraps(plain)
    def __init__(self: Any, *, preset: str | None = None, **settings: Any) -> None:  # noqa: N807
        if preset is not None and preset not in PRESETS:
            raise ConfigError("preset", preset, "None or one of " + ", ".join(map(repr, PRESETS)))
        plain(self, **{**copy.deepcopy(PRESETS.get(preset or "", {})), **settings})

    cls.__init__ = __init__
    return cls


@_with_presets
@dataclass(kw_only=True, repr=False)
class GuidedQuantConfig(QuantizationConfigMixin):
    """How to quantize a language model, and on which calibration data.

    Args:
        preset: ``"fast"``, ``"paper"`` (guided LNQ as published) or ``"best"`` (trained afterwards as well): values of
            several settings at once, see :data:`PRESETS`. Settings that are given count instead.
        bits: Bits per weight, 1-8. The codebook of an output channel has ``2**bits`` entries. A float, like 2.5 or 3.0,
            is a mean over all weights but those with overrides: layers get the widths that the end loss gains most
            from. That takes one more pass over the data where not all Hessians fit in memory at once. From 2.0 to 4.0
            the widths are 2, 3 and 4, which have fast kernels. Needs ``guided`` and a method other than ``"rtn"``.
        embedding_bits: Bits per weight of the input embeddings and the output head, 1-8: 6 lose next to nothing, 4 are
            smaller and faster. ``None`` leaves both as they are. Where the two are tied they stay tied, in one copy
            that is solved for the head. Refused where codebooks of ``2**embedding_bits`` values take more than is
            saved.
        method: ``"lnq"`` (layer-wise non-uniform quantization, the main method), ``"gptvq1d"`` (GPTQ's sweep on
            codebooks, which are then fitted), ``"gptq"`` (the sweep on a uniform grid), ``"squeezellm"`` (weighted
            k-means), ``"kmeans"`` (unweighted) or ``"rtn"`` (uniform round-to-nearest); the last two need no data.
        guided: Weigh every token's error by the end loss' squared gradient (GuidedQuant). ``False`` is the plain
            layer-wise objective.
        num_groups: Groups of output channels that share one guided Hessian, per layer. 1-1024; a layer's number of
            outputs need not divide by it, and a layer with fewer outputs has a group for each.
        output_curvature: After LNQ, better all outputs of a layer together, by how their errors depend on each other in
            the end loss. Costs ``outputs**2`` fp32 numbers per layer beside its Hessians, and one more product of the
            gradients with themselves. Needs ``guided`` and the method ``"lnq"``; layers with another method in
            ``overrides`` and the output head do without.
        lnq_sweeps: GPTQ sweeps that LNQ starts with, each followed by a codebook update. The paper has none. 0-100.
        lnq_iterations: Codebook updates of LNQ, each followed by assignment cycles (``T`` in the paper). 0-100.
        lnq_cycles: Coordinate-descent cycles over all inputs per assignment phase. 1-100.
        kmeans_iterations: Cap on Lloyd iterations of the weighted k-means. 0-1000.
        outliers: Share of each output channel's weights that is kept beside the codes, in the codebook's dtype
            (dense-and-sparse): those of largest ``H_kk w_k²``, rounded up to whole weights, 32 bits each. 0.0045 in the
            paper. 0-0.1.
        reconstruct: Train codes and codebooks block by block after solving, on the same rows: every quantized decoder
            block learns to give what the original block gives. ``True`` for the settings of :class:`ReconstructSpec`,
            or a dictionary of those that are to be others, e.g. ``{"codes": False}`` for codebooks alone. Kept as
            ``False`` or the dictionary of all. Hidden states wait in CPU memory: three rows of ``hidden_size`` numbers
            per token.
        distill: Train the codebooks end to end after that, on the same rows: the quantized model learns the token
            distribution of the original. ``True`` for the settings of :class:`DistillSpec`, or a dictionary of those
            that are to be others, e.g. ``{"epochs": 4}``. Kept as ``False`` or the dictionary of all. The original's
            last hidden states wait in CPU memory: a row of ``hidden_size`` numbers per token.
        modules_to_not_convert: Names or glob patterns of modules to leave in full precision.
        overrides: Settings of single modules by name or glob pattern, e.g. ``{"*.down_proj": {"bits": 4}}``. Keys:
            ``bits``, ``method``. A later entry wins over an earlier one.
        dataset: Calibration data: ``"builtin"`` (shipped with the package), ``"wikitext2"``, ``"c4"``, ``"redpajama"``
            (through `datasets`), the path of a text file, or of a ``.json`` or ``.jsonl`` file of texts, chats or
            objects with a column ``text``, ``messages`` or ``input_ids``, a list of texts, a list of chats, a
            ``datasets.Dataset``, or a list of 1-D LongTensors of token ids, which are used as they are. Any other
            dataset of the Hub, a folder of files, or a file with other columns is a dictionary: ``name``, and if needed
            ``config``, ``split`` (default: ``"train"``) and ``column`` (of texts, chats or token ids). Only its first
            records are read, as many as it takes.
        assistant_only_loss: Of chats, the end loss counts only what the assistant says, so that weights are rounded
            by what they do to that. Chats where it says nothing are dropped. Needs ``guided``. Training afterwards
            (``reconstruct``, ``distill``) learns from all tokens.
        tokenizer: Tokenizer object, or the name or folder of one. Default: the model's own.
        num_samples: Calibration rows to use at most. 1-1,000,000.
        seq_len: Tokens per calibration row. 2-1,048,576; cut to the model's context length.
        seed: Seed of every random choice. 0 to 2**63 - 1.
        device: Where to compute if the weights lie in the CPU's memory, e.g. ``"cuda:1"`` or ``"cpu"``. Default: the
            first GPU, if there is one. Blocks of the model are there for their turn only, so that a model can be
            quantized that is larger than the GPU. Weights on a GPU stay where they are.
        max_memory: GiB that may be in use on every device, the weights that lie there included. Less memory means more
            segments of the model, which are calibrated and solved one after the other. Default: what is free.
        run_dir: A folder that keeps every finished layer, every block whose training (``reconstruct``) is finished, and
            the last finished epoch of ``distill``, so that the same call goes on after a crash or a kill, with the same
            result to the byte. Refused if anything that solved layers depend on has changed. Not saved with the model;
            delete it when that is saved.
        statistics: A folder that keeps the Hessians. Later runs on the same model and data, with other bits or
            another method, need no pass over the data. Or ``"hf://owner/name"``, a Hub repository with the contents
            of such a folder, which is only read. Not saved with the model.
        cache_dequantized: Keep a dense copy of every quantized weight in memory beside the packed one. A CPU then
            generates at the dense model's speed, for the dense model's memory. Not saved with the model.
        fuse_layers: Multiply layers that read the same activations (q, k, v; gate, up) in one product, where the
            device's kernels can. Changes nothing that is computed or saved. Not saved with the model.
        modules: Filled in by quantization: module name -> its bits and codebook dtype.
        provenance: Filled in by quantization: calibration source, its hash, row count, seed and versions.
        format_version: Version of the file format. A newer major version is refused.

    Raises:
        ConfigError: A value is outside its range. The message names the field and the range.
    """

    preset: InitVar[str | None] = None
    bits: int | float = 4
    embedding_bits: int | None = None
    method: str = "lnq"
    guided: bool = True
    num_groups: int = 1
    output_curvature: bool = False
    lnq_sweeps: int = 3
    lnq_iterations: int = 2
    lnq_cycles: int = 4
    kmeans_iterations: int = 50
    outliers: float = 0.0
    reconstruct: bool | dict[str, Any] = False
    distill: bool | dict[str, Any] = False
    modules_to_not_convert: list[str] | None = None
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    dataset: Any = "builtin"
    assistant_only_loss: bool = False
    tokenizer: Any = None
    num_samples: int = 128
    seq_len: int = 2048
    seed: int = 0
    device: str | None = None
    max_memory: float | None = None
    run_dir: str | os.PathLike | None = None
    statistics: str | os.PathLike | None = None
    cache_dequantized: bool = False
    fuse_layers: bool = True
    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    format_version: str = FORMAT_VERSION
    quant_method: str = QUANT_METHOD  # type: ignore[assignment]  # transformers declares an enum of its own methods

    def __post_init__(self, preset: str | None) -> None:
        if self.quant_method != QUANT_METHOD:
            raise ConfigError("quant_method", self.quant_method, repr(QUANT_METHOD))
        check_method("method", self.method, saved=bool(self.modules))
        if not isinstance(self.bits, float):
            check_bits("bits", self.bits)
        elif not 1 <= self.bits <= 8:
            raise ConfigError("bits", self.bits, "an integer, or a mean, from 1 to 8")
        elif not self.guided or self.method == "rtn":
            raise ConfigError("bits", self.bits, "an integer from 1 to 8 where guided is False or the method rtn")
        if self.embedding_bits is not None:
            check_bits("embedding_bits", self.embedding_bits)
        _check_int("num_groups", self.num_groups, 1, 1024)
        _check_int("lnq_sweeps", self.lnq_sweeps, 0, 100)
        _check_int("lnq_iterations", self.lnq_iterations, 0, 100)
        _check_int("lnq_cycles", self.lnq_cycles, 1, 100)
        _check_int("kmeans_iterations", self.kmeans_iterations, 0, 1000)
        _check_share("outliers", self.outliers, 0.1)
        self.reconstruct = _settings("reconstruct", self.reconstruct, ReconstructSpec)
        self.distill = _settings("distill", self.distill, DistillSpec)
        _check_int("num_samples", self.num_samples, 1, 1_000_000)
        _check_int("seq_len", self.seq_len, 2, 2**20)
        _check_int("seed", self.seed, 0, 2**63 - 1)
        _check_bool("guided", self.guided)
        _check_bool("output_curvature", self.output_curvature)
        if self.output_curvature and not (self.guided and self.method == "lnq"):
            raise ConfigError("output_curvature", True, 'False without guided, and with another method than "lnq"')
        _check_bool("assistant_only_loss", self.assistant_only_loss)
        if self.assistant_only_loss and not self.guided:
            raise ConfigError("assistant_only_loss", True, "False without guided, where no loss is looked at")
        _check_bool("cache_dequantized", self.cache_dequantized)
        _check_bool("fuse_layers", self.fuse_layers)
        _check_device("device", self.device)
        _check_gibibytes("max_memory", self.max_memory)
        _check_folder("run_dir", self.run_dir)
        _check_folder("statistics", self.statistics)
        if self.run_dir and self.statistics and os.path.realpath(self.run_dir) == os.path.realpath(self.statistics):
            raise ConfigError("statistics", self.statistics, "another folder than run_dir")
        _check_patterns("modules_to_not_convert", self.modules_to_not_convert)
        _check_overrides(self.overrides)
        _check_format_version(self.format_version)
        if self.dataset is None:
            raise ConfigError("dataset", None, 'calibration data; "builtin" is the default')
        for name in ("modules", "provenance"):
            if not isinstance(getattr(self, name), dict):
                raise ConfigError(name, getattr(self, name), "a dictionary (it is filled in by quantization)")

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> "GuidedQuantConfig | tuple[GuidedQuantConfig, dict[str, Any]]":
        """Read a config, from a checkpoint or from a user's own dictionary.

        A checkpoint's config (it lists its ``modules``) can only set what is saved: a dataset, tokenizer or pattern
        in it is ignored, so that loading never fetches anything. Unknown keys are ignored with a warning.
        """
        known = {"preset", *(f.name for f in dataclasses.fields(cls))}
        is_checkpoint = bool(config_dict.get("modules"))
        accepted = {*PERSISTED, "quant_method"} if is_checkpoint else known
        ignored = sorted(str(key) for key in config_dict if key not in accepted)
        if ignored:
            logger.warning(
                "Ignoring unknown or run-only keys of a guidedquant config: %s", printable(listed(ignored, 20))
            )
        config = cls(**{key: value for key, value in config_dict.items() if key in accepted})
        unused = config.update(**kwargs)
        config.__post_init__(None)
        return (config, unused) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The persisted part, as it stands in ``config.json``. Texts, paths and tokenizers are never in it."""
        saved = {"quant_method": QUANT_METHOD}
        return saved | {name: copy.deepcopy(getattr(self, name)) for name in PERSISTED}

    def __iter__(self) -> Any:
        yield from self.to_dict().items()

    def __deepcopy__(self, memo: dict[int, Any]) -> "GuidedQuantConfig":
        # transformers deep-copies the model config that this one hangs on; a tokenizer or a generator of texts must
        # be shared, not copied.
        new = copy.copy(self)
        for name in ("modules", "provenance", "overrides", "modules_to_not_convert", "reconstruct", "distill"):
            setattr(new, name, copy.deepcopy(getattr(self, name), memo))
        return new

    def get_loading_attributes(self) -> dict[str, Any]:
        """Settings that a user may pass when loading a model that is quantized already.

        Transformers asks for them then, and drops all others: which of those were given is said in a warning.
        """
        loading = {name: getattr(self, name) for name in _LOADING}
        default = GuidedQuantConfig(**loading)
        names = (f.name for f in dataclasses.fields(self))
        if dropped := [name for name in names if getattr(self, name) != getattr(default, name)]:
            logger.warning(
                "The model is quantized already, and stays as it was saved. Of the settings given, %s %s not applied. "
                "For another quantization load the full-precision original.",
                listed(dropped, 20),
                "is" if len(dropped) == 1 else "are",
            )
        return loading

    @property
    def reconstruct_spec(self) -> ReconstructSpec | None:
        """How to train block by block; None if that is not to be done."""
        return ReconstructSpec(**self.reconstruct) if isinstance(self.reconstruct, dict) else None

    @property
    def distill_spec(self) -> DistillSpec | None:
        """How to train the codebooks; None if they are not to be trained."""
        return DistillSpec(**self.distill) if isinstance(self.distill, dict) else None

    def for_module(self, name: str, vocabulary: bool = False) -> dict[str, Any]:
        """``bits`` and ``method`` of the module called ``name``, overrides applied.

        ``vocabulary`` is whether it is the input embeddings or the output head.
        """
        settings: dict[str, Any] = {"bits": self.embedding_bits if vocabulary else self.bits, "method": self.method}
        for pattern, values in self.overrides.items():
            if matches(name, pattern):
                settings |= values
        return settings


def matches(name: str, pattern: str) -> bool:
    """Whether ``pattern`` means the module ``name``: its full name, its last parts, a parent of it, or a glob."""
    return (
        name == pattern
        or name.endswith("." + pattern)
        or name.startswith(pattern + ".")
        or f".{pattern}." in name
        or fnmatchcase(name, pattern)
    )


def check_bits(field_name: str, value: object) -> None:
    """Raise :class:`ConfigError` unless ``value`` is an integer from 1 to 8."""
    _check_int(field_name, value, 1, 8)


def check_method(field_name: str, value: object, saved: bool = False) -> None:
    """Raise :class:`ConfigError` unless ``value`` names a method; of a saved model, also ``"converted"`` will do."""
    allowed = (*METHODS, CONVERTED) if saved else METHODS
    if value not in allowed:
        raise ConfigError(field_name, value, "one of " + ", ".join(map(repr, allowed)))


def _check_int(field_name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(field_name, value, f"an integer from {low:,} to {high:,}")


def _check_bool(field_name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(field_name, value, "True or False")


def _check_device(name: str, value: Any) -> None:
    try:
        known = value is None or torch.device(value).type in ("cpu", "cuda")
    except (RuntimeError, TypeError):
        known = False
    if not known:
        raise ConfigError(name, value, 'None, "cpu", "cuda" or "cuda:N"')


def _check_positive(field_name: str, value: object, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= high:
        raise ConfigError(field_name, value, f"a positive number up to {high}")


def _check_share(field_name: str, value: object, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= high:
        raise ConfigError(field_name, value, f"a number from 0 to {high}")


def _check_training(field_name: str, spec: DistillSpec | ReconstructSpec) -> None:
    """What both kinds of training have in common."""
    _check_int(f"{field_name}['epochs']", spec.epochs, 1, 100)
    _check_positive(f"{field_name}['learning_rate']", spec.learning_rate, 1)
    _check_int(f"{field_name}['batch_tokens']", spec.batch_tokens, 1, 2**24)
    _check_positive(f"{field_name}['held_back']", spec.held_back, 0.5)


def _settings(field_name: str, value: object, spec: type) -> bool | dict[str, Any]:
    """``False``, or all settings of a kind of training."""
    names = [f.name for f in dataclasses.fields(spec)]
    if value is False:
        return False
    if value is not True and not (isinstance(value, dict) and set(value) <= set(names)):
        raise ConfigError(field_name, value, "True, False or a dictionary with keys among " + ", ".join(names))
    return dataclasses.asdict(spec(**(value if isinstance(value, dict) else {})))


def _check_gibibytes(field_name: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ConfigError(field_name, value, "None or a positive number of GiB")


def _check_folder(field_name: str, value: object) -> None:
    if value is not None and not (isinstance(value, str | os.PathLike) and os.fspath(value)):
        raise ConfigError(field_name, value, "None or the path of a folder")


def _check_patterns(field_name: str, value: object) -> None:
    if value is not None and not (isinstance(value, list | tuple) and all(isinstance(p, str) and p for p in value)):
        raise ConfigError(field_name, value, "None or a list of module names or glob patterns")


def _check_overrides(overrides: object) -> None:
    allowed = 'a dictionary like {"*.down_proj": {"bits": 4}} with the keys ' + " and ".join(OVERRIDABLE)
    if not isinstance(overrides, dict):
        raise ConfigError("overrides", overrides, allowed)
    for pattern, values in overrides.items():
        if not isinstance(pattern, str) or not isinstance(values, dict) or not set(values) <= set(OVERRIDABLE):
            raise ConfigError("overrides", {pattern: values}, allowed)
        if "bits" in values:
            check_bits(f"overrides[{pattern!r}]['bits']", values["bits"])
        if "method" in values:
            check_method(f"overrides[{pattern!r}]['method']", values["method"])


def _check_format_version(version: object) -> None:
    match = re.fullmatch(r"([0-9]{1,4})(\.[0-9]{1,9})*", str(version))
    if match is None:
        raise ConfigError("format_version", version, f"a version like {FORMAT_VERSION!r}")
    if int(match[1]) > int(FORMAT_VERSION.split(".")[0]):
        raise CheckpointError(
            f"This model was saved in guidedquant format {version}; this version of hf-guidedquant reads up to "
            f"{FORMAT_VERSION}. Upgrade it: pip install -U hf-guidedquant"
        )
