"""Take layers and their statistics through the solver, equal layers together."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from .calibration import LayerStatistics
from .codes import Codes, Overlay
from .config import GuidedQuantConfig
from .errors import SolverError
from .formats import lut as lut_format
from .linears import dense_weight, stored_weight
from .plan import LayerPlan
from .report import LayerReport
from .resources import compute_device
from .solvers import Factors, Solution, SolverSpec, solve
from .solvers.base import row_objective
from .solvers.hessian import condition
from .workers import Workers

logger = logging.getLogger(__name__)

# All that a weight costs besides products with the Hessian, in inputs of such a product. For progress bars.
_STEP_INPUTS = 4096


def batches(
    model: PreTrainedModel, layers: Iterable[LayerPlan], device: str | None = None
) -> Iterator[list[LayerPlan]]:
    """Layers of one shape, setting and device, in batches of bounded memory.

    Coordinate descent walks over the inputs one by one, so many small layers at once cost hardly more steps than one.
    Kinds of layers take turns, so that the first tenth of the work tells how long the rest will take.
    """
    alike: dict[tuple, list[LayerPlan]] = {}
    for layer in layers:
        weight = dense_weight(model.get_submodule(layer.name))
        key = (replace(layer, name=""), compute_device(weight.device, device), lut_format.codebook_dtype(weight))
        alike.setdefault(key, []).append(layer)
    found: list[tuple[float, list[LayerPlan]]] = []
    for (one, place, _), members in alike.items():
        size = one.batch_size(place)
        for start in range(0, len(members), size):
            batch = members[start : start + size]
            found.append(((start + len(batch) / 2) / len(members), batch))
    yield from (batch for _, batch in sorted(found, key=lambda pair: pair[0]))


def solve_layers(
    model: PreTrainedModel,
    window: Sequence[list[LayerPlan]],
    statistics: dict[str, LayerStatistics],
    config: GuidedQuantConfig,
    title: str = "Solving",
) -> Iterator[tuple[LayerPlan, Codes, LayerReport]]:
    """Solve batch after batch. ``statistics`` is emptied on the way, so that its memory is free as early as can be."""
    total = sum(solver_work(layer) for batch in window for layer in batch)
    # The mean speed, because batches come in bursts.
    with tqdm(total=total, desc=title, unit="op", unit_scale=True, smoothing=0) as bar:
        for batch in window:
            with torch.no_grad():
                solved = _solve_batch(model, batch, statistics, config)
            bar.update(sum(map(solver_work, batch)))
            for layer, codes, report in solved:
                logger.debug("%s: %d bits, relative objective %s", layer.name, layer.bits, report.objectives)
                yield layer, codes, report


def solver_work(layer: LayerPlan) -> int:
    """What a layer costs to solve, up to a factor: with a Hessian, its products with the weights besides, and with a
    curvature that one's too.
    """
    inputs = _STEP_INPUTS + (layer.in_features if layer.statistics == "hessian" else 0)
    return layer.weights * (inputs + (layer.out_features if layer.output_curvature else 0))


def solve_together(
    model: PreTrainedModel,
    window: Sequence[list[LayerPlan]],
    statistics: dict[str, LayerStatistics],
    config: GuidedQuantConfig,
    title: str,
    workers: Workers,
) -> Iterator[tuple[dict[str, Tensor], LayerReport]]:
    """Packed tensors and reports of a window's layers, in order; several processes share the batches out.

    ``statistics`` is emptied. Every process gets everything, on the CPU.
    """
    owners = workers.owners([sum(map(solver_work, batch)) for batch in window])
    own = [batch for batch, owner in zip(window, owners, strict=True) if owner == workers.rank]
    for batch, owner in zip(window, owners, strict=True):
        if owner != workers.rank:
            for layer in batch:
                statistics.pop(layer.name, None)
    solved = (
        ({name: tensor.cpu() for name, tensor in lut_format.encode(codes).items()}, report)
        for _, codes, report in solve_layers(model, own, statistics, config, title)
    )
    if workers.size == 1:
        yield from solved
        return
    mine = {report.plan.name: (tensors, report) for tensors, report in solved}
    for batch, owner in zip(window, owners, strict=True):
        for layer in batch:
            tensors, report = mine.pop(layer.name, ({}, None))
            specs = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
            report, specs = workers.tell((report, specs), owner)
            device = compute_device(stored_weight(model.get_submodule(layer.name)).device, config.device)
            for name, (shape, dtype) in specs.items():
                # On the device that computes, because not every backend reaches the CPU.
                tensor = tensors[name].to(device) if name in tensors else torch.empty(shape, dtype=dtype, device=device)
                workers.hand_over(tensor, owner)
                tensors[name] = tensor.cpu()
            yield tensors, report


def solver_spec(layer: LayerPlan, config: GuidedQuantConfig, codebook_dtype: torch.dtype) -> SolverSpec:
    """The settings of a layer's solve."""
    return SolverSpec(
        layer.bits,
        codebook_dtype,
        config.lnq_sweeps,
        config.lnq_iterations,
        config.lnq_cycles,
        config.kmeans_iterations,
        layer.outliers,
    )


def _solve_batch(
    model: PreTrainedModel, batch: list[LayerPlan], statistics: dict[str, LayerStatistics], config: GuidedQuantConfig
) -> list[tuple[LayerPlan, Codes, LayerReport]]:
    """Codes and reports of layers that share shape, method, bits, groups and device. Takes out their ``statistics``."""
    one, dense = batch[0], dense_weight(model.get_submodule(batch[0].name))
    # One device, also where a run goes on with its layers placed otherwise than when it started.
    device = compute_device(dense.device, config.device)
    weight = _weights(model, batch, device)
    hessian, factors, reports = _conditioned(batch, statistics, device)
    spec = solver_spec(one, config, lut_format.codebook_dtype(dense))
    parts = [solve(one.method, rows.contiguous(), hessian, spec, factors) for rows in weight.split(one.rows_at_once, 1)]
    solution = parts[0] if len(parts) == 1 else _together(parts)
    _check_finite(solution, batch)
    unit = row_objective(weight, weight.new_zeros(()).expand_as(weight), hessian)  # wᵀ H w
    solved = []
    for number, (layer, report) in enumerate(zip(batch, reports, strict=True)):
        own = slice(number * layer.num_groups, (number + 1) * layer.num_groups)
        codes = _codes(solution, own, layer.out_features)
        report = replace(
            report,
            objectives=_relative(solution.objectives, unit, own),
            lut_dtype=str(codes.codebook.dtype).removeprefix("torch."),
            joint_left=None if solution.joint_left is None else float(solution.joint_left[number]),
        )
        if report.fallback:
            logger.warning("%s: %s.", layer.name, report.fallback)
        solved.append((layer, codes, report))
    return solved


def _weights(model: PreTrainedModel, batch: list[LayerPlan], device: torch.device) -> Tensor:
    """Of all layers, group after group: fp32 ``[layers * g, R, K]``."""
    dense = [dense_weight(model.get_submodule(layer.name)) for layer in batch]
    return _joined([_group_rows(weight.to(device, torch.float32), batch[0].num_groups) for weight in dense])


def _conditioned(
    batch: list[LayerPlan], statistics: dict[str, LayerStatistics], device: torch.device
) -> tuple[Tensor | None, Factors | None, list[LayerReport]]:
    """Statistics of all groups, fit to solve with, and the curvature's factors of all layers, if there are any.

    Also the beginning of every layer's report, with what its statistics say.
    """
    hessians, factors, reports = [], [], []
    for layer in batch:
        # One at a time, for they are large.
        found = statistics.pop(layer.name, None)
        if found is None:
            reports.append(LayerReport(layer, {}))
            continue
        hessian = found.hessian.to(device)
        conditioned, note = condition(hessian, layer.name)
        hessians.append(conditioned)
        if layer.output_curvature and found.curvature is not None:
            factors.append(Factors.of(found.curvature.to(device), hessian, layer.name))
        reports.append(
            LayerReport(
                layer,
                {},
                scale=float(note.scale.mean()),
                damping=note.damping,
                dead_inputs=note.dead_inputs,
                fallback=note.fallback,
                bad_rows=int(found.bad_rows),
                tokens=int(found.tokens),
                borrowed_tokens=found.borrowed,
            )
        )
        del found, hessian, conditioned
    return _joined(hessians) if hessians else None, Factors.together(factors) if factors else None, reports


def _check_finite(solution: Solution, batch: list[LayerPlan]) -> None:
    """Refuse codebooks that are not numbers.

    Raises:
        SolverError: Naming the first such layer.
    """
    finite = solution.codebook.isfinite().view(len(batch), -1).all(dim=1).tolist()
    if not all(finite):
        raise SolverError(batch[finite.index(False)].name, solution.codebook.device)


def _codes(solution: Solution, own: slice, outputs: int) -> Codes:
    """The rows of a layer, without those that its last group was filled up with."""

    def rows(tensor: Tensor) -> Tensor:
        return tensor[own].flatten(0, 1)[:outputs]

    overlay = solution.overlay and Overlay(rows(solution.overlay.columns), rows(solution.overlay.values))
    return Codes(rows(solution.codes), rows(solution.codebook), overlay)


def _relative(objectives: dict[str, Tensor], unit: Tensor, own: slice) -> dict[str, float]:
    """A layer's objective after every stage, relative to its ``wᵀ H w``."""
    whole = unit[own].sum().clamp_min(1e-300)
    return {stage: float(value[own].sum() / whole) for stage, value in objectives.items()}


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _together(parts: Sequence[Solution]) -> Solution:
    """The solution of all rows from those of some each."""

    def whole(tensors: Iterable[Tensor]) -> Tensor:
        return torch.cat(list(tensors), dim=1)

    overlays = [part.overlay for part in parts if part.overlay is not None]
    return Solution(
        whole(part.codes for part in parts),
        whole(part.codebook for part in parts),
        {stage: whole(part.objectives[stage] for part in parts) for stage in parts[0].objectives},
        Overlay(whole(o.columns for o in overlays), whole(o.values for o in overlays)) if overlays else None,
    )


def _group_rows(weight: Tensor, groups: int) -> Tensor:
    """``[N, K] -> [g, ceil(N / g), K]``, a shorter last group padded with zero rows."""
    size = -(-weight.shape[0] // groups)
    padded = nn.functional.pad(weight, (0, 0, 0, groups * size - weight.shape[0]))
    return padded.view(groups, size, -1)
