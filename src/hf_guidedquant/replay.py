"""Work that is done again and again on a GPU, as a CUDA graph: nothing is launched one by one any more."""

import logging
import warnings
from collections.abc import Callable, Hashable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .linears import size_of
from .running import hooked

logger = logging.getLogger(__name__)

# Eager runs before capture: one compiles and loads kernels, the next is watched for waits of the host.
_WARM_UP = 2
# Shapes of inputs that have graphs; others are rare.
_GRAPHS = 4
# Bytes of a small model.
_SMALL_MODEL = 4 * 2**30


class Replay:
    """Runs a function again and again: eagerly at first, then as one CUDA graph.

    The function takes and returns nothing but buffers that stay where they are. If it makes the host wait for the
    device it cannot be captured, and stays eager.

    Args:
        device: A GPU.
        title: What runs, for the log.

    Attributes:
        capturable: False once the function has turned out to make the host wait, or could not be captured.
    """

    def __init__(self, device: torch.device, title: str) -> None:
        self._stream, self._title = torch.cuda.Stream(device), title
        self.reset()

    def reset(self) -> None:
        """Drop the graph."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._runs = 0
        self.capturable = True

    def __call__(self, function: Callable[[], None]) -> None:
        if not self.capturable:
            function()
        elif self._graph is None and self._runs < _WARM_UP:
            self._warm_up(function)
        else:
            if self._graph is None:
                try:
                    self._graph = self._capture(function)
                except BaseException:
                    self.capturable = False
                    raise
            self._graph.replay()

    def _warm_up(self, function: Callable[[], None]) -> None:
        here = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(here)
        waits = ""
        with torch.cuda.stream(self._stream):
            if self._runs < _WARM_UP - 1:
                function()
            else:
                waits = _run_watched(function)
        here.wait_stream(self._stream)
        # A run that was interrupted has loaded nothing to rely on.
        self._runs += 1
        if waits:
            logger.warning("%s runs without a CUDA graph, because it makes the host wait: %s", self._title, waits)
            self.capturable = False

    def _capture(self, function: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # The outer context restores the caller's stream even if capture fails. Other threads may use the device.
        with (
            torch.cuda.stream(self._stream),
            torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
        ):
            function()
        return graph


class Replays:
    """A function of a few tensors that is run again and again, on one GPU as CUDA graphs.

    Args:
        function: ``(*tensors) -> None``. The tensors are buffers, the same in every call with the same shapes; what it
            gives, it writes to other buffers.
        device: Where the tensors are wanted.
        graphs: Whether graphs may be used; see :func:`worth_graphs`.
        title: What runs, for the log.
    """

    def __init__(self, function: Callable[..., None], device: torch.device, graphs: bool, title: str) -> None:
        self._function, self._device, self._graphs, self._title = function, device, graphs, title
        self._buffers: dict[Hashable, list[Tensor]] = {}
        self._replays: dict[Hashable, Replay] = {}

    def __call__(self, *inputs: Sequence[Tensor]) -> None:
        """Run the function on each input's tensors (of one shape, on any device) stacked along a new dimension."""
        key = tuple((len(each), each[0].shape, each[0].dtype) for each in inputs)
        if key not in self._buffers:
            self._buffers[key] = [
                torch.empty(len(each), *each[0].shape, dtype=each[0].dtype, device=self._device) for each in inputs
            ]
            if self._graphs and len(self._replays) < _GRAPHS:
                self._replays[key] = Replay(self._device, self._title)
        buffers = self._buffers[key]
        for buffer, tensors in zip(buffers, inputs, strict=True):
            for place, tensor in zip(buffer, tensors, strict=True):
                place.copy_(tensor, non_blocking=True)
        run = partial(self._function, *buffers)
        if key in self._replays:
            self._replays[key](run)
        else:
            run()


def stacked(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Tensors of one shape as one, on a device."""
    return torch.stack([tensor.to(device, non_blocking=True) for tensor in tensors])


def worth_graphs(model: nn.Module, device: torch.device) -> bool:
    """Whether work on a model is done on one GPU, and waits for its launches more than for itself.

    Large models keep a GPU busy anyway, and need the memory that a graph keeps for itself.
    """
    return device.type == "cuda" and size_of(model) <= _SMALL_MODEL and not hooked(model)


def _run_watched(function: Callable[[], None]) -> str:
    """Run, and return where the host waited for the device, or nothing.

    A capture that fails would leave CUDA's random generator unusable, so this asks beforehand.
    """
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    # Not the notice that the mode itself is a prototype.
    waits = [f"{w.filename}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)]
    return ", ".join(dict.fromkeys(waits))


__all__ = ["Replay", "Replays", "stacked", "worth_graphs"]
