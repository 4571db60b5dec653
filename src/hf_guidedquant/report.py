"""What a run did: per layer and in total, as JSON beside the model and as a table for the reader."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from .config import GuidedQuantConfig
from .errors import CheckpointError
from .plan import LayerPlan, Plan
from .training import DistillReport, ReconstructReport

REPORT_FILE = "guidedquant_report.json"


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer.

    Attributes:
        plan: Shape and settings.
        objectives: Stage -> ``Σ (ŵ - w)ᵀ H (ŵ - w)`` relative to ``Σ wᵀ H w`` (without data: relative squared error).
        scale: Mean diagonal of the Hessian before it was normalised (0 without data).
        damping, dead_inputs, fallback: What the Hessian needed; see ``solvers.hessian.Conditioning``.
        bad_rows: Calibration rows left out of this layer's statistics.
        tokens: Calibration tokens that its statistics are of; of an expert, those routed to it (0 without data).
        borrowed_tokens: Of an expert with fewer tokens than inputs: average tokens of all experts, added to its own.
        lut_dtype: Dtype of the stored codebook.
        joint_left: With ``output_curvature``: of the joint objective of all outputs, what is left of LNQ's. The
            objectives are every output's own, and may have risen meanwhile.
    """

    plan: LayerPlan
    objectives: dict[str, float]
    scale: float = 0.0
    damping: float = 0.0
    dead_inputs: int = 0
    fallback: str | None = None
    bad_rows: int = 0
    tokens: int = 0
    borrowed_tokens: int = 0
    lut_dtype: str = "float16"
    joint_left: float | None = None

    def settings(self, config: GuidedQuantConfig) -> dict[str, Any]:
        """What config.json says of the layer: its bits, and what else is not as everywhere."""
        entry: dict[str, Any] = {"bits": self.plan.bits}
        if self.plan.method != config.method:
            entry["method"] = self.plan.method
        if self.lut_dtype != "float16":
            entry["lut_dtype"] = self.lut_dtype
        return entry


@dataclass
class Report:
    """A run of the quantizer. ``save`` writes it beside the model; ``table`` is what the log shows.

    Attributes:
        model: Class of the model.
        layers: One entry per quantized layer.
        skipped: Weights left in full precision -> reason.
        dense_bytes, quantized_bytes: Size of all parameters before and after.
        bits_per_weight: Mean over the quantized weights, codebooks included.
        seconds: Stage -> time.
        settings: The persisted config.
        reconstruction: What training block by block did; None if there was none.
        distillation: What training the codebooks end to end did; None if they were not trained.
        measured: Anything measured on the model afterwards, e.g. ``{"perplexity on WikiText-2": 23.1}``; a model that
            is saved later tells it in its model card.
    """

    model: str
    layers: list[LayerReport]
    skipped: dict[str, str]
    dense_bytes: int
    quantized_bytes: int
    bits_per_weight: float
    seconds: dict[str, float]
    settings: dict[str, Any] = field(default_factory=dict)
    reconstruction: ReconstructReport | None = None
    distillation: DistillReport | None = None
    measured: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        layers = []
        for layer in self.layers:
            entry = asdict(layer)
            layers.append({**entry.pop("plan"), **entry})
        return {**asdict(self), "layers": layers}

    def save(self, folder: str | os.PathLike) -> None:
        """Write ``guidedquant_report.json`` into ``folder``."""
        text = json.dumps(self.to_dict(), indent=1, default=_plain)
        Path(folder, REPORT_FILE).write_text(text + "\n", encoding="utf-8")

    def table(self) -> str:
        """The summary: a line per kind of layer (same last name, shape, bits), then the totals."""
        kinds: dict[tuple, list[LayerReport]] = {}
        for layer in self.layers:
            plan = layer.plan
            key = (plan.name.rpartition(".")[2], plan.out_features, plan.in_features, plan.bits, plan.method)
            kinds.setdefault(key, []).append(layer)
        stages = list(dict.fromkeys(stage for layer in self.layers for stage in layer.objectives))
        header = ["layer", "count", "out x in", "bits", "method", *(f"error: {stage}" for stage in stages)]
        rows = [header]
        for (name, out, inp, bits, method), members in kinds.items():
            means = [_mean([m.objectives[s] for m in members if s in m.objectives]) for s in stages]
            rows.append([name, str(len(members)), f"{out} x {inp}", str(bits), method, *means])
        lines = align(rows)
        lines.append(sizes(self))
        left = [layer.joint_left for layer in self.layers if layer.joint_left is not None]
        if left:
            lines.append(f"output curvature: the joint error of a layer's outputs fell to {_mean(left)} on average")
        repaired = [
            f"{len([x for x in self.layers if test(x)])} {what}"
            for what, test in _REPAIRS.items()
            if any(test(layer) for layer in self.layers)
        ]
        if repaired:
            lines.append("layers with " + ", ".join(repaired))
        if self.reconstruction is not None:
            lines.append(f"reconstructed: {self.reconstruction.describe()}")
        if self.distillation is not None:
            lines.append(f"distilled: {self.distillation.describe()}")
        lines.append("time: " + ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in self.seconds.items()))
        return "\n".join(lines)


def _plain(value: Any) -> Any:
    """What somebody has measured, as JSON can hold it: the number in an array or a tensor, or else its text."""
    try:
        return value.item()
    except (AttributeError, ValueError, RuntimeError):
        return str(value)


def load_report(folder: str | os.PathLike) -> Report:
    """The report of the run that made the model saved in ``folder``. Anybody may have written it, so types are checked.

    Raises:
        CheckpointError: There is none, or it is not readable.
    """
    file = Path(folder) / REPORT_FILE
    if not file.is_file():
        raise CheckpointError(
            f"There is no readable report in {folder}: no {REPORT_FILE}, which is saved by the process that quantizes "
            "a model, and not with one that was loaded or converted."
        )
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        layers = [_read(LayerReport, entry, plan=_read(LayerPlan, entry)) for entry in told["layers"]]
        report: Report = _read(Report, told, layers=layers)
        report.table()  # what cannot be told is not readable either
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise CheckpointError(f"{file} is no readable report of a quantization: {error}") from error
    return report


def _read(cls: Any, told: Mapping[str, Any], **given: Any) -> Any:
    """A dataclass from JSON. Keys that it does not have are passed over: they are another version's."""
    kinds = get_type_hints(cls)
    known = [f.name for f in fields(cls) if f.name in told and f.name not in given]
    return cls(**{name: _typed(told[name], kinds[name]) for name in known}, **given)


def _typed(value: Any, kind: Any) -> Any:
    """A value from JSON as what an annotation says.

    Raises:
        TypeError: It is something else.
    """
    origin, of = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _read(kind, value)
    if origin is UnionType:
        return None if value is None and NoneType in of else _typed(value, of[0])
    if origin is dict:
        return {key: _typed(entry, of[1]) for key, entry in value.items()}
    if origin is tuple:
        return tuple(_typed(entry, of[0]) for entry in value)
    if kind is float and type(value) is int:
        return float(value)
    if kind is not Any and type(value) is not kind:
        raise TypeError(f"{value!r:.50} is not of type {kind.__name__}")
    return value


_REPAIRS = {
    "dead inputs": lambda layer: layer.dead_inputs > 0,
    "damped Hessians": lambda layer: layer.damping > 0,
    "no usable Hessian": lambda layer: layer.fallback is not None,
    "calibration rows left out": lambda layer: layer.bad_rows > 0,
    "fewer tokens than inputs (experts)": lambda layer: layer.borrowed_tokens > 0,
    "no tokens at all (experts)": lambda layer: layer.borrowed_tokens > 0 and layer.tokens == 0,
}


def _mean(values: list[float]) -> str:
    return f"{sum(values) / len(values):.5f}" if values else ""


def sizes(of: "Report | Plan") -> str:
    """Bits per weight and the size of the model, before and after, in a line."""
    return (
        f"{len(of.layers)} layers at {of.bits_per_weight:.3f} bits per weight; whole model "
        f"{megabytes(of.dense_bytes)} -> {megabytes(of.quantized_bytes)} "
        f"({of.dense_bytes / of.quantized_bytes:.2f}x smaller)"
    )


def megabytes(size: float) -> str:
    """A size for people."""
    return f"{size / 1e6:,.1f} MB"


def align(rows: list[list[str]]) -> list[str]:
    """Lines of a table whose columns are as wide as they have to be."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
