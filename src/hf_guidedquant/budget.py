"""Widths of layers that a mean number of bits leaves open, chosen by the predicted change of the end loss.

A layer's loss at a width is predicted by weighted k-means on the diagonal of its guided Hessian, ``Σ h (ŵ - w)²`` over
all weights: the second-order change of the end loss but for a common factor, without what coordinate descent gains
from the rest of the Hessian. It costs one k-means per layer and width, and where not all Hessians fit in memory at once
a pass over the data for the diagonals alone.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from .allocate import Item, allocate
from .calibration import (
    Calibration,
    Footprint,
    LayerStatistics,
    Outline,
    Segment,
    StatisticsStore,
    divide,
    gather,
    place_for,
    relay_for,
)
from .config import GuidedQuantConfig
from .formats.lut import codebook_dtype
from .linears import dense_weight, vocabulary_layers
from .nn.fusion import SIBLINGS
from .plan import LayerPlan, Plan, with_bits
from .solvers import SolverSpec, kmeans
from .solvers.hessian import condition
from .triton_kernels import TILED_BITS
from .workers import Workers

logger = logging.getLogger(__name__)


def within_budget(
    model: PreTrainedModel,
    config: GuidedQuantConfig,
    layers_plan: Plan,
    calibration: Calibration,
    drawn: Outline,
    at_once: bool,
    store: StatisticsStore | None,
    workers: Workers,
) -> tuple[Plan, dict[str, LayerStatistics]]:
    """The plan with widths whose mean is at most ``config.bits``, a float.

    Layers that are multiplied together (q, k, v; gate, up) get the same width. Layers with ``bits`` of their own, from
    ``config.overrides`` or ``config.embedding_bits``, keep them and do not count.

    Args:
        model, config, drawn, workers: Of the run.
        layers_plan: With widths that do not count yet.
        calibration: The rows.
        at_once: Gather all that the solver needs too (see :func:`one_pass_serves`).
        store: Where statistics are kept, if they are gathered at once.

    Returns:
        The plan; and the statistics of all its layers if they were gathered at once, else nothing.
    """
    layers, widths = undecided(model, config, layers_plan), widths_near(config.bits)
    gathered = layers_plan.layers if at_once else diagonal_only(layers)
    footprint = Footprint(model, gathered, drawn, place_for(config))
    segments = [Segment(0, footprint.count, tuple(gathered))]
    if not at_once:
        segments = workers.tell(divide(footprint, config, len(calibration.rows)), 0)
        config, store = replace(config, statistics=None), None
    relay = relay_for(model, config, drawn, segments, calibration, workers)
    statistics: dict[str, LayerStatistics] = {}
    for number in relay.order:
        statistics |= gather(model, relay, number, segments[number].layers, config, store, workers, at_once)
    losses = {}
    total = sum(layer.weights for layer in layers)
    with tqdm(total=total, desc="Choosing bits", unit="weight", unit_scale=True) as bar:
        for layer in layers:
            diagonal = (statistics[layer.name] if at_once else statistics.pop(layer.name)).diagonal_sum
            weight = dense_weight(model.get_submodule(layer.name)).to(diagonal.device)
            losses[layer.name] = {bits: _predicted_loss(weight, diagonal, bits, layer, config) for bits in widths}
            bar.update(layer.weights)
    siblings = list(_siblings(layers))
    items = [
        Item(
            sum(layer.weights for layer in group),
            {bits: sum(losses[layer.name][bits] for layer in group) for bits in widths},
        )
        for group in siblings
    ]
    chosen = workers.tell(allocate(items, config.bits), 0)
    bits = {layer.name: width for group, width in zip(siblings, chosen, strict=True) for layer in group}
    counts = sorted(Counter(bits.values()).items())
    logger.info("Bits per layer: %s.", ", ".join(f"{count} x {width}" for width, count in counts))
    return with_bits(model, layers_plan, bits), statistics


def undecided(model: PreTrainedModel, config: GuidedQuantConfig, layers_plan: Plan) -> list[LayerPlan]:
    """The layers whose widths a mean number of bits leaves open."""
    if not isinstance(config.bits, float):
        return []
    vocabulary = vocabulary_layers(model)
    return [
        layer
        for layer in layers_plan.layers
        if isinstance(config.for_module(layer.name, layer.name in vocabulary)["bits"], float)
    ]


def one_pass_serves(layers: Sequence[LayerPlan], undecided: Sequence[LayerPlan]) -> list[LayerPlan] | None:
    """The layers with what a pass takes that serves the choice of widths as well.

    If all of that fits in memory at once, there is no need for a pass for the diagonals.

    Returns:
        None if no widths are to be chosen, or methods see too little of the data for that.
    """
    names = {layer.name for layer in undecided}
    if not names or any(layer.statistics == "none" for layer in layers if layer.name in names):
        return None
    # LNQ's k-means is that of the choice, which other methods may not have room for beside the Hessians.
    return [replace(layer, method="lnq") if layer.statistics == "hessian" else layer for layer in layers]


def diagonal_only(layers: Iterable[LayerPlan]) -> list[LayerPlan]:
    """Layers as they are for the prediction."""
    return [replace(layer, method="squeezellm", output_curvature=False) for layer in layers]


def widths_near(mean: float) -> Sequence[int]:
    """Widths to choose from: those that GPUs have fast kernels for, if the mean lies among them."""
    if TILED_BITS[0] <= mean <= TILED_BITS[-1]:
        return TILED_BITS
    return range(max(1, math.floor(mean) - 1), min(8, math.ceil(mean) + 1) + 1)


def _siblings(layers: Iterable[LayerPlan]) -> Iterable[list[LayerPlan]]:
    """Layers in groups that share a width, in model order."""
    groups: dict[tuple, list[LayerPlan]] = {}
    for layer in layers:
        parent, _, child = layer.name.rpartition(".")
        together = next((names for names in SIBLINGS if child in names), (child,))
        groups.setdefault((parent, together), []).append(layer)
    return groups.values()


def _predicted_loss(weight: Tensor, diagonal: Tensor, bits: int, layer: LayerPlan, config: GuidedQuantConfig) -> float:
    """``Σ h (ŵ - w)²`` of ``weight [N, K]`` under ``diagonal [g, K]``, not normalised."""
    spec = SolverSpec(bits, codebook_dtype(weight), kmeans_iterations=config.kmeans_iterations)
    normal, note = condition(diagonal, layer.name)
    groups = weight.float().split(math.ceil(layer.out_features / layer.num_groups))
    return sum(
        float(note.scale[index] * kmeans.solve(rows[None], normal[index, None], spec).objectives["kmeans"].sum())
        for index, rows in enumerate(groups)
    )
