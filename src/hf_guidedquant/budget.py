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
    calibration: Calibration | None,
    drawn: Outline,
    store: StatisticsStore | None,
    workers: Workers,
) -> tuple[Plan, dict[str, LayerStatistics]]:
    """The plan with widths whose mean is at most ``config.bits``, if that is a float; else the plan as it is.

    Layers that are multiplied together (q, k, v; gate, up) get the same width. Layers with ``bits`` of their own, from
    ``config.overrides`` or ``config.embedding_bits``, keep them and do not count.

    Returns:
        The plan; and the statistics of all its layers, if they fit in memory at once, so that there is no need to
        gather them again. Else nothing.
    """
    if calibration is None or not isinstance(config.bits, float):
        return layers_plan, {}
    layers, widths = undecided(model, config, layers_plan), widths_near(config.bits)
    # The pass that the solver needs will do, if it is one and sees all of these layers.
    segments = _segments(model, config, layers_plan.layers, calibration, drawn, workers, told=False)
    at_once = len(segments) == 1 and all(layer.statistics != "none" for layer in layers)
    if not at_once:
        segments = _segments(model, config, diagonal_only(layers), calibration, drawn, workers)
    relay = relay_for(model, config, drawn, segments, calibration, workers)
    statistics: dict[str, LayerStatistics] = {}
    for number in relay.order:
        statistics |= gather(model, relay, number, segments[number].layers, config, store, workers)
    losses = {}
    for layer in layers:
        diagonal = (statistics[layer.name] if at_once else statistics.pop(layer.name)).diagonal_sum
        weight = dense_weight(model.get_submodule(layer.name)).to(diagonal.device)
        losses[layer.name] = {bits: _predicted_loss(weight, diagonal, bits, layer, config) for bits in widths}
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


def diagonal_only(layers: Iterable[LayerPlan]) -> list[LayerPlan]:
    """Layers as they are for the prediction."""
    return [replace(layer, method="squeezellm", output_curvature=False) for layer in layers]


def _segments(
    model: PreTrainedModel,
    config: GuidedQuantConfig,
    layers: Sequence[LayerPlan],
    calibration: Calibration,
    drawn: Outline,
    workers: Workers,
    told: bool = True,
) -> list[Segment]:
    footprint = Footprint(model, layers, drawn, place_for(config))
    return workers.tell(divide(footprint, config, len(calibration.rows), told=told), 0)


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
