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
from .solvers.hessian import Conditioning, condition
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
            found = [statistics.pop(layer.name, None) for layer in batch]
            with torch.no_grad():
                solved = _solve_batch(model, batch, found, config)
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


def _solve_batch(
    model: PreTrainedModel, batch: list[LayerPlan], statistics: list[LayerStatistics | None], config: GuidedQuantConfig
) -> list[tuple[LayerPlan, Codes, LayerReport]]:
    """Codes and reports of layers that share shape, method, bits, groups and device. Empties ``statistics``."""
    one = batch[0]
    groups = one.num_groups
    modules = [model.get_submodule(layer.name) for layer in batch]
    # One device, also where a run goes on with its layers placed otherwise than when it started.
    device = compute_device(stored_weight(modules[0]).device, config.device)
    lut_dtype = lut_format.codebook_dtype(dense_weight(modules[0]))
    weights = [_group_rows(dense_weight(module).to(device, torch.float32), groups) for module in modules]
    grouped = weights[0] if len(weights) == 1 else torch.cat(weights)  # [layers * g, R, K]
    del weights
    notes = [Conditioning(grouped.new_zeros(groups)) for _ in batch]
    bad_rows, tokens, borrowed = ([0] * len(batch) for _ in range(3))
    parts, factors = [], []
    for index, layer in enumerate(batch):
        # One at a time, for they are large.
        found, statistics[index] = statistics[index], None
        if found is not None:
            hessian = found.hessian.to(device)
            conditioned, notes[index] = condition(hessian, layer.name)
            parts.append(conditioned)
            if layer.output_curvature and found.curvature is not None:
                factors.append(Factors.of(found.curvature.to(device), hessian, layer.name))
            bad_rows[index], tokens[index] = int(found.bad_rows), int(found.tokens)
            borrowed[index] = found.borrowed
            del found, hessian, conditioned
    stacked = parts[0] if len(parts) == 1 else torch.cat(parts) if parts else None
    parts.clear()
    spec = SolverSpec(
        one.bits,
        lut_dtype,
        config.lnq_sweeps,
        config.lnq_iterations,
        config.lnq_cycles,
        config.kmeans_iterations,
        one.outliers,
    )
    joint = Factors.together(factors) if factors else None
    factors.clear()
    solutions = [
        solve(one.method, rows.contiguous(), stacked, spec, joint) for rows in grouped.split(one.rows_at_once, dim=1)
    ]
    solution = solutions[0] if len(solutions) == 1 else _together(solutions)
    finite = solution.codebook.isfinite().flatten(1).all(dim=1).view(len(batch), groups).all(dim=1).tolist()
    if not all(finite):
        raise SolverError(batch[finite.index(False)].name, device)
    unit = row_objective(grouped, grouped.new_zeros(()).expand_as(grouped), stacked)  # wᵀ H w
    results = []
    for index, layer in enumerate(batch):
        own = slice(index * groups, (index + 1) * groups)

        def rows_of(tensor: Tensor, own: slice = own, layer: LayerPlan = layer) -> Tensor:
            return tensor[own].flatten(0, 1)[: layer.out_features]

        overlay = solution.overlay and Overlay(rows_of(solution.overlay.columns), rows_of(solution.overlay.values))
        codes = Codes(rows_of(solution.codes), rows_of(solution.codebook), overlay)
        relative = {
            stage: float(value[own].sum() / unit[own].sum().clamp_min(1e-300))
            for stage, value in solution.objectives.items()
        }
        report = LayerReport(
            plan=layer,
            objectives=relative,
            scale=float(notes[index].scale.mean()),
            damping=notes[index].damping,
            dead_inputs=notes[index].dead_inputs,
            fallback=notes[index].fallback,
            bad_rows=bad_rows[index],
            tokens=tokens[index],
            borrowed_tokens=borrowed[index],
            lut_dtype=str(spec.codebook_dtype).removeprefix("torch."),
            joint_left=None if solution.joint_left is None else float(solution.joint_left[index]),
        )
        if report.fallback:
            logger.warning("%s: %s.", layer.name, report.fallback)
        results.append((layer, codes, report))
    return results


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
