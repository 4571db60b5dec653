"""What a pass over the calibration rows leaves: a Hessian per linear layer (the guided objective, Kim et al. 2025).

For a layer with inputs ``x_t`` and outputs ``z_t`` the Hessian of row group ``J_k`` is

    H_k = Σ_t s_k[t] x_t x_tᵀ,     s_k[t] = mean over j in J_k of (∂ℓ/∂z[t, j])²

with ℓ the next-token cross-entropy of the unquantized model, summed over the tokens that count. ``s ≡ 1`` is the plain
layer-wise objective. Where it is asked for, the curvature of the outputs is added up as well, ``G = Σ_t g_t g_tᵀ`` with
``g_t = ∂ℓ/∂z_t`` (K-FAC's other factor; Martens & Grosse 2015). Weights stay frozen: a node behind each layer's output
sees the output gradient during the backward pass, with the layer's input still in hand, and adds to ``H`` there and
then, on the layer's device.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..errors import CalibrationError, ModelError
from ..linears import stored_weight
from ..workers import Workers
from .gram import add_grams, add_squares, mirror

logger = logging.getLogger(__name__)

# A larger share of rows with NaN or infinite activations or gradients aborts the run.
MAX_BAD_ROWS = 0.1
# Tokens of a row whose loss is computed at a time.
_LOSS_TOKENS = 512


@dataclass
class LayerStatistics:
    """What the pass leaves of one layer.

    Attributes:
        hessian: fp32, ``[g, K, K]``, or its diagonal ``[g, K]``. The sum over tokens, not normalised.
        bad_rows: Rows left out because this layer, or the loss, was NaN or infinite (int64 scalar, on device).
        tokens: Tokens that it is the sum of (the same).
        diagonal: fp32 ``[g, K]``: the diagonal of a full Hessian once more, added up the way it is where only the
            diagonal is needed, which rounds differently. None unless the statistics are to be used for any method.
        borrowed: Average tokens of other experts that were added to an expert's Hessian (see ``routing.lend``).
        curvature: fp32 ``[N, N]``: the sum over tokens of the outer products of the output gradients. None unless it is
            needed.
    """

    hessian: Tensor
    bad_rows: Tensor
    tokens: Tensor
    diagonal: Tensor | None = None
    borrowed: int = 0
    curvature: Tensor | None = None

    @classmethod
    def empty(
        cls,
        shape: tuple[int, ...],
        device: torch.device,
        for_any_method: bool = False,
        curvature_shape: tuple[int, int] | None = None,
    ) -> "LayerStatistics":
        """Zero statistics: ``shape`` is ``(g, K, K)``, or ``(g, K)`` for diagonals; the curvature's is ``(N, N)``."""
        bad_rows, tokens = torch.zeros(2, dtype=torch.int64, device=device).unbind()
        statistics = cls(torch.zeros(shape, device=device), bad_rows, tokens)
        if for_any_method and len(shape) == 3:
            statistics.diagonal = torch.zeros(shape[:2], device=device)
        if curvature_shape is not None:
            statistics.curvature = torch.zeros(curvature_shape, device=device)
        return statistics

    def add(self, x: Tensor, weights: Tensor | None, valid: Tensor, grad: Tensor | None = None) -> None:
        """Add a row's tokens, unless anything of them is NaN or infinite.

        Args:
            x: Inputs ``[T, K]``, any float dtype.
            weights: Of the tokens, fp32 ``[T, g]``; None for 1.
            valid: Whether the row counts, a bool scalar.
            grad: Gradients of the outputs ``[T, N]`` that the weights are of, for the curvature.
        """
        device = self.hessian.device
        x = x.to(device)
        good = _finite(x) & valid.to(device)
        if weights is not None:
            weights = weights.to(device)
            good = good & _finite(weights)
        self.bad_rows += ~good
        self.tokens += good * len(x)
        # Selections on the device instead of a branch on the host: a bad row contributes exact zeros.
        x = torch.where(good, x, 0.0)
        weights = None if weights is None else torch.where(good, weights, 0.0)
        if self.hessian.dim() == 3:
            add_grams(self.hessian, x, weights)
        if self.hessian.dim() == 2 or self.diagonal is not None:
            add_squares(self.diagonal_sum, x, weights)
        if self.curvature is not None and grad is not None:
            add_grams(self.curvature.unsqueeze(0), torch.where(good, grad.to(device), 0.0), None)

    @property
    def diagonal_sum(self) -> Tensor:
        """The diagonal ``[g, K]``, added up the same way whether there is a Hessian beside it or not."""
        if self.hessian.dim() == 2:
            return self.hessian
        assert self.diagonal is not None
        return self.diagonal

    def add_up(self, workers: Workers) -> None:
        """Finish: the sum of what all processes have, and of symmetric matrices both halves."""
        for tensor in (self.hessian, self.bad_rows, self.tokens, self.diagonal, self.curvature):
            if tensor is not None:
                workers.add_up(tensor)
        if self.hessian.dim() == 3:
            mirror(self.hessian)
        if self.curvature is not None:
            mirror(self.curvature)


def token_weights(grad: Tensor, num_groups: int) -> Tensor:
    """Mean of the squares over each group of outputs: ``[T, N] -> [T, g]`` in fp32.

    Groups are contiguous; the last one may be shorter.
    """
    outputs = grad.shape[-1]
    if outputs % num_groups == 0:
        norms = _norms(grad.unflatten(-1, (num_groups, -1)))
    else:
        norms = torch.stack([_norms(part) for part in grad.split(math.ceil(outputs / num_groups), dim=-1)], dim=-1)
    return norms.square()


def _norms(grad: Tensor) -> Tensor:
    """Root mean square over the last dimension."""
    dtype = torch.promote_types(grad.dtype, torch.float32)
    return torch.linalg.vector_norm(grad, dim=-1, dtype=dtype).float() / math.sqrt(grad.shape[-1])


def _finite(x: Tensor) -> Tensor:
    """Whether all is finite, a bool scalar: what :func:`torch.isfinite` tells in many launches, in two."""
    return torch.linalg.vector_norm(x, math.inf) < math.inf if x.numel() else x.new_ones((), dtype=torch.bool)


@dataclass
class Row:
    """The row under way. ``valid`` is whether its loss is finite: a bool scalar on a device."""

    valid: Tensor


def end_loss(output: Any, labels: Tensor) -> Tensor:
    """Next-token cross-entropy of a row, summed over its tokens.

    Args:
        output: What a causal language model gave for the row.
        labels: Its token ids, int64 ``[T]``, with -100 in place of those that do not count.

    Raises:
        ModelError: The model gives no logits.
    """
    logits = getattr(output, "logits", None)
    if logits is None or logits.dim() != 3:
        raise ModelError(
            "The model gives no logits for every token, so there is no end loss to be guided by. "
            "Load the model with its language-model head (AutoModelForCausalLM), or use guided=False."
        )
    return _cross_entropy(logits[0, :-1], labels[1:].to(logits.device))


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy summed over tokens: gradients keep their size whatever the row length, which fp16 needs.

    In pieces whose fp32 copies exist one at a time, forward and backward: with a large vocabulary, all at once would be
    the largest tensors of the pass.
    """
    pieces = zip(logits.split(_LOSS_TOKENS), targets.split(_LOSS_TOKENS), strict=True)
    return torch.stack(
        [checkpoint(_summed, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
    ).sum()


def _summed(logits: Tensor, targets: Tensor) -> Tensor:
    at_least_fp32 = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(at_least_fp32, targets, reduction="sum")


def check_bad_rows(bad_losses: int, statistics: Mapping[str, LayerStatistics], rows: int) -> None:
    """Refuse statistics that too many rows had to be left out of.

    Raises:
        CalibrationError: More than 10 % of the rows, of the model or of one layer.
    """
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
def tapped(layers: Mapping[str, nn.Module], statistics: Mapping[str, LayerStatistics], row: Row) -> Iterator[None]:
    def receive(layer: LayerStatistics, x: Tensor, grad: Tensor) -> None:
        grad = grad.flatten(0, -2)
        weights = token_weights(grad, layer.hessian.shape[0])
        layer.add(x.flatten(0, -2), weights, row.valid, grad)

    def tap(layer: LayerStatistics, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return _Tap.apply(output, args[0].detach(), partial(receive, layer)) if output.requires_grad else output

    with _hooks(module.register_forward_hook(partial(tap, statistics[name])) for name, module in layers.items()):
        yield


@contextmanager
def watched(layers: Mapping[str, nn.Module], statistics: Mapping[str, LayerStatistics], row: Row) -> Iterator[None]:
    def watch(layer: LayerStatistics, module: nn.Module, args: tuple) -> None:
        layer.add(args[0].flatten(0, -2), None, row.valid)

    with _hooks(module.register_forward_pre_hook(partial(watch, statistics[name])) for name, module in layers.items()):
        yield


@contextmanager
def _hooks(handles: Iterator) -> Iterator[None]:
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


@contextmanager
def gradients_of_activations_only(model: PreTrainedModel) -> Iterator[None]:
    """Freeze every weight and start the graph at the embeddings, so that no weight gradient is ever allocated."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    embeddings = model.get_input_embeddings()
    # Something new that depends on a leaf, because some models change what comes out in place.
    start = embeddings.register_forward_hook(lambda module, args, out: out + out.new_zeros((), requires_grad=True))
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        start.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)
