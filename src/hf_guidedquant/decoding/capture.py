"""Compile a step, and notice when a captured graph of it is out of date."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import exc
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

# More variants of one function than torch keeps: adapters, say, that are switched on one after the other.
_TOO_MANY: Any = getattr(exc, "FailOnRecompileLimitHit", ())
_PLAIN = frozenset({bool, int, float, str, type(None)})
_TENSORS = frozenset({Tensor, nn.Parameter})


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
    found: list[Hashable] = []
    # Shared by many modules, and slow to ask.
    configs: dict[int, Hashable] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            kind = type(value)
            if kind is dict or kind is OrderedDict:
                # Most are hooks that nobody has registered.
                if value and name != "_modules":
                    found.append((name, facts(value)))
            elif kind in _PLAIN:
                found.append((name, value))
            elif isinstance(value, PreTrainedConfig):
                if id(value) not in configs:
                    configs[id(value)] = facts(value)
                found.append((name, configs[id(value)]))
            else:
                found.append((name, facts(value)))
        # Of layers that keep copies of what may be changed in place.
        if hasattr(type(module), "copied_versions"):
            found.append(module.copied_versions)
    return tuple(found)


def facts(value: Any, tensor: Callable[[Tensor], Hashable] = Tensor.data_ptr) -> Hashable:
    """The tensors and plain values inside ``value``, as something that can be compared."""
    # First what nearly all are: every call of generate asks for thousands.
    kind = type(value)
    if kind in _TENSORS:
        return tensor(value)
    if kind in _PLAIN:
        return value
    if isinstance(value, dict):
        return tuple([(key if type(key) is str else str(key), facts(item, tensor)) for key, item in value.items()])
    if isinstance(value, list | tuple):
        return tuple([facts(item, tensor) for item in value])
    if isinstance(value, str | int | float | torch.dtype | torch.device):
        return value
    if isinstance(value, PreTrainedConfig):
        return facts(vars(value), tensor)
    if isinstance(value, MethodType):
        return id(value.__self__), id(value.__func__)
    if isinstance(value, FunctionType | partial):
        return id(value)
    if not isinstance(value, Tensor):
        return None
    if is_traceable_wrapper_subclass(value):
        return tuple(facts(getattr(value, name), tensor) for name in value.__tensor_flatten__()[0])
    return tensor(value)


__all__ = ["Compiled", "facts", "model_facts"]
