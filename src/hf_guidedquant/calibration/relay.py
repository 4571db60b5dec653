"""Rows go through the model a segment of decoder blocks at a time, and their hidden states wait in between.

A model of several segments is run forward once to leave the hidden states at every border. Then, from the last segment
to the first, every row is run through the segment again, and backward from the gradient that the segment behind has
left: activations, Hessians and, where they have to be moved, weights of one segment exist at a time. A single segment
is the plain pass. The numbers are the same however the blocks are divided.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from ..running import repeatable_backward, rows_of_their_own
from ..workers import Workers
from .collector import (
    LayerStatistics,
    Row,
    check_bad_rows,
    end_loss,
    gradients_of_activations_only,
    tapped,
    watched,
)
from .outline import Outline
from .passage import Passage, Shelf


def waiting(segments: int, guided: bool) -> int:
    """How often hidden states of all rows, or their gradients, wait on the CPU at most."""
    # Those that enter the segments behind the first, and gradients on their way; or those that enter and that leave.
    return segments if guided and segments > 1 else min(segments - 1, 2)


class Relay:
    """The calibration rows, and how far they are.

    Args:
        model: A causal language model; left as it was found.
        outline: Its decoder blocks.
        borders: ``(start, stop)`` of every segment, in blocks, from the first block to the last.
        rows: Token ids, int64 ``[T]`` each.
        guided: Weigh tokens by the squared output gradient; segments then come last to first. Otherwise all tokens
            count 1, there is no backward pass, and segments come first to last.
        labels: The rows with -100 in place of tokens that the loss does not count. Default: It counts all.
        place: Where the work on weights of a device is done; they are there while their segment runs.
        workers: Processes that share the rows; all end with the statistics of all rows.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        outline: Outline,
        borders: Sequence[tuple[int, int]],
        rows: Sequence[Tensor],
        *,
        guided: bool,
        labels: Sequence[Tensor] | None = None,
        place: Callable[[torch.device], torch.device] = lambda device: device,
        workers: Workers | None = None,
    ) -> None:
        self.outline = outline
        self._model, self._guided = model, guided
        self._borders = list(borders)
        self._workers = workers or Workers()
        self._total_rows = len(rows)
        self._rows = self._workers.share(rows)
        self._labels = self._rows if labels is None else self._workers.share(labels)
        self._passage = Passage(model, outline, place)
        # Of every row, on the CPU: the hidden states that enter a block, by its number, and the gradient of what left
        # the segment that comes next.
        self._states: dict[int, list[Tensor]] = {}
        self._gradients: list[Tensor] = []
        # Of every row, once there was a loss: whether it counts.
        self._valid: list[Tensor] = []
        self._entering: Tensor | None = None
        self._shelf = Shelf()
        self._waiting = self.order

    @property
    def order(self) -> list[int]:
        """Numbers of the segments, in the order in which their statistics come."""
        numbers = list(range(len(self._borders)))
        return numbers[::-1] if self._guided else numbers

    def collect(self, segment: int, statistics: Mapping[str, LayerStatistics]) -> None:
        """Take the rows through a segment and add to ``statistics``, in place.

        Args:
            segment: Its number, later in :attr:`order` than those of earlier calls. Segments in between are run
                without statistics.
            statistics: The (empty) statistics of linear modules that run in the segment, by name.

        Raises:
            CalibrationError: More than 10 % of the rows had to be left out, of the model or of one layer.
            ModelError: The model gives no logits.
        """
        if self._guided and not self._states and len(self._waiting) == len(self._borders):
            for number in range(len(self._borders) - 1):
                self._forward(number, {}, f"Reading {number + 1}/{len(self._borders) - 1}")
        walk = self._backward if self._guided else self._forward
        while (number := self._waiting.pop(0)) != segment:
            walk(number, {}, self._title())
        walk(number, statistics, self._title())
        for layer in statistics.values():
            layer.add_up(self._workers)
        bad_losses = torch.tensor(sum(not valid for valid in self._valid), device=self._passage.input_device)
        self._workers.add_up(bad_losses)
        check_bad_rows(int(bad_losses), statistics, self._total_rows)

    def _title(self) -> str:
        count = len(self._borders)
        return f"Calibrating {count - len(self._waiting)}/{count}" if count > 1 else "Calibrating"

    def _forward(self, number: int, statistics: Mapping[str, LayerStatistics], title: str) -> None:
        """A segment without gradients; what leaves it is kept for the next."""
        start, stop = self._borders[number]
        left = []
        with torch.no_grad(), self._passage.only(start, stop), rows_of_their_own():
            row = Row(torch.ones((), dtype=torch.bool, device=self._passage.input_device))
            with watched(self._modules(statistics), statistics, row):
                for index in self._progress(title):
                    state = self._run(index, start)
                    left += [self._shelf.put(state)] if stop < len(self._passage) else []
        self._shelf.settle()
        self._states[stop] = left
        if not self._guided:
            self._states.pop(start, None)

    def _backward(self, number: int, statistics: Mapping[str, LayerStatistics], title: str) -> None:
        """A segment with gradients, from the loss or from what the segment behind has left."""
        start, stop = self._borders[number]
        gradients = []
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(gradients_of_activations_only(self._model))
            stack.enter_context(self._passage.only(start, stop))
            stack.enter_context(rows_of_their_own())
            row = Row(torch.ones((), dtype=torch.bool, device=self._passage.input_device))
            if self._rows:
                stack.enter_context(
                    repeatable_backward(self._passage.input_device, lambda: self._run_back(0, start, stop, row))
                )
            stack.enter_context(tapped(self._modules(statistics), statistics, row))
            for index in self._progress(title):
                gradient = self._run_back(index, start, stop, row)
                gradients += [] if gradient is None else [self._shelf.put(gradient)]
                if stop == len(self._passage):
                    self._valid.append(row.valid)
        self._shelf.settle()
        self._gradients = gradients
        self._states.pop(start, None)

    def _run_back(self, index: int, start: int, stop: int, row: Row) -> Tensor | None:
        """A row forward and backward; the gradient of what enters the segment, if it is not the first."""
        left = self._run(index, start)
        if stop == len(self._passage):
            left, gradient = end_loss(left, self._labels[index]), None
            row.valid = torch.isfinite(left.detach())
        else:
            gradient, row.valid = self._gradients[index].to(left.device, non_blocking=True), self._valid[index]
        torch.autograd.backward(left, gradient)
        return None if self._entering is None else self._entering.grad

    def _run(self, index: int, start: int) -> Any:
        """Forward: the model's output, or the hidden states that enter the block behind the segment."""
        self._entering = None
        if start > 0:
            states = self._states[start][index].to(self._passage.device, non_blocking=True)
            self._entering = states.detach().requires_grad_(torch.is_grad_enabled())
        return self._passage.run(self._rows[index][None], self._entering)

    def _modules(self, statistics: Mapping[str, LayerStatistics]) -> dict[str, nn.Module]:
        return {name: self._model.get_submodule(name) for name in statistics}

    def _progress(self, title: str) -> Iterator[int]:
        """Numbers of the rows, under a bar that counts tokens."""
        with tqdm(total=sum(map(len, self._rows)), desc=title, unit="token", unit_scale=True) as bar:
            for index, row in enumerate(self._rows):
                yield index
                bar.update(row.numel())


__all__ = ["Relay", "waiting"]
