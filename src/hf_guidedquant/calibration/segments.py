"""How a model is divided for the pass over the data: segments of decoder blocks whose Hessians fit in memory."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..config import GuidedQuantConfig
from ..errors import ModelError
from ..linears import stored_weight
from ..plan import LayerPlan
from ..resources import compute_device, free_memory
from ..workers import Workers
from .collector import LayerStatistics
from .footprint import Footprint, has_twin
from .outline import Outline, outline
from .relay import Relay, waiting
from .rows import Calibration
from .store import StatisticsStore

logger = logging.getLogger(__name__)

# Shares of the free memory to plan with. The rest is for what an allocator cannot use and libraries take.
_SHARE_GPU, _SHARE_CPU = 0.92, 0.8
# Layers whose statistics are written to disk at the same time.
_WRITERS = 4


@dataclass(frozen=True)
class Segment:
    """Decoder blocks from ``start`` to before ``stop``, and the layers in them that are to be quantized."""

    start: int
    stop: int
    layers: tuple[LayerPlan, ...]


def place_for(config: GuidedQuantConfig) -> Callable[[torch.device], torch.device]:
    """Where the work on weights of a device is done."""
    return lambda home: compute_device(home, config.device)


def outline_for(model: PreTrainedModel, config: GuidedQuantConfig, calibration: Calibration | None) -> Outline:
    """How the model runs, for the longest row; an empty outline without data."""
    if calibration is None:
        return Outline()
    return outline(model, max(map(len, calibration.rows)), config.guided, place_for(config))


def relay_for(
    model: PreTrainedModel,
    config: GuidedQuantConfig,
    drawn: Outline,
    segments: Sequence[Segment],
    calibration: Calibration | None,
    workers: Workers,
) -> Relay:
    """The rows at the start, to go through these segments."""
    rows, labels = ([], None) if calibration is None else (calibration.rows, calibration.labels)
    # A model that cannot be run in parts is one segment without blocks.
    borders = [(segment.start, min(segment.stop, len(drawn.blocks))) for segment in segments]
    place = place_for(config)
    return Relay(model, drawn, borders, rows, guided=config.guided, labels=labels, place=place, workers=workers)


def divide(
    footprint: Footprint, config: GuidedQuantConfig, rows: int = 0, together: Iterable[Sequence[LayerPlan]] = ()
) -> list[Segment]:
    """As few segments as fit into the memory of every device.

    Args:
        footprint: What blocks take.
        config: ``max_memory`` limits what may be used.
        rows: Calibration rows whose hidden states wait between segments.
        together: Layers that must not be divided.

    Raises:
        ModelError: Not even one block fits, or what waits between the segments does not.
    """
    rooms = _rooms(footprint, config)
    borders: list[tuple[int, int]] = []
    for start, stop in reversed(_indivisible(footprint, together)):
        if borders and _fits(footprint(start, borders[0][1]), rooms):
            borders[0] = (start, borders[0][1])
            continue
        borders.insert(0, (start, stop))
        _check(footprint, start, stop, rooms, config)
    states = waiting(len(borders), config.guided) * rows * footprint.outline.border
    if states > (free := free_memory(torch.device("cpu"))):
        raise ModelError(
            f"Between {len(borders)} segments, hidden states of {rows} rows take {states / 2**30:.3g} GiB of CPU "
            f"memory, and {free / 2**30:.3g} GiB are free. Lower num_samples, or use a GPU with more memory."
        )
    if len(borders) > 1:
        logger.info("Memory allows for %s, so the model is calibrated in %d segments.", _room_text(rooms), len(borders))
    return [Segment(a, b, tuple(layer for block in footprint.layers[a:b] for layer in block)) for a, b in borders]


def fit_at_once(footprint: Footprint, config: GuidedQuantConfig) -> bool:
    """Whether one segment will do."""
    return _fits(footprint(0, footprint.count), _rooms(footprint, config))


def _indivisible(footprint: Footprint, together: Iterable[Sequence[LayerPlan]]) -> list[tuple[int, int]]:
    """The smallest segments: single blocks, but for layers that have to stay together."""
    stops = [number + 1 for number in range(footprint.count)]
    places = {layer.name: number for number, block in enumerate(footprint.layers) for layer in block}
    for batch in together:
        numbers = [places[layer.name] for layer in batch]
        stops[min(numbers)] = max(stops[min(numbers)], max(numbers) + 1)
    found, start = [], 0
    while start < footprint.count:
        stop = start + 1
        number = start
        while number < stop:
            stop = max(stop, stops[number])
            number += 1
        found.append((start, stop))
        start = stop
    return found


def _rooms(footprint: Footprint, config: GuidedQuantConfig) -> dict[torch.device, int]:
    return {device: _room(device, footprint, config) for device in footprint(0, footprint.count)}


def _room(device: torch.device, footprint: Footprint, config: GuidedQuantConfig) -> int:
    """Bytes that may be used on a device beside the weights that lie there."""
    free = free_memory(device) - footprint.pending[device]
    room = int((_SHARE_CPU if device.type == "cpu" else _SHARE_GPU) * free)
    if config.max_memory is None:
        return room
    return min(room, int(config.max_memory * 2**30) - footprint.resident[device])


def _room_text(rooms: Mapping[torch.device, int]) -> str:
    return ", ".join(f"{max(0, room) / 2**30:.3g} GiB beside the weights on {device}" for device, room in rooms.items())


def _fits(need: Mapping[torch.device, int], rooms: Mapping[torch.device, int]) -> bool:
    return all(need[device] <= room for device, room in rooms.items())


def _check(
    footprint: Footprint, start: int, stop: int, rooms: Mapping[torch.device, int], config: GuidedQuantConfig
) -> None:
    """Refuse what cannot work; say what may not."""
    for device, need in footprint(start, stop).items():
        room, hessians = rooms[device], footprint.hessians(start, stop)[device]
        if need <= room:
            continue
        blocks = footprint.outline.blocks[start:stop]
        where = f"{blocks[0]}{f' to {blocks[-1]}' if len(blocks) > 1 else ''}" if blocks else "the model"
        message = (
            f"Quantizing {where} takes {need / 2**30:.3g} GiB beside the weights on {device}, of which Hessians "
            f"{hessians / 2**30:.3g} GiB, and {max(0, room) / 2**30:.3g} GiB can be used"
        )
        if config.max_memory is not None or hessians > room:
            limit = f"raise max_memory ({config.max_memory:g}), " if config.max_memory is not None else ""
            advice = f"{limit}lower num_groups ({config.num_groups}) or seq_len ({config.seq_len})"
            raise ModelError(f"{message}. {advice[0].upper()}{advice[1:]}, or leave layers out.")
        logger.warning("%s. It may not be enough.", message)


def gather(
    model: PreTrainedModel,
    relay: Relay,
    number: int,
    layers: Sequence[LayerPlan],
    config: GuidedQuantConfig,
    store: StatisticsStore | None = None,
    workers: Workers | None = None,
    diagonals: bool = False,
) -> dict[str, LayerStatistics]:
    """Statistics of the layers of a segment, by name; layers whose method needs none are left out.

    With ``diagonals`` there are those beside the Hessians.

    What ``store`` has is taken from there, and the rest is kept there; the rows do not move if nothing is missing.
    Several processes share the rows; the store is the first one's, and the result is everyone's.
    """
    workers = workers or Workers()
    place = place_for(config)
    devices = {layer.name: place(stored_weight(model.get_submodule(layer.name)).device) for layer in layers}
    wanted = {layer.name: layer for layer in layers if layer.statistics != "none"}
    for_any_method = diagonals or config.statistics is not None

    def empty(name: str) -> LayerStatistics:
        layer = wanted[name]
        return LayerStatistics.empty(layer.statistics_shape, devices[name], for_any_method, layer.curvature_shape)

    found: dict[str, LayerStatistics] = {}
    if store is not None:
        loaded = {name: store.load(layer, devices[name]) for name, layer in wanted.items()}
        found = {name: kept for name, kept in loaded.items() if kept is not None}
    for name in workers.tell(list(found), 0):
        if name not in found:
            found[name] = empty(name)
        kept = found[name]
        for tensor in (kept.hessian, kept.bad_rows, kept.tokens, kept.diagonal, kept.curvature):
            if tensor is not None:
                workers.hand_over(tensor, 0)
    missing = {name: layer for name, layer in wanted.items() if name not in found}
    collected = {name: empty(name) for name, layer in missing.items() if not has_twin(layer, missing, relay.outline)}
    if collected:
        relay.collect(number, collected)
    found |= {name: collected[name if name in collected else relay.outline.twins[name]] for name in missing}
    if store is not None:
        # Checksums and disks take as long as the calibration of a small model. After a failure no more are begun.
        with ThreadPoolExecutor(_WRITERS) as pool:
            for _ in pool.map(store.save, missing, [found[name] for name in missing]):
                pass
    return found
