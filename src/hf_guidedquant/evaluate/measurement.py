"""What was measured of a model, and several models in a table."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..nn import without_copies
from ..report import align, megabytes
from .speed import DecodeSpeed


@dataclass(frozen=True)
class Measurement:
    """A model, and what was measured of it; what was not is None.

    Attributes:
        name: As the user calls it.
        bits_per_weight: Mean over the quantized weights, codebooks included; of a model that is not quantized, the
            width of its dtype.
        nbytes: Size of all parameters.
        tokens: Tokens of the text.
        perplexity, original_perplexity, kl, top1: See :class:`~hf_guidedquant.evaluate.Comparison`.
        speed: Of decoding.
        tasks: Task -> metric -> value.
    """

    name: str
    bits_per_weight: float
    nbytes: int
    tokens: int | None = None
    perplexity: float | None = None
    original_perplexity: float | None = None
    kl: float | None = None
    top1: float | None = None
    speed: DecodeSpeed | None = None
    tasks: dict[str, dict[str, float]] | None = None

    @classmethod
    def of(cls, model: Any, name: str, **measured: Any) -> "Measurement":
        """With the sizes of ``model``."""
        return cls(name, bits_per_weight(model), sum(tensor.nbytes for tensor in model.parameters()), **measured)

    def to_dict(self) -> dict[str, Any]:
        """What was measured, without the rest."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def bits_per_weight(model: Any) -> float:
    """Mean bits per quantized weight, codebooks and overlays included; without any, the width of the model's dtype."""
    layers = without_copies(model).values()
    if not layers:
        return float(torch.finfo(model.dtype).bits)
    nbytes = sum(layer.packed_bytes for layer in layers)
    return 8 * nbytes / sum(layer.in_features * layer.out_features for layer in layers)


def comparison_table(measurements: Sequence[Measurement]) -> str:
    """A line per model, a column per quantity that was measured of any; then how the speed was measured."""
    tasks = dict.fromkeys(task for each in measurements for task in each.tasks or ())
    columns = ["model", "bits", "size", "perplexity", "KL", "top-1", "tokens/s", *tasks]
    rows = [[_cells(each).get(column, "") for column in columns] for each in measurements]
    used = [index for index in range(len(columns)) if any(row[index] for row in rows)]
    lines = align([[row[index] for index in used] for row in (columns, *rows)])
    lines += dict.fromkeys(f"tokens/s: {each.speed.describe()}" for each in measurements if each.speed is not None)
    return "\n".join(lines)


def _cells(of: Measurement) -> dict[str, str]:
    cells = {"model": of.name, "bits": f"{of.bits_per_weight:.3f}", "size": megabytes(of.nbytes)}
    numbers = {"perplexity": (of.perplexity, ".4f"), "KL": (of.kl, ".5f"), "top-1": (of.top1, ".2%")}
    cells |= {name: format(value, style) for name, (value, style) in numbers.items() if value is not None}
    if of.speed is not None:
        cells["tokens/s"] = f"{of.speed.tokens_per_second:.1f}"
    for task, metrics in (of.tasks or {}).items():
        # Accuracy by the likelihood of the answers; other tasks show the first metric that they have.
        cells[task] = f"{metrics.get('acc', next(iter(metrics.values()), float('nan'))):.2%}"
    return cells
