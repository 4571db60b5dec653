"""The memory that a run takes on every device: decoder blocks that are calibrated, solved and trained."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain

import torch
from transformers import PreTrainedModel

from ..linears import stored_weight, tensors_of
from ..plan import LayerPlan
from .gram import groups_at_a_time
from .outline import Outline


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
        # Bytes of a layer's own weight.
        self._dense: dict[str, int] = {}
        self._devices: dict[str, torch.device] = {}
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
            weight = stored_weight(model.get_submodule(layer.name))
            number, device = drawn.places.get(layer.name, 0), place(weight.device)
            self.layers[number].append(layer)
            self._dense[layer.name] = weight.nbytes
            self._devices[layer.name] = device
            if not has_twin(layer, planned, drawn):
                self._hessians[number][device] += layer.statistics_bytes
            self._kinds[number][device, replace(layer, name="")] += 1
            # A layer's activations, and those scaled for groups, or their squares.
            size = drawn.reads.get(layer.name, drawn.tokens) * layer.in_features
            together = groups_at_a_time(layer.in_features, layer.num_groups) if layer.statistics == "hessian" else 1
            taken = 4 * (1 + together) * size
            if layer.output_curvature:
                # The gradients of the outputs, and those that are multiplied.
                taken = max(taken, 4 * (size + 2 * size // layer.in_features * layer.out_features))
            self._taps[number] = max(self._taps[number], taken)

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

    def reconstruction(self, rows: int, itemsize: int, chunk: int, codes: bool) -> Counter[torch.device]:
        """Bytes that training the largest block takes at most, beside what is always there.

        An upper bound: what rows take is what they do with gradients all the way, which here begin at the first layer.

        Args:
            rows: That go through the block together.
            itemsize: Bytes of a number in products.
            chunk: Numbers of a weight gradient that exist at a time, where codes stay.
            codes: Whether they move.
        """
        found = Counter[torch.device]()
        for number, layers in enumerate(self.layers if self.outline.blocks else []):
            for device in {device for device, _ in self._kinds[number]}:
                if codes:
                    row = self.outline.block_bytes(number)
                    sizes = [layer.weights for layer in layers]
                    # Where a latent weight starts, how far it has moved, the gradient and its two moments; its code
                    # and codeword. And codes on the way to codewords, one layer at a time.
                    need = (20 + 1 + itemsize) * sum(sizes) + 16 * max(sizes)
                else:
                    row = self._row(number, itemsize)
                    # Codes as they were solved and as they are trained, and a codebook, its gradient and its moments.
                    need = sum(2 * layer.packed_bytes + 16 * layer.out_features * 2**layer.bits for layer in layers)
                    need += max(self._expanded(layer, device, rows, itemsize, chunk) for layer in layers)
                need += self._moved[device] + self._block_moved[number][device] + rows * row
                found[device] = max(found[device], need)
        return found

    def prediction(self, rows: int) -> Counter[torch.device]:
        """Bytes that the whole model takes to run forward at most, beside what is always there.

        Args:
            rows: That go through the model together.
        """
        found = self._visiting()
        for device in self._everywhere():
            found[device] += rows * max(self._row(number) for number in self._numbers(device))
        return found

    def distillation(
        self, rows: int, itemsize: int, chunk: int, logits: int, vocabulary: tuple[str | None, str | None]
    ) -> Counter[torch.device]:
        """Bytes that training the codebooks of all layers takes at most, beside what is always there before it.

        Quantized layers stand where the layers were, so the result can be negative.

        Args:
            rows: That go through the model together.
            itemsize: Bytes of a number in products.
            chunk: Numbers of a weight gradient that exist at a time.
            logits: Bytes that logits and what is computed of them take.
            vocabulary: Names of the input embeddings and the output head. They are not trained, and the original head
                is still needed.
        """
        found, work = self._visiting(), Counter[torch.device]()
        for layer in chain(*self.layers):
            device = self._devices[layer.name]
            found[device] += layer.packed_bytes
            if layer.name == vocabulary[1]:
                logits += itemsize * layer.weights
                continue
            found[device] -= self._dense[layer.name]
            if layer.name == vocabulary[0]:
                continue
            # A codebook, its gradient, the two moments of that, and the best one so far.
            found[device] += 20 * layer.out_features * 2**layer.bits
            work[device] = max(work[device], self._expanded(layer, device, rows, itemsize, chunk))
        border = rows * self.outline.border
        behind = rows * self.outline.before + (self.count + 3) * border + logits
        for device in self._everywhere():
            numbers = self._numbers(device)
            # Of the blocks before, only what they read is kept.
            most = max(number * border + rows * self._row(number, itemsize) for number in numbers) + work[device]
            found[device] += max(most, behind if numbers[-1] == self.count - 1 else 0)
        return found

    def _expanded(self, layer: LayerPlan, device: torch.device, rows: int, itemsize: int, chunk: int) -> int:
        """Bytes of what exists for a moment while a codebook is trained: the weight, or its gradient in parts."""
        tokens = self.outline.reads.get(layer.name, self.outline.tokens)
        # The gradient of a part of the weight, its codes, and where they are the one that is summed; without tensor
        # cores, activations and gradients of the outputs in fp32 besides.
        wide = 0 if device.type == "cuda" or itemsize > 2 else 4 * rows * tokens
        summing = 10 * min(layer.weights, chunk) + wide * (layer.in_features + layer.out_features)
        return max(summing, itemsize * layer.weights)

    def _visiting(self) -> Counter[torch.device]:
        """Bytes of all weights that are moved to where the work is done."""
        return sum(self._block_moved, Counter(self._moved))

    def _everywhere(self) -> set[torch.device]:
        return set().union(*self._homes)

    def _numbers(self, device: torch.device) -> list[int]:
        """Of the blocks on a device."""
        return [number for number, devices in enumerate(self._homes) if device in devices]

    def _row(self, number: int, itemsize: int = 0) -> int:
        """Bytes that a row takes at the worst moment in a block alone, or in a model that is not run by blocks.

        Args:
            number: Of the block.
            itemsize: Bytes of a number that a layer reads, if these are kept for the gradients of weights.
        """
        drawn = self.outline
        if not drawn.blocks:
            return drawn.row_bytes([])
        # What several layers read counts once, whichever of them are quantized.
        read = {
            drawn.twins.get(layer.name, layer.name): drawn.reads.get(layer.name, drawn.tokens) * layer.in_features
            for layer in self.layers[number]
        }
        return drawn.block_bytes(number) + sum(read.values()) * itemsize

    def _solver(self, blocks: Sequence[int], device: torch.device) -> int:
        """Bytes that the largest batch of alike layers takes to be solved."""
        kinds = sum((self._kinds[number] for number in blocks), Counter[tuple[torch.device, LayerPlan]]())
        sizes = (
            layer.solver_bytes(device, min(count, layer.batch_size(device)))
            for (where, layer), count in kinds.items()
            if where == device
        )
        return max(sizes, default=0)


def has_twin(layer: LayerPlan, others: Mapping[str, LayerPlan], drawn: Outline) -> bool:
    """Whether one of the others has the very same statistics: where gradients weigh the tokens, none has."""
    if drawn.guided:
        return False
    twin = others.get(drawn.twins.get(layer.name, ""))
    return twin is not None and twin.statistics == layer.statistics


__all__ = ["Footprint", "has_twin"]
