"""Pictures of a quantized model, as figures of matplotlib (the extra ``pictures``)."""

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError, PackageMissingError
from .report import REPORT_FILE, Report


def objective_map(source: Report | str | os.PathLike) -> Any:
    """Heat maps of the layers' objectives over block and module: of the solver's first stage, and of its last.

    Args:
        source: A model's ``quantization_report``, or the folder of a saved model.

    Returns:
        A ``matplotlib.figure.Figure``; ``figure.savefig("objectives.png")`` writes it.

    Raises:
        PackageMissingError: matplotlib is not installed.
        CheckpointError: The folder holds no report.
    """
    figure = _figure()
    modules, blocks, stages = objectives(source)
    names = list(stages)
    # One stage, where there are no more.
    ends = dict.fromkeys((names[0], names[-1]))
    finite = torch.cat([stages[name][~stages[name].isnan()] for name in ends])
    limits = {"vmin": float(finite.min()), "vmax": float(finite.max())}
    panels = figure.subplots(1, len(ends), sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, ends, strict=True):
        image = panel.imshow(stages[name].numpy(), aspect="auto", **limits)
        panel.set_title(f"relative objective: {name}")
        panel.set_xticks(range(len(modules)), modules, rotation=45, ha="right")
        panel.set_yticks(range(len(blocks)), blocks)
    panels[0].set_ylabel("block")
    figure.colorbar(image, ax=list(panels))
    return figure


def row_histogram(weight: Tensor, codebook: Tensor, bins: int = 100) -> Any:
    """Histogram of a row of weights, with its codebook as lines on top.

    Args:
        weight: The original's weights of an output channel, ``[in]``.
        codebook: Its values, ``[2^bits]``: a row of a quantized layer's ``lut``.
        bins: Bars of the histogram.

    Returns:
        A ``matplotlib.figure.Figure``.

    Raises:
        PackageMissingError: matplotlib is not installed.
    """
    figure = _figure()
    panel = figure.subplots()
    panel.hist(weight.detach().float().cpu().numpy(), bins=bins)
    for value in codebook.detach().float().cpu().tolist():
        panel.axvline(value, color="black", linewidth=1)
    panel.set_xlabel("weight")
    panel.set_ylabel("count")
    return figure


def objectives(source: Report | str | os.PathLike) -> tuple[list[str], list[str], dict[str, Tensor]]:
    """Modules, blocks and, per stage, the objectives float64 ``[blocks, modules]``; NaN where there is no such layer.

    Raises:
        CheckpointError: The folder holds no report.
    """
    cells = {
        (stage, *_place(layer["name"])): value
        for layer in _layers(source)
        for stage, value in layer["objectives"].items()
    }
    stages, blocks, modules = ([*dict.fromkeys(key[i] for key in cells)] for i in range(3))
    table = {
        stage: torch.tensor(
            [[cells.get((stage, block, module), float("nan")) for module in modules] for block in blocks],
            dtype=torch.float64,
        )
        for stage in stages
    }
    return modules, blocks, table


def _layers(source: Report | str | os.PathLike) -> list[dict[str, Any]]:
    if isinstance(source, Report):
        return source.to_dict()["layers"]
    file = Path(source) / REPORT_FILE
    try:
        return json.loads(file.read_text(encoding="utf-8"))["layers"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{file} is no readable report of a quantization: {error}") from error


def _place(name: str) -> tuple[str, str]:
    """Block and module of a layer: ``model.layers.3.mlp.up_proj`` is ``mlp.up_proj`` in block 3."""
    found = re.search(r"\.(\d+)\.(.+)", name)
    return (found[1], found[2]) if found else ("", name)


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PackageMissingError("matplotlib", "pictures") from error
    return Figure(layout="constrained")
