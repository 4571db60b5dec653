"""Compile a step, and notice when a captured graph of it is out of date."""

import logging
from collections.abc import Callable, Hashable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import exc
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

# More variants of one function than torch keeps: adapters, say, that are switched on one after the other.
_TOO_MANY: Any = getattr(exc, "FailOnRecompileLimitHit", ())
_PLAIN = (bool, int, float, str)
_TENSORS = (Tensor, nn.Parameter)


class Compiled:
    """``function`` through ``torch.compile``, or as it is if it cannot be compiled."""

    def __init__(self, function: Any) -> None:
        self._function: Any = function
        self._compiled: Callable[..., Any] | None = self._compile()

    def _compile(self) -> Callable[..., Any]:
        # A code object of its own: torch.compile keeps its results there, few per code object, and frees them with it.
        code = self._function.__code__.replace()
        copy = FunctionType(code, self._function.__globals__, self._function.__name__)
        # Combined, small independent kernels (rotating queries and keys, filling the cache) are one launch.
        options: dict[str, Any] = {"combo_kernels": True}
        return torch.compile(copy, fullgraph=True, dynamic=False, options=options)

    def __call__(self, *args: Any) -> Any:
        if self._compiled is not None:
            try:
                return self._compiled(*args)
            except _TOO_MANY:
                self._compiled = self._compile()
                return self._compiled(*args)
            except exc.TorchDynamoException as error:
                # Raised while compiling, that is before anything ran.
                logger.warning("The decode step runs uncompiled: %s", str(error).partition("\n")[0])
                self._compiled = None
        return self._function(*args)


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
    # First what nearly all are: every call of generate asks for thousands.
    if type(value) in _TENSORS:
        return tensor(value)
    if value is None or isinstance(value, _PLAIN):
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


__all__ = ["Compiled", "facts", "model_facts"]
