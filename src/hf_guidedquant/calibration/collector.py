"""One pass over the calibration rows that leaves a Hessian per linear layer (the guided objective, Kim et al. 2025).

For a layer with inputs ``x_t`` and outputs ``z_t`` the Hessian of row group ``J_k`` is

    H_k = Σ_t s_k[t] x_t x_tᵀ,     s_k[t] = mean over j in J_k of (∂ℓ/∂z[t, j])²

with ℓ the next-token cross-entropy of the unquantized model, summed over tokens. ``s ≡ 1`` is the plain layer-wise
objective. Weights stay frozen: a node behind each layer's output sees the output gradient during the backward pass,
with the layer's input still in hand, and adds to ``H`` there and then, on the layer's device.
"""

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import CalibrationError, ModelError
from ..linears import stored_weight

logger = logging.getLogger(__name__)

# A larger share of rows with NaN or infinite activations or gradients aborts the run.
MAX_BAD_ROWS = 0.1


@dataclass
class LayerStatistics:
    """What the pass leaves of one layer.

    Attributes:
        hessian: fp32, ``[g, K, K]``, or its diagonal ``[g, K]``. The sum over tokens, not normalised.
        bad_rows: Rows left out because this layer, or the loss, was NaN or infinite (int64 scalar, on device).
        diagonal: fp32 ``[g, K]``: the diagonal of a full Hessian once more, added up the way it is where only the
            diagonal is needed, which rounds differently. None unless the statistics are to be kept for any method.
    """

    hessian: Tensor
    bad_rows: Tensor
    diagonal: Tensor | None = None

    @classmethod
    def empty(cls, shape: tuple[int, ...], device: torch.device, for_any_method: bool = False) -> "LayerStatistics":
        """Zero statistics: ``shape`` is ``(g, K, K)``, or ``(g, K)`` for diagonals."""
        statistics = cls(torch.zeros(shape, device=device), torch.zeros((), dtype=torch.int64, device=device))
        if for_any_method and len(shape) == 3:
            statistics.diagonal = torch.zeros(shape[:2], device=device)
        return statistics

    def add(self, x: Tensor, weights: Tensor) -> None:
        """Add a row's tokens: inputs ``x [T, K]``, token weights ``s [T, g]``, both any float dtype."""
        x, weights = x.to(self.hessian.device, torch.float32), weights.to(self.hessian.device, torch.float32)
        good = torch.isfinite(x).all() & torch.isfinite(weights).all()
        self.bad_rows += ~good
        # One comparison on the device instead of a branch on the host: a bad row contributes exact zeros.
        x = torch.where(good, x, 0.0)
        root = torch.where(good, weights, 0.0).sqrt()
        for group, hessian in enumerate(self.hessian):
            scaled = x * root[:, group : group + 1]
            diagonal = hessian if hessian.dim() == 1 else None if self.diagonal is None else self.diagonal[group]
            if diagonal is not None:
                diagonal += scaled.square().sum(dim=0)
            if hessian.dim() == 2:
                hessian.addmm_(scaled.mT, scaled)


def group_means(squared: Tensor, num_groups: int) -> Tensor:
    """Mean over each group of outputs: ``[T, N] -> [T, g]``; groups are contiguous, the last one may be shorter."""
    size = math.ceil(squared.shape[-1] / num_groups)
    return torch.stack([part.mean(dim=-1) for part in squared.split(size, dim=-1)], dim=-1)


def collect(
    model: PreTrainedModel,
    layers: Mapping[str, nn.Module],
    statistics: Mapping[str, LayerStatistics],
    rows: Sequence[Tensor],
    *,
    guided: bool,
    checkpointing: bool,
    on_row: Callable[[int], object] = lambda tokens: None,
) -> None:
    """Run every row through the model and add to ``statistics``, in place.

    Args:
        model: A causal language model; left as it was found.
        layers: The linear modules to watch, by name.
        statistics: Their (empty) statistics, by the same names.
        rows: Token ids, int64 ``[seq]`` each.
        guided: Weigh tokens by the squared output gradient. Otherwise all tokens count 1 and no backward pass runs.
        checkpointing: Recompute each decoder block's activations in the backward pass instead of keeping them.
        on_row: Called after every row with its number of tokens, for progress bars.

    Raises:
        CalibrationError: More than 10 % of the rows had to be left out, of the model or of one layer.
        ModelError: The model gives no logits.
    """
    bad_losses = 0
    with ExitStack() as stack:
        stack.enter_context(_evaluating(model))
        if guided:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(_gradients_of_activations_only(model))
            if checkpointing:
                stack.enter_context(_checkpointed(model))
            stack.enter_context(_repeatable_backward(model, rows[0]))
            stack.enter_context(_tapped(layers, statistics))
        else:
            stack.enter_context(torch.no_grad())
            stack.enter_context(_watched(layers, statistics))
        device = input_device(model)
        for row in rows:
            bad_losses += not _run_row(model, row.to(device), guided)
            on_row(row.numel())
    for layer in statistics.values():
        layer.bad_rows += bad_losses
    _check_bad_rows(bad_losses, statistics, len(rows))


def _run_row(model: PreTrainedModel, ids: Tensor, guided: bool) -> bool:
    """Forward, and for the guided objective backward. False if the loss is not finite."""
    output = model(input_ids=ids.unsqueeze(0), use_cache=False)
    if not guided:
        return True
    logits = getattr(output, "logits", None)
    if logits is None or logits.dim() != 3:
        raise ModelError(
            f"{type(model).__name__} gives no logits for every token, so there is no end loss to be guided by. "
            "Load the model with its language-model head (AutoModelForCausalLM), or use guided=False."
        )
    # A sum, not a mean: gradients keep their size whatever the row length, which fp16 needs.
    loss = F.cross_entropy(logits[0, :-1].float(), ids[1:].to(logits.device), reduction="sum")
    if not torch.isfinite(loss):
        return False
    loss.backward()
    return True


def _check_bad_rows(bad_losses: int, statistics: Mapping[str, LayerStatistics], rows: int) -> None:
    worst = {name: int(layer.bad_rows) for name, layer in statistics.items()}
    name = max(worst, key=lambda key: worst[key])
    bad = worst[name]
    if bad > MAX_BAD_ROWS * rows:
        where = f"in {name}" if bad > bad_losses else "in the loss"
        raise CalibrationError(
            f"{bad} of {rows} calibration rows gave NaN or infinity {where}; at most {MAX_BAD_ROWS:.0%} may. "
            "Load the model in bfloat16 or float32, and check that the tokenizer belongs to the model."
        )
    if bad:
        logger.warning(
            "%d of %d calibration rows gave NaN or infinity (worst layer: %s) and were left out.", bad, rows, name
        )


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids have to be."""
    return stored_weight(model.get_input_embeddings()).device


class _Tap(torch.autograd.Function):
    """Identity on a layer's output that hands (input, output gradient) to a function in the backward pass.

    The input is an autograd-saved tensor, so gradient checkpointing frees and recomputes it like any other.
    """

    @staticmethod
    def forward(ctx, output: Tensor, x: Tensor, receive: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.receive = receive
        # A copy, because models may change a layer's output in place, which a view made here would forbid.
        return output.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.receive(ctx.saved_tensors[0], grad)
        return grad, None, None


@contextmanager
def _tapped(layers: Mapping[str, nn.Module], statistics: Mapping[str, LayerStatistics]) -> Iterator[None]:
    def receive(layer: LayerStatistics, x: Tensor, grad: Tensor) -> None:
        squared = grad.flatten(0, -2).float().square()
        layer.add(x.flatten(0, -2), group_means(squared, layer.hessian.shape[0]))

    def tap(layer: LayerStatistics, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return _Tap.apply(output, args[0].detach(), partial(receive, layer)) if output.requires_grad else output

    with _hooks(module.register_forward_hook(partial(tap, statistics[name])) for name, module in layers.items()):
        yield


@contextmanager
def _watched(layers: Mapping[str, nn.Module], statistics: Mapping[str, LayerStatistics]) -> Iterator[None]:
    def watch(layer: LayerStatistics, module: nn.Module, args: tuple) -> None:
        x = args[0].flatten(0, -2)
        layer.add(x, x.new_ones(x.shape[0], layer.hessian.shape[0]))

    with _hooks(module.register_forward_pre_hook(partial(watch, statistics[name])) for name, module in layers.items()):
        yield


@contextmanager
def _hooks(handles: Iterator) -> Iterator[None]:
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _gradients_of_activations_only(model: PreTrainedModel) -> Iterator[None]:
    """Freeze every weight and start the graph at the embeddings, so that no weight gradient is ever allocated."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    embeddings = model.get_input_embeddings()
    start = embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        start.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def _repeatable_backward(model: PreTrainedModel, row: Tensor) -> Iterator[None]:
    """Demand deterministic kernels of attention's backward pass, if all of the model's operations have them.

    Fused attention is deterministic on a GPU only in torch's strict mode, which refuses some other operations; a trial
    run with one row tells. On a CPU everything is deterministic anyway.
    """
    device = input_device(model)
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
            _run_row(model, row.to(device), guided=True)
        except RuntimeError as error:
            if "determinis" not in str(error):
                raise
            logger.warning("The calibration of this model is not repeatable bit for bit: %s", str(error).split(".")[0])
            torch.use_deterministic_algorithms(True, warn_only=True)
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        if workspace is None:
            del os.environ["CUBLAS_WORKSPACE_CONFIG"]


@contextmanager
def _checkpointed(model: nn.Module) -> Iterator[None]:
    """Run every decoder block under activation checkpointing, whatever the model's own settings and mode."""
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
