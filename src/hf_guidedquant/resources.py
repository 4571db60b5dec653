"""Memory that is free, and arithmetic that comes out the same every time."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import psutil
import torch

from .errors import DeviceError

# Device maps that leave the choice to accelerate.
_ANY_DEVICE = ("auto", "balanced", "balanced_low_0", "sequential")
# How much of a GPU's memory full-precision weights may fill before they have to wait outside.
WEIGHTS_SHARE = 0.8
# How much of a GPU's free memory a model may fill that runs there as a whole.
VISIT_SHARE = 0.7


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on ``device``."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        # A limit that the process has set itself; older torch cannot tell.
        fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)(device)
        free = min(free, int(fraction * total) - reserved)
        # What torch's allocator holds but does not use counts as free too.
        return free + reserved - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available


def total_memory(device: torch.device) -> int:
    """Bytes of memory that this process may use of ``device``."""
    if device.type == "cuda":
        fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)(device)
        return int(fraction * torch.cuda.get_device_properties(device).total_memory)
    return psutil.virtual_memory().total


def check_device(device: str | torch.device) -> None:
    """Refuse a device that this machine does not have. ``"auto"``, and other words for any of them, will do.

    Raises:
        DeviceError: Saying what there is.
    """
    if device in _ANY_DEVICE:
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = ", ".join(["cpu", *(f"cuda:{number}" for number in range(count))])
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise DeviceError(f"{device!r} is no device. This machine has: {there}.") from error
    if wanted.type == "cuda" and (wanted.index or 0) >= count:
        hint = "" if count else " To torch there is no GPU: it may be a build without CUDA, or the driver is missing."
        raise DeviceError(f"The device {device} is not there. This machine has: {there}.{hint}")


def compute_device(home: torch.device, wanted: str | None = None) -> torch.device:
    """Where the work on weights that lie on ``home`` is done.

    On the CPU's behalf a GPU works, if there is one: ``wanted``, or else this process' current CUDA device.

    Raises:
        DeviceError: ``wanted`` is not there.
    """
    if home.type not in ("cpu", "meta"):
        return home
    if wanted is not None:
        check_device(wanted)
        return torch.device(wanted)
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@contextmanager
def cublas_workspace() -> Iterator[None]:
    """The workspace that torch asks for where products of cuBLAS must be deterministic, unless the caller has set one.

    torch looks for it at every product. On one stream cuBLAS is deterministic without it too, but then every product
    of deterministic mode pays for a warning.
    """
    name = "CUBLAS_WORKSPACE_CONFIG"
    missing = name not in os.environ
    os.environ.setdefault(name, ":4096:8")
    try:
        yield
    finally:
        if missing:
            os.environ.pop(name, None)


@contextmanager
def reproducible() -> Iterator[None]:
    """Deterministic kernels, full fp32 products, fp32 as the default and no autocast inside.

    The caller's settings come back afterwards.

    Without it, attention's backward pass on a GPU adds in a different order every time, and the rounding choices of a
    2-bit model amplify that to several per cent of perplexity.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    matmul = torch.backends.cuda.matmul
    # torch 2.9 renamed the switch, and refuses programs that mix both names.
    switch, full = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    precision = getattr(matmul, switch)
    dtype = torch.get_default_dtype()
    accelerator = torch.accelerator.current_accelerator()
    kinds = {"cpu"} | ({accelerator.type} if accelerator else set())
    with ExitStack() as stack:
        stack.enter_context(cublas_workspace())
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        try:
            torch.set_default_dtype(torch.float32)
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
            setattr(matmul, switch, full)
            yield
        finally:
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
            torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
            setattr(matmul, switch, precision)
            torch.set_default_dtype(dtype)
