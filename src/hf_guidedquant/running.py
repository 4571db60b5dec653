"""Run a model another way for a while: as in evaluation, with little memory, with the same gradients every time."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

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
        return torch.autocast("cuda", torch.bfloat16)
    return nullcontext()


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
    # cuBLAS reads this at every product; strict mode refuses to run without it.
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        torch.use_deterministic_algorithms(True)
        try:
            trial()
        except RuntimeError as error:
            if "determinis" not in str(error):
                raise
            logger.warning("The gradients of this model are not repeatable bit for bit: %s", str(error).split(".")[0])
            torch.use_deterministic_algorithms(True, warn_only=True)
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        if workspace is None:
            del os.environ["CUBLAS_WORKSPACE_CONFIG"]
