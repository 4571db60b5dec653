"""How a model is divided for the pass over the data: segments of decoder blocks whose Hessians fit in memory."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from ..config import GuidedQuantConfig
from ..errors import ModelError
from ..linears import stored_weight, tensors_of
from ..plan import LayerPlan
from ..resources import compute_device, free_memory
from ..workers import Workers
from .collector import LayerStatistics
from .outline import Outline, outline
from .relay import Relay
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


class Footprint:
    """The memory that calibrating and solving some of a model's blocks takes, by device.

    Args:
        model: On any devices.
        layers: What is to be quantized.
        drawn: The model's outline.
        place: Where the work on weights of a device is done.
        home: Where weights of a device lie; for those on the meta device.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[LayerPlan],
        drawn: Outline,
        place: Callable[[torch.device], torch.device],
        home: Callable[[torch.device], torch.device] = lambda device: device,
    ) -> None:
        self.outline = drawn
        self.count = max(1, len(drawn.blocks))
        self.layers: list[list[LayerPlan]] = [[] for _ in range(self.count)]
        # Bytes by device: always there, moved there for the whole pass, and of each block.
        self.resident, self._moved = Counter[torch.device](), Counter[torch.device]()
        # Of what is always there, what is still to come.
        self.pending = Counter[torch.device]()
        self._block_moved = [Counter[torch.device]() for _ in range(self.count)]
        self._hessians = [Counter[torch.device]() for _ in range(self.count)]
        self._kinds = [Counter[tuple[torch.device, LayerPlan]]() for _ in range(self.count)]
        self._taps = [0] * self.count
        inside = {
            id(tensor): number
            for number, name in enumerate(drawn.blocks)
            for tensor in tensors_of(model.get_submodule(name))
        }
        self._homes = [set[torch.device]() for _ in range(self.count)]
        planned = {layer.name: layer for layer in layers}
        for tensor in tensors_of(model):
            device, number = place(tensor.device), inside.get(id(tensor))
            if device == home(tensor.device):
                self.resident[device] += tensor.nbytes
                self.pending[device] += tensor.nbytes if tensor.is_meta else 0
            else:
                (self._moved if number is None else self._block_moved[number])[device] += tensor.nbytes
            self._homes[number or 0].add(device)
        for layer in layers:
            number = drawn.places.get(layer.name, 0)
            device = place(stored_weight(model.get_submodule(layer.name)).device)
            self.layers[number].append(layer)
            if not _has_twin(layer, planned, drawn):
                self._hessians[number][device] += layer.statistics_bytes
            self._kinds[number][device, replace(layer, name="")] += 1
            # A layer's activations, scaled, and whether they are finite.
            tokens = drawn.reads.get(layer.name, drawn.tokens)
            self._taps[number] = max(self._taps[number], 8 * tokens * layer.in_features)

    def hessians(self, start: int, stop: int) -> Counter[torch.device]:
        """Bytes of the blocks' Hessians."""
        return sum(self._hessians[start:stop], Counter())

    def __call__(self, start: int, stop: int) -> Counter[torch.device]:
        """Bytes that blocks from ``start`` to before ``stop`` take at the worst moment, beside what is always there."""
        found = self.hessians(start, stop)
        for device in set().union(*self._homes[start:stop]):
            here = [k for k in range(start, stop) if device in self._homes[k]]
            weights = self._moved[device] + sum(self._block_moved[k][device] for k in here)
            row = self.outline.row_bytes(here if self.outline.blocks else [])
            row += max(self._taps[k] for k in here)
            found[device] += max(weights + row, self._solver(here, device))
        return found

    def reconstruction(self, rows: int, itemsize: int) -> Counter[torch.device]:
        """Bytes that training the largest block takes at most, beside what is always there.

        An upper bound: what rows take is what they do with gradients all the way, which here begin at the first layer.

        Args:
            rows: That go through the block together.
            itemsize: Bytes of a number in products.
        """
        found = Counter[torch.device]()
        for number, layers in enumerate(self.layers if self.outline.blocks else []):
            row = self.outline.block_bytes(number)
            for device in {device for device, _ in self._kinds[number]}:
                sizes = [layer.weights for layer in layers]
                # A latent weight, its gradient and the two moments of that; its code and codeword.
                kept = (16 + 1 + itemsize) * sum(sizes)
                # Codes on the way to codewords, one layer at a time.
                need = self._moved[device] + self._block_moved[number][device] + kept + 16 * max(sizes) + rows * row
                found[device] = max(found[device], need)
        return found

    def _solver(self, blocks: Sequence[int], device: torch.device) -> int:
        """Bytes that the largest batch of alike layers takes to be solved."""
        kinds = sum((self._kinds[number] for number in blocks), Counter[tuple[torch.device, LayerPlan]]())
        sizes = (
            layer.solver_bytes(min(count, layer.batch_size(device)))
            for (where, layer), count in kinds.items()
            if where == device
        )
        return max(sizes, default=0)


def _has_twin(layer: LayerPlan, others: Mapping[str, LayerPlan], drawn: Outline) -> bool:
    """Whether one of the others has the very same statistics."""
    twin = others.get(drawn.twins.get(layer.name, ""))
    return twin is not None and twin.statistics == layer.statistics


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
    rooms = {device: _room(device, footprint, config) for device in footprint(0, footprint.count)}
    borders: list[tuple[int, int]] = []
    for start, stop in reversed(_indivisible(footprint, together)):
        if borders and _fits(footprint(start, borders[0][1]), rooms):
            borders[0] = (start, borders[0][1])
            continue
        borders.insert(0, (start, stop))
        _check(footprint, start, stop, rooms, config)
    waiting, free = (len(borders) - 1) * rows * footprint.outline.border, free_memory(torch.device("cpu"))
    if waiting > free:
        raise ModelError(
            f"Between {len(borders)} segments, hidden states of {rows} rows take {waiting / 2**30:.3g} GiB of CPU "
            f"memory, and {free / 2**30:.3g} GiB are free. Lower num_samples, or use a GPU with more memory."
        )
    if len(borders) > 1:
        logger.info("Memory allows for %s, so the model is calibrated in %d segments.", _room_text(rooms), len(borders))
    return [Segment(a, b, tuple(layer for block in footprint.layers[a:b] for layer in block)) for a, b in borders]


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
) -> dict[str, LayerStatistics]:
    """Statistics of the layers of a segment, by name; layers whose method needs none are left out.

    What ``store`` has is taken from there, and the rest is kept there; the rows do not move if nothing is missing.
    Several processes share the rows; the store is the first one's, and the result is everyone's.
    """
    workers = workers or Workers()
    place = place_for(config)
    devices = {layer.name: place(stored_weight(model.get_submodule(layer.name)).device) for layer in layers}
    wanted = {layer.name: layer for layer in layers if layer.statistics != "none"}
    for_any_method = config.statistics is not None

    def empty(name: str) -> LayerStatistics:
        return LayerStatistics.empty(wanted[name].statistics_shape, devices[name], for_any_method)

    found: dict[str, LayerStatistics] = {}
    if store is not None:
        loaded = {name: store.load(layer, devices[name]) for name, layer in wanted.items()}
        found = {name: kept for name, kept in loaded.items() if kept is not None}
    for name in workers.tell(list(found), 0):
        if name not in found:
            found[name] = empty(name)
        kept = found[name]
        for tensor in (kept.hessian, kept.bad_rows, kept.tokens):
            workers.hand_over(tensor, 0)
    missing = {name: layer for name, layer in wanted.items() if name not in found}
    collected = {name: empty(name) for name, layer in missing.items() if not _has_twin(layer, missing, relay.outline)}
    if collected:
        relay.collect(number, collected)
    found |= {name: collected[name if name in collected else relay.outline.twins[name]] for name in missing}
    if store is not None:
        # Checksums and disks take as long as the calibration of a small model.
        with ThreadPoolExecutor(_WRITERS) as pool:
            for saved in [pool.submit(store.save, name, found[name]) for name in missing]:
                saved.result()
    return found
