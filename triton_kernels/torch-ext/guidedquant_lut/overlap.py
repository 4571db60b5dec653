"""Launching a kernel while the one before it still runs (programmatic dependent launch), where GPU and Triton can.

A kernel launched so reads nothing that another kernel writes until it has waited for the one before it. That one has
waited itself, so all that came before is done then. Only constants, like weights, are read earlier.
"""
# mypy: ignore-errors
# (Triton's compiler, not Python, runs part of this file.)

import functools
from typing import Any

import torch
import triton

from .portable import INTERPRETED

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # an older Triton
    gdc_launch_dependents = gdc_wait = None


@triton.jit
def follow():
    """Wait for the kernels before, then let the one after begin."""
    gdc_wait()
    gdc_launch_dependents()


def overlaps(device: torch.device) -> bool:
    """Whether kernels there can begin before the one before has ended."""
    return device.type == "cuda" and not INTERPRETED and gdc_wait is not None and _is_hopper_or_newer(device.index)


@functools.cache
def _is_hopper_or_newer(index: int) -> bool:
    return not torch.version.hip and torch.cuda.get_device_capability(index) >= (9, 0)


def launch_options(overlap: bool) -> dict[str, Any]:
    """What to launch a kernel with; Triton's other backends do not know the option."""
    return {"launch_pdl": True} if overlap else {}
