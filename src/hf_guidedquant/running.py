"""Run a model another way for a while: as in evaluation, with little memory, with the same gradients every time."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import masking_utils
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import is_tracing

from .resources import cublas_workspace

logger = logging.getLogger(__name__)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout; every module's own mode comes back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def hooked(model: nn.Module) -> bool:
    """Whether accelerate moves activations or weights between devices."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Recompute every decoder block's activations in the backward pass, whatever the model's own settings and mode."""
    replaced = []
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            replaced.append((module, module.__dict__.get("forward")))
            module.forward = partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for module, own in replaced:
            if own is None:
                del module.forward
            else:
                module.forward = own


def mixed_precision(device: torch.device) -> AbstractContextManager:
    """Products in bf16 on GPUs that have it, whatever the model's dtype: training needs no more, and fp16 overflows."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        # Without a cache of weights in bf16: it would not outlive a captured graph's memory.
        return torch.autocast("cuda", torch.bfloat16, cache_enabled=False)
    return nullcontext()


@contextmanager
def rows_of_their_own() -> Iterator[None]:
    """Take for granted that a row is one whole text: causal attention needs no mask then.

    Transformers else looks whether position ids start anew inside of a row, and waits for the device; of a model that
    is given token ids only they never do. And until 5.17 it makes a mask while a CUDA graph is captured: attention is
    slower with one, and gives other bits than in the eager runs before.
    """
    instead = {"find_packed_sequence_indices": lambda position_ids: None, "is_tracing": _tracing}
    own = {name: getattr(masking_utils, name) for name in instead if hasattr(masking_utils, name)}
    for name in own:
        setattr(masking_utils, name, instead[name])
    try:
        yield
    finally:
        for name, function in own.items():
            setattr(masking_utils, name, function)


def _tracing(tensor: Any = None) -> bool:
    """As Transformers tells it, but that a CUDA graph is captured of what would run otherwise."""
    captured = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    return not captured and is_tracing(tensor)


@contextmanager
def repeatable_backward(device: torch.device, trial: Callable[[], object]) -> Iterator[None]:
    """Demand deterministic kernels of attention's backward pass, if all of the model's operations have them.

    Fused attention is deterministic on a GPU only in torch's strict mode, which refuses some other operations; a trial
    tells. On a CPU everything is deterministic anyway.

    Args:
        device: Where the model runs.
        trial: Runs the model forward and backward once. Called on GPUs only.
    """
    if device.type == "cpu":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # Strict mode fills all new memory, which nothing here reads.
    strict: Any = torch.utils.deterministic
    fills = strict.fill_uninitialized_memory
    with cublas_workspace():
        try:
            torch.use_deterministic_algorithms(True)
            strict.fill_uninitialized_memory = False
            try:
                trial()
            except RuntimeError as error:
                if "determinis" not in str(error):
                    raise
                reason = str(error).split(".")[0]
                logger.warning("The gradients of this model are not repeatable bit for bit: %s", reason)
                torch.use_deterministic_algorithms(True, warn_only=True)
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            strict.fill_uninitialized_memory = fills
