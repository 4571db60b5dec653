"""Run a step eagerly, compiled, or as a replayed CUDA graph, and notice when a graph is out of date."""

import logging
import warnings
from collections.abc import Callable, Hashable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

# Eager runs before capture: one compiles and loads kernels, the next is watched for waits of the host.
_WARM_UP = 2
_PLAIN = (bool, int, float, str)


class Compiled:
    """``function`` through ``torch.compile``, or as it is if it cannot be compiled."""

    def __init__(self, function: Any) -> None:
        self._function: Callable[..., Any] = function
        # A code object of its own: torch.compile keeps its results there, few per code object, and frees them with it.
        copy = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
        # Combined, small independent kernels (rotating queries and keys, filling the cache) are one launch.
        options: dict[str, Any] = {"combo_kernels": True}
        self._compiled: Callable[..., Any] | None = torch.compile(copy, fullgraph=True, dynamic=False, options=options)

    def __call__(self, *args: Any) -> Any:
        if self._compiled is not None:
            try:
                return self._compiled(*args)
            except TorchDynamoException as error:
                # Raised while compiling, that is before anything ran.
                logger.warning("The decode step runs uncompiled: %s", str(error).partition("\n")[0])
                self._compiled = None
        return self._function(*args)


class Replay:
    """Runs a function again and again: eagerly at first, then as one CUDA graph.

    The function takes and returns nothing but buffers that stay where they are. If it makes the host wait for the
    device it cannot be captured, and stays eager.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self.reset()

    def reset(self) -> None:
        """Drop the graph."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._runs = 0
        self._capturable = True

    def __call__(self, function: Callable[[], None]) -> None:
        if not self._capturable:
            function()
        elif self._graph is None and self._runs < _WARM_UP:
            self._warm_up(function)
        else:
            if self._graph is None:
                self._graph = self._capture(function)
            self._graph.replay()

    def _warm_up(self, function: Callable[[], None]) -> None:
        self._runs += 1
        here = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(here)
        waits = ""
        with torch.cuda.stream(self._stream):
            if self._runs < _WARM_UP:
                function()
            else:
                waits = _run_watched(function)
        here.wait_stream(self._stream)
        if waits:
            logger.warning("The decode step runs without a CUDA graph, because it makes the host wait: %s", waits)
            self._capturable = False

    def _capture(self, function: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # The outer context restores the caller's stream even if capture fails. Other threads may use the device.
        with (
            torch.cuda.stream(self._stream),
            torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
        ):
            function()
        return graph


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


def model_facts(model: nn.Module) -> Hashable:
    """What a captured graph takes for granted: where the tensors of a model are, and the settings of its modules."""
    return tuple(
        (name, facts(value))
        for module in model.modules()
        for name, value in vars(module).items()
        if not (isinstance(value, dict) and not value) and name != "_modules"
    )


def facts(value: Any, tensor: Callable[[Tensor], Hashable] = Tensor.data_ptr) -> Hashable:
    """The tensors and plain values inside ``value``, as something that can be compared."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, dict):
        return tuple((str(key), facts(item, tensor)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(facts(item, tensor) for item in value)
    if isinstance(value, PreTrainedConfig):
        return getattr(value, "_attn_implementation", None), getattr(value, "_experts_implementation", None)
    if not isinstance(value, Tensor):
        return None
    if is_traceable_wrapper_subclass(value):
        return tuple(facts(getattr(value, name), tensor) for name in value.__tensor_flatten__()[0])
    return tensor(value)


__all__ = ["Compiled", "Replay", "facts", "model_facts"]
