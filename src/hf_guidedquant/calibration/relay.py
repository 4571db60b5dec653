"""Rows go through the model a segment of decoder blocks at a time, and their hidden states wait in between.

A model of several segments is run forward once to leave the hidden states at every border. Then, from the last segment
to the first, every row is run through the segment again, and backward from the gradient that the segment behind has
left: activations, Hessians and, where they have to be moved, weights of one segment exist at a time. A single segment
is the plain pass. The numbers are the same however the blocks are divided.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from ..linears import stored_weight, tensors_of
from ..running import evaluating, repeatable_backward
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
from .outline import Outline, hidden_states, replace_hidden_states


class Relay:
    """The calibration rows, and how far they are.

    Args:
        model: A causal language model; left as it was found.
        outline: Its decoder blocks.
        borders: ``(start, stop)`` of every segment, in blocks, from the first block to the last.
        rows: Token ids, int64 ``[T]`` each.
        guided: Weigh tokens by the squared output gradient; segments then come last to first. Otherwise all tokens
            count 1, there is no backward pass, and segments come first to last.
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
        place: Callable[[torch.device], torch.device] = lambda device: device,
        workers: Workers | None = None,
    ) -> None:
        self.outline = outline
        self._model, self._guided, self._place = model, guided, place
        self._borders = list(borders)
        self._workers = workers or Workers()
        self._total_rows = len(rows)
        self._rows = self._workers.share(rows)
        self._blocks = [model.get_submodule(name) for name in outline.blocks]
        # Of every row, on the CPU: the hidden states that enter a block, by its number, and the gradient of what left
        # the segment that comes next.
        self._states: dict[int, list[Tensor]] = {}
        self._gradients: list[Tensor] = []
        # Of every row, once there was a loss: whether it counts.
        self._valid: list[Tensor] = []
        self._entering: Tensor | None = None
        self._sending: set[torch.device] = set()
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
        bad_losses = torch.tensor(sum(not valid for valid in self._valid), device=self._input_device)
        self._workers.add_up(bad_losses)
        check_bad_rows(int(bad_losses), statistics, self._total_rows)

    def _title(self) -> str:
        count = len(self._borders)
        return f"Calibrating {count - len(self._waiting)}/{count}" if count > 1 else "Calibrating"

    def _forward(self, number: int, statistics: Mapping[str, LayerStatistics], title: str) -> None:
        """A segment without gradients; what leaves it is kept for the next."""
        start, stop = self._borders[number]
        left = []
        with torch.no_grad(), self._only(start, stop):
            row = Row(torch.ones((), dtype=torch.bool, device=self._input_device))
            with watched(self._modules(statistics), statistics, row):
                for index in self._progress(title):
                    state = self._run(index, start)
                    left += [self._put_aside(state)] if stop < len(self._blocks) else []
        self._arrive()
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
            stack.enter_context(self._only(start, stop))
            row = Row(torch.ones((), dtype=torch.bool, device=self._input_device))
            if self._rows:
                stack.enter_context(
                    repeatable_backward(self._input_device, lambda: self._run_back(0, start, stop, row))
                )
            stack.enter_context(tapped(self._modules(statistics), statistics, row))
            for index in self._progress(title):
                gradient = self._run_back(index, start, stop, row)
                gradients += [] if gradient is None else [self._put_aside(gradient)]
                if stop == len(self._blocks):
                    self._valid.append(row.valid)
        self._arrive()
        self._gradients = gradients
        self._states.pop(start, None)

    def _run_back(self, index: int, start: int, stop: int, row: Row) -> Tensor | None:
        """A row forward and backward; the gradient of what enters the segment, if it is not the first."""
        left = self._run(index, start)
        if stop == len(self._blocks):
            left, gradient = end_loss(left, self._rows[index]), None
            row.valid = torch.isfinite(left.detach())
        else:
            gradient, row.valid = self._gradients[index].to(left.device, non_blocking=True), self._valid[index]
        torch.autograd.backward(left, gradient)
        return None if self._entering is None else self._entering.grad

    def _put_aside(self, tensor: Tensor) -> Tensor:
        """A copy in the CPU's memory. From a GPU it is on its way until :meth:`_arrive`."""
        if tensor.device.type != "cuda":
            return tensor.detach().cpu()
        self._sending.add(tensor.device)
        aside = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return aside.copy_(tensor.detach(), non_blocking=True)

    def _arrive(self) -> None:
        while self._sending:
            torch.cuda.synchronize(self._sending.pop())

    def _run(self, index: int, start: int) -> Any:
        """Forward: the model's output, or the hidden states that enter the block behind the segment."""
        self._entering = None
        if start > 0:
            device = self._place(next(self._blocks[start].parameters()).device)
            states = self._states[start][index].to(device, non_blocking=True)
            self._entering = states.detach().requires_grad_(torch.is_grad_enabled())
        ids = self._rows[index].to(self._input_device)
        try:
            return self._model(input_ids=ids.unsqueeze(0), use_cache=False)
        except _Border as border:
            return border.states

    @property
    def _input_device(self) -> torch.device:
        return self._place(stored_weight(self._model.get_input_embeddings()).device)

    def _modules(self, statistics: Mapping[str, LayerStatistics]) -> dict[str, nn.Module]:
        return {name: self._model.get_submodule(name) for name in statistics}

    def _progress(self, title: str) -> Iterator[int]:
        """Numbers of the rows, under a bar that counts tokens."""
        with tqdm(total=sum(map(len, self._rows)), desc=title, unit="token", unit_scale=True) as bar:
            for index, row in enumerate(self._rows):
                yield index
                bar.update(row.numel())

    @contextmanager
    def _only(self, start: int, stop: int) -> Iterator[None]:
        """The model's forward runs these blocks only: it passes over those before, and ends at the block behind."""
        with ExitStack() as stack:
            stack.enter_context(evaluating(self._model))
            stack.enter_context(self._weights_in_place(start, stop))
            for block, outputs in zip(self._blocks[:start], self.outline.outputs, strict=False):
                stack.enter_context(_passed_over(block, outputs))
            if start > 0:
                stack.callback(self._blocks[start].register_forward_pre_hook(self._enter, with_kwargs=True).remove)
            if stop < len(self._blocks):
                stack.callback(self._blocks[stop].register_forward_pre_hook(_leave, with_kwargs=True).remove)
            yield

    def _enter(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        # A copy, because models may change hidden states in place.
        assert self._entering is not None
        return replace_hidden_states(args, kwargs, self._entering.clone())

    @contextmanager
    def _weights_in_place(self, start: int, stop: int) -> Iterator[None]:
        """Weights that the segment needs are where they are worked on; afterwards all are where they were."""
        absent = {id(t) for k, block in enumerate(self._blocks) if not start <= k < stop for t in tensors_of(block)}
        moved = []
        try:
            for tensor in tensors_of(self._model):
                place = self._place(tensor.device)
                if place != tensor.device and id(tensor) not in absent:
                    moved.append((tensor, tensor.data))
                    tensor.data = tensor.data.to(place)
            yield
        finally:
            for tensor, data in moved:
                tensor.data = data


class _Border(Exception):  # noqa: N818  Nothing went wrong.
    """The block behind the segment is about to run."""

    def __init__(self, states: Tensor) -> None:
        self.states = states


def _leave(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    raise _Border(hidden_states(args, kwargs))


@contextmanager
def _passed_over(block: nn.Module, outputs: int | None) -> Iterator[None]:
    """A decoder block that gives back what it is given, in the form in which it gives its output."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        states = hidden_states(args, kwargs)
        return states if outputs is None else (states, *[None] * (outputs - 1))

    own = block.__dict__.get("forward")
    block.forward = forward
    try:
        yield
    finally:
        if own is None:
            del block.forward
        else:
            block.forward = own
