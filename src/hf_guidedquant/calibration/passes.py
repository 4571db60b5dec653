"""How often to go over the data, and what to watch each time: layers in windows whose Hessians fit in memory."""

from collections.abc import Iterable, Sequence

import torch
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from ..config import GuidedQuantConfig
from ..errors import ModelError
from ..linears import is_linear, linear_shape, stored_weight
from ..plan import LayerPlan
from ..resources import free_memory
from ..workers import Workers
from .collector import LayerStatistics, collect
from .rows import Calibration
from .store import StatisticsStore

# Shares of a device's free memory that Hessians, and one row's activations, may take by default.
_HESSIAN_SHARE, _ACTIVATION_SHARE = 0.4, 0.25


def divided(
    model: PreTrainedModel, batches: Iterable[list[LayerPlan]], config: GuidedQuantConfig
) -> list[list[LayerPlan]]:
    """The solver's batches, those whose statistics exceed the memory budget of their device cut into parts.

    A batch stays whole wherever it fits, so that the budget does not change the result.

    Raises:
        ModelError: One layer's statistics alone are larger than the memory that is free.
    """
    found = []
    for batch in batches:
        device = stored_weight(model.get_submodule(batch[0].name)).device
        need = batch[0].statistics_bytes
        free = free_memory(device)
        if need > free:
            raise ModelError(
                f"The Hessians of {batch[0].name} take {need / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free "
                f"on {device}. Lower num_groups ({config.num_groups}), or leave the layer out."
            )
        fitting = max(1, _budget(device, config) // max(1, need))
        found += [batch[k : k + fitting] for k in range(0, len(batch), fitting)]
    return found


def windows(
    model: PreTrainedModel, batches: Iterable[list[LayerPlan]], config: GuidedQuantConfig
) -> list[list[list[LayerPlan]]]:
    """Group batches into windows, a pass over the data each, whose statistics fit the memory budget of each device."""
    found: list[list[list[LayerPlan]]] = []
    used: dict[torch.device, int] = {}
    for batch in batches:
        device = stored_weight(model.get_submodule(batch[0].name)).device
        need = len(batch) * batch[0].statistics_bytes
        if not found or used.get(device, 0) + need > _budget(device, config):
            found.append([])
            used = {}
        found[-1].append(batch)
        used[device] = used.get(device, 0) + need
    return found


def _budget(device: torch.device, config: GuidedQuantConfig) -> int:
    """Bytes that statistics on ``device`` may take."""
    if config.hessian_memory is not None:
        return int(config.hessian_memory * 2**30)
    return int(_HESSIAN_SHARE * free_memory(device))


def gather(
    model: PreTrainedModel,
    window: Sequence[LayerPlan],
    calibration: Calibration | None,
    config: GuidedQuantConfig,
    title: str = "Calibrating",
    store: StatisticsStore | None = None,
    workers: Workers | None = None,
) -> dict[str, LayerStatistics]:
    """Statistics of the layers of a window, by name; layers whose method needs none are left out.

    What ``store`` has is taken from there, and the rest is kept there; no pass is made if nothing is missing. Several
    processes share the pass; the store is the first one's, and the result is everyone's.
    """
    workers = workers or Workers()
    watched = {layer.name: layer for layer in window if layer.statistics != "none"}
    modules = {name: model.get_submodule(name) for name in watched}
    found: dict[str, LayerStatistics] = {}
    if store is not None:
        loaded = {name: store.load(layer, stored_weight(modules[name]).device) for name, layer in watched.items()}
        found = {name: kept for name, kept in loaded.items() if kept is not None}
    for_any_method = config.statistics is not None
    statistics = {
        name: LayerStatistics.empty(layer.statistics_shape, stored_weight(modules[name]).device, for_any_method)
        for name, layer in watched.items()
        if name not in found
    }
    for name in workers.tell(list(found), 0):
        kept = found.setdefault(name, statistics.get(name))  # type: ignore[arg-type]
        statistics.pop(name, None)
        workers.hand_over(kept.hessian, 0)
        workers.hand_over(kept.bad_rows, 0)
    if calibration is None or not statistics:
        return found
    checkpointing = config.gradient_checkpointing
    if checkpointing is None:
        device = stored_weight(next(iter(modules.values()))).device
        longest = max(row.numel() for row in calibration.rows)
        checkpointing = _activation_bytes(model, longest) > _ACTIVATION_SHARE * free_memory(device)
    tokens = sum(row.numel() for row in workers.share(calibration.rows))
    with tqdm(total=tokens, desc=title, unit="token", unit_scale=True) as bar:
        collect(
            model,
            {name: modules[name] for name in statistics},
            statistics,
            calibration.rows,
            guided=config.guided,
            checkpointing=checkpointing,
            on_row=bar.update,
            workers=workers,
        )
    if store is not None:
        for name, collected in statistics.items():
            store.save(name, collected)
    return found | statistics


def _activation_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Rough size of what the backward pass keeps of one row without checkpointing.

    Inputs and outputs of all linear layers, twice over for what lies between them; the logits once more in fp32, with
    their gradient.
    """
    shapes = [linear_shape(module) for module in model.modules() if is_linear(module)]
    itemsize = model.dtype.itemsize
    logits = max(out_features for out_features, _ in shapes)
    return tokens * (2 * itemsize * sum(map(sum, shapes)) + 8 * logits)
