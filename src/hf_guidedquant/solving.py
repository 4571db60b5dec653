"""Take layers and their statistics through the solver, equal layers together."""

import logging
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from .calibration import LayerStatistics
from .codes import Codes
from .config import GuidedQuantConfig
from .formats import lut as lut_format
from .linears import dense_weight, stored_weight
from .plan import LayerPlan
from .report import LayerReport
from .resources import free_memory
from .solvers import SOLVERS, SolverSpec
from .solvers.base import row_objective
from .solvers.hessian import Conditioning, condition

logger = logging.getLogger(__name__)

# Share of the free memory that a batch may take. On a CPU larger batches than this only miss its caches.
_BATCH_SHARE, _BATCH_BYTES_CPU = 0.1, 1 << 28


def solve_layers(
    model: PreTrainedModel, layers: list[LayerPlan], statistics: dict[str, LayerStatistics], config: GuidedQuantConfig
) -> Iterator[tuple[LayerPlan, Codes, LayerReport]]:
    """Solve every layer; ``statistics`` is emptied on the way, so that its memory is free as early as possible."""
    total = sum(layer.weights for layer in layers)
    with tqdm(total=total, desc="Solving", unit="weight", unit_scale=True) as bar:
        for batch in _batches(model, layers):
            found = [statistics.pop(layer.name, None) for layer in batch]
            with torch.no_grad():
                solved = _solve_batch(model, batch, found, config)
            for layer, codes, report in solved:
                logger.debug("%s: %d bits, relative objective %s", layer.name, layer.bits, report.objectives)
                bar.update(layer.weights)
                yield layer, codes, report


def _batches(model: PreTrainedModel, layers: list[LayerPlan]) -> Iterator[list[LayerPlan]]:
    """Layers of one shape, setting and device, in batches of bounded memory.

    Coordinate descent walks over the inputs one by one, so many small layers at once cost hardly more steps than one.
    """
    alike: dict[tuple, list[LayerPlan]] = {}
    for layer in layers:
        weight = stored_weight(model.get_submodule(layer.name))
        key = (replace(layer, name=""), weight.device, lut_format.codebook_dtype(weight))
        alike.setdefault(key, []).append(layer)
    for (one, device, _), members in alike.items():
        work = 4 * (6 * one.weights + 3 * one.num_groups * one.in_features**2)
        budget = _BATCH_SHARE * free_memory(device)
        if device.type == "cpu":
            budget = min(budget, _BATCH_BYTES_CPU)
        size = max(1, int(budget) // work)
        yield from (members[i : i + size] for i in range(0, len(members), size))


def _solve_batch(
    model: PreTrainedModel, batch: list[LayerPlan], statistics: list[LayerStatistics | None], config: GuidedQuantConfig
) -> list[tuple[LayerPlan, Codes, LayerReport]]:
    """Codes and reports of layers that share shape, method, bits, groups and device."""
    one = batch[0]
    groups = one.num_groups
    weights = [dense_weight(model.get_submodule(layer.name)).float() for layer in batch]
    grouped = torch.cat([_group_rows(weight, groups) for weight in weights])  # [layers * g, R, K]
    notes = [Conditioning(weight.new_zeros(groups)) for weight in weights]
    parts = []
    for index, (layer, found) in enumerate(zip(batch, statistics, strict=True)):
        if found is not None:
            part, notes[index] = condition(found.hessian, layer.name)
            parts.append(part)
    stacked = torch.cat(parts) if parts else None
    spec = SolverSpec(
        one.bits,
        lut_format.codebook_dtype(weights[0]),
        config.lnq_iterations,
        config.lnq_cycles,
        config.kmeans_iterations,
    )
    solution = SOLVERS[one.method].solve(grouped, stacked, spec)
    unit = row_objective(torch.zeros_like(grouped), grouped, stacked)  # wᵀ H w
    results = []
    for index, layer in enumerate(batch):
        own = slice(index * groups, (index + 1) * groups)
        codes = Codes(
            solution.codes[own].flatten(0, 1)[: layer.out_features],
            solution.codebook[own].flatten(0, 1)[: layer.out_features],
        )
        relative = {
            stage: float(value[own].sum() / unit[own].sum().clamp_min(1e-300))
            for stage, value in solution.objectives.items()
        }
        found = statistics[index]
        bad_rows = 0 if found is None else int(found.bad_rows)
        report = LayerReport(
            plan=layer,
            objectives=relative,
            scale=float(notes[index].scale.mean()),
            damping=notes[index].damping,
            dead_inputs=notes[index].dead_inputs,
            fallback=notes[index].fallback,
            bad_rows=bad_rows,
            lut_dtype=str(spec.codebook_dtype).removeprefix("torch."),
        )
        if report.fallback:
            logger.warning("%s: %s; its weights alone guide the solver.", layer.name, report.fallback)
        results.append((layer, codes, report))
    return results


def _group_rows(weight: Tensor, groups: int) -> Tensor:
    """``[N, K] -> [g, ceil(N / g), K]``, a shorter last group padded with zero rows."""
    size = -(-weight.shape[0] // groups)
    padded = nn.functional.pad(weight, (0, 0, 0, groups * size - weight.shape[0]))
    return padded.view(groups, size, -1)
