"""A part of a model: some of its decoder blocks, from the hidden states that enter them to those that leave."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..linears import stored_weight, tensors_of
from ..running import evaluating
from .outline import Outline, hidden_states, replace_hidden_states


class Passage:
    """Runs some of a model's decoder blocks through the model's own forward.

    Args:
        model: A causal language model; left as it was found.
        outline: Its decoder blocks.
        place: Where the work on weights of a device is done; they are there while they are needed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        outline: Outline,
        place: Callable[[torch.device], torch.device] = lambda device: device,
    ) -> None:
        self._model, self._outline, self._place = model, outline, place
        self._blocks = [model.get_submodule(name) for name in outline.blocks]
        self._entering: Tensor | None = None
        self._start = 0

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def input_device(self) -> torch.device:
        """Where token ids go."""
        return self._place(stored_weight(self._model.get_input_embeddings()).device)

    @property
    def device(self) -> torch.device:
        """Where the first block of this part works."""
        return self._place(next(self._blocks[self._start].parameters()).device)

    @contextmanager
    def only(self, start: int, stop: int, head: bool = True) -> Iterator[None]:
        """Inside, :meth:`run` runs the blocks from ``start`` to before ``stop``.

        Args:
            start, stop: Numbers of blocks; equal for what comes before the blocks.
            head: Whether what comes behind the blocks belongs to the last one.
        """
        self._start = start
        with ExitStack() as stack:
            stack.enter_context(evaluating(self._model))
            stack.enter_context(self._weights_in_place(start, stop))
            for block, outputs in zip(self._blocks[:start], self._outline.outputs, strict=False):
                stack.enter_context(_passed_over(block, outputs))
            if start < len(self._blocks):
                stack.callback(self._blocks[start].register_forward_pre_hook(self._enter, with_kwargs=True).remove)
            if stop < len(self._blocks):
                stack.callback(self._blocks[stop].register_forward_pre_hook(_leave_before, with_kwargs=True).remove)
            elif not head:
                stack.callback(self._blocks[-1].register_forward_hook(_leave_behind).remove)
            yield

    def run(self, rows: Tensor, states: Tensor | None = None) -> Any:
        """Rows forward, inside :meth:`only`.

        Args:
            rows: Token ids, int64 ``[rows, T]``.
            states: Hidden states ``[rows, T, hidden]`` that enter the first of the blocks, on its device; for the
                model's first one, None is what the embeddings give.

        Returns:
            The hidden states that leave the last block, or the model's output if what comes behind belongs to it.
        """
        self._entering = states
        try:
            return self._model(input_ids=rows.to(self.input_device), use_cache=False)
        except _Border as border:
            return border.states

    def _enter(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if self._entering is None:
            return None
        # A copy, because models may change hidden states in place.
        return replace_hidden_states(args, kwargs, self._entering.clone())

    @contextmanager
    def _weights_in_place(self, start: int, stop: int) -> Iterator[None]:
        """Weights that are needed are where they are worked on; afterwards all are where they were."""
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


class Shelf:
    """Puts tensors aside in the CPU's memory. From a GPU they are on their way until :meth:`settle`."""

    def __init__(self) -> None:
        self._sending: set[torch.device] = set()

    def put(self, tensor: Tensor, place: Tensor | None = None) -> Tensor:
        """A copy, without gradient; in ``place`` if that will do, which is what an earlier call gave."""
        if tensor.device.type != "cuda":
            return tensor.detach().cpu()
        self._sending.add(tensor.device)
        if place is None or (place.shape, place.dtype) != (tensor.shape, tensor.dtype):
            # Pinned memory takes milliseconds to get.
            place = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return place.copy_(tensor.detach(), non_blocking=True)

    def settle(self) -> None:
        """Wait until all have arrived."""
        while self._sending:
            torch.cuda.synchronize(self._sending.pop())


def shelved(nbytes: int, device: torch.device) -> int:
    """Bytes that a tensor from ``device`` takes on a :class:`Shelf`."""
    # torch rounds pinned memory up to a power of two.
    return 1 << (nbytes - 1).bit_length() if nbytes and device.type == "cuda" else nbytes


class _Border(Exception):  # noqa: N818  Nothing went wrong.
    """The hidden states have come to the end of the part."""

    def __init__(self, states: Tensor) -> None:
        self.states = states


def _leave_before(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    raise _Border(hidden_states(args, kwargs))


def _leave_behind(block: nn.Module, args: tuple, output: Any) -> None:
    raise _Border(output[0] if isinstance(output, tuple) else output)


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


__all__ = ["Passage", "Shelf", "shelved"]
