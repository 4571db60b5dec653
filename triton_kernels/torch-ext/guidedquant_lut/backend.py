"""Which implementation runs: by what the device can do, or by what the user says."""

import contextlib
import functools
import importlib.util
import logging
import os

import torch

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "tensor_core", "triton", "torch")
ENVIRONMENT_VARIABLE = "HF_GUIDEDQUANT_KERNELS"

_requested: str | None = None


def set_backend(name: str) -> None:
    """Choose the kernels of this process; it wins over the environment variable ``HF_GUIDEDQUANT_KERNELS``.

    Args:
        name: ``"auto"``; ``"tensor_core"`` (byte permutes and MMA in inline PTX: NVIDIA sm_80 and newer, 2-4 bits);
            ``"triton"`` (plain Triton, any GPU that Triton knows); ``"torch"`` (anywhere, slow). A device that cannot
            run the choice gets the next best. Layers are laid out for a backend when they are loaded or moved, and
            graphs are captured for it: choose before.

    Raises:
        ValueError: No such backend.
    """
    global _requested
    if name not in BACKENDS:
        raise ValueError(f"There are no kernels {name!r}; choose one of {', '.join(BACKENDS)}.")
    _requested = name


def requested_backend() -> str:
    """What was asked for, by :func:`set_backend` or else by the environment.

    Raises:
        ValueError: The environment variable names no backend.
    """
    if _requested is not None:
        return _requested
    name = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    if name not in BACKENDS:
        raise ValueError(f"{ENVIRONMENT_VARIABLE} is {name!r}; it must be one of {', '.join(BACKENDS)}.")
    return name


def backend_for(device: torch.device) -> str:
    """The backend for tensors on ``device``: ``"tensor_core"``, ``"triton"`` or ``"torch"``."""
    return _choose(device.type, device.index if device.index is not None else -1, requested_backend())


def settle(device: torch.device) -> None:
    """Wait until weights that were just written are there: kernels may fetch them before kernels ahead have ended."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def launching_on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors'."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    module = torch.get_device_module(device)
    return contextlib.nullcontext() if device.index == module.current_device() else module.device(device)


@functools.cache
def _choose(device_type: str, index: int, asked: str) -> str:
    device = torch.device(device_type, index) if index >= 0 else torch.device(device_type)
    if asked == "torch" or device.type not in ("cuda", "xpu"):
        choice, why = "torch", "as asked" if asked == "torch" else "no GPU"
    else:
        choice, why = _best(device, tensor_cores=asked != "triton")
    if device.type in ("cuda", "xpu"):
        logger.info("Kernels on %s: %s (%s)", device, choice, why)
    return choice


def _best(device: torch.device, tensor_cores: bool) -> tuple[str, str]:
    """The best that a GPU can run, and why."""
    if importlib.util.find_spec("triton") is None:
        return "torch", "Triton is not installed"
    if device.type == "xpu" or torch.version.hip:
        return "triton", "not an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    name = f"{torch.cuda.get_device_name(device)}, sm_{capability[0]}{capability[1]}"
    if not tensor_cores or capability < (8, 0):
        return "triton", name
    try:
        from .tensor_core import works
    except ImportError:  # a Triton without dependent launches
        return "triton", f"{name}; the tensor-core path needs a newer Triton"
    return ("tensor_core", name) if works(device) else ("triton", f"{name}; the tensor-core path failed its self-test")
