"""How often to go over the data, and what to watch each time: layers in windows whose Hessians fit in memory."""

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from ..config import GuidedQuantConfig
from ..linears import stored_weight
from ..plan import LayerPlan
from ..resources import free_memory
from .collector import LayerStatistics, activation_bytes, collect
from .rows import Calibration

# Shares of a device's free memory that Hessians, and one row's activations, may take by default.
_HESSIAN_SHARE, _ACTIVATION_SHARE = 0.4, 0.25


def windows(
    model: PreTrainedModel, layers: tuple[LayerPlan, ...], config: GuidedQuantConfig
) -> Iterator[list[LayerPlan]]:
    """Cut the layers, in model order, into windows whose statistics fit the memory budget of each device."""
    window: list[LayerPlan] = []
    used: dict[torch.device, int] = {}
    budgets: dict[torch.device, int] = {}
    for layer in layers:
        device = stored_weight(model.get_submodule(layer.name)).device
        if device not in budgets:
            share = int(_HESSIAN_SHARE * free_memory(device))
            budgets[device] = int(config.hessian_memory * 2**30) if config.hessian_memory else share
        if window and used.get(device, 0) + layer.statistics_bytes > budgets[device]:
            yield window
            window, used = [], {}
        window.append(layer)
        used[device] = used.get(device, 0) + layer.statistics_bytes
    yield window


def gather(
    model: PreTrainedModel, window: list[LayerPlan], calibration: Calibration | None, config: GuidedQuantConfig
) -> dict[str, LayerStatistics]:
    """Statistics of the layers of a window, by name; layers whose method needs none are left out."""
    watched = {layer.name: layer for layer in window if layer.statistics != "none"}
    if calibration is None or not watched:
        return {}
    modules = {name: model.get_submodule(name) for name in watched}
    statistics = {
        name: LayerStatistics.empty(layer.statistics_shape, stored_weight(modules[name]).device)
        for name, layer in watched.items()
    }
    checkpointing = config.gradient_checkpointing
    if checkpointing is None:
        first = stored_weight(modules[next(iter(modules))])
        tokens = max(row.numel() for row in calibration.rows)
        needed = activation_bytes(list(modules.values()), tokens, first.dtype)
        checkpointing = needed > _ACTIVATION_SHARE * free_memory(first.device)
    with tqdm(total=calibration.tokens, desc="Calibrating", unit="token", unit_scale=True) as bar:
        collect(
            model,
            modules,
            statistics,
            calibration.rows,
            guided=config.guided,
            checkpointing=checkpointing,
            on_row=bar.update,
        )
    return statistics
