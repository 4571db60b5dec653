"""How far a model's predictions are from the original's, which is there as its last hidden states.

The original's output head makes its logits of them again: one model in memory is enough, and that head, where the
model's own is quantized.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from ..calibration import Shelf
from ..calibration.collector import MAX_BAD_ROWS, input_device
from ..errors import CalibrationError, ModelError
from ..running import evaluating
from .batches import check_rows, stacks

# Tokens whose logits exist at a time.
_LOGIT_TOKENS = 2048
# Bytes of a logit on the way to the gradient: two log-probabilities, and what is computed of them, in fp32.
_LOGIT_BYTES = 20
# Tokens of a row whose logits are compared with the model's own.
_COMPARED_TOKENS = 8


def output_head(model: Any) -> nn.Module:
    """The layer that gives the logits.

    Raises:
        ModelError: There is none.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(model).__name__} has no output head, so there are no predictions to distill.")
    return head


def logit_bytes(tokens: int, vocabulary: int) -> int:
    """Bytes that the divergence of so many tokens, and its gradient, take at most."""
    return _LOGIT_BYTES * min(tokens, _LOGIT_TOKENS) * vocabulary


def teacher_states(model: PreTrainedModel, rows: Sequence[Tensor]) -> list[Tensor]:
    """What the output head reads, of every row: ``[T, hidden]`` in the model's dtype, on the CPU.

    Args:
        model: The original, with an output head.
        rows: Token ids, int64 ``[T]`` each.

    Raises:
        ModelError: The model's logits cannot be made again from these states.
        CalibrationError: There are less than two rows, or more than 10 % of them give NaN or infinity.
    """
    check_rows(len(rows))
    found: dict[int, Tensor] = {}
    shelf, checked = Shelf(), False
    # Smoothed little: rows are alike, but the first ones take longer, until all kernels are loaded.
    bar = tqdm(total=len(rows), desc="Original", unit="row", smoothing=0.7)
    with torch.no_grad(), evaluating(model), bar:
        for stack in stacks(rows, range(len(rows))):
            hidden, logits = _run(model, torch.stack([rows[index] for index in stack]))
            for index, row, first in zip(stack, hidden.view(len(stack), -1, hidden.shape[-1]), logits, strict=True):
                found[index] = shelf.put(row)
                if not checked and _finite(row):
                    _check_logits(model, row[:_COMPARED_TOKENS], first)
                    checked = True
            bar.update(len(stack))
    shelf.settle()
    states = [found[index] for index in range(len(rows))]
    bad = sum(not _finite(state) for state in states)
    if bad > MAX_BAD_ROWS * len(rows):
        raise CalibrationError(
            f"{bad} of {len(rows)} calibration rows gave NaN or infinity; at most {MAX_BAD_ROWS:.0%} may. "
            "Load the model in bfloat16 or float32, and check that the tokenizer belongs to the model."
        )
    return states


@dataclass(frozen=True)
class Divergence:
    """KL(original ‖ model) in nats.

    Attributes:
        model: A causal language model.
        rows: Token ids, int64 ``[T]`` each.
        states: The original's :func:`teacher_states` of the same rows.
        head: The original's output head; None if it is the model's.
    """

    model: Any
    rows: Sequence[Tensor]
    states: Sequence[Tensor]
    head: Any = None

    def usable(self) -> list[int]:
        """The rows of which the original's states are finite."""
        return [index for index, state in enumerate(self.states) if _finite(state)]

    def tokens(self, which: Sequence[int]) -> int:
        """Of some rows together."""
        return sum(self.rows[index].numel() for index in which)

    def of(self, which: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        """Some rows, and the original's states of them."""
        return [self.rows[index] for index in which], [self.states[index] for index in which]

    @torch.no_grad()
    def mean(self, which: Sequence[int]) -> float:
        """Per token of some rows."""
        sums = [self.summed(self.rows[index][None], self.states[index][None]) for index in which]
        return float(torch.stack(sums).sum(dtype=torch.float64)) / self.tokens(which)

    def summed(self, rows: Tensor, states: Tensor) -> Tensor:
        """Sum over rows of one length, in pieces whose logits exist one at a time, forward and backward.

        A sum, because shares of a mean over many tokens would vanish in fp16.

        Args:
            rows: Token ids ``[rows, T]``.
            states: The original's of the same rows, ``[rows, T, hidden]``.
        """
        hidden, _ = _run(self.model, rows)
        original = states.to(hidden.device).flatten(0, 1)
        pieces = zip(hidden.split(_LOGIT_TOKENS), original.split(_LOGIT_TOKENS), strict=True)
        return torch.stack([_Summed.apply(piece, theirs, self.model, self.head) for piece, theirs in pieces]).sum()


class _Summed(torch.autograd.Function):
    """KL summed over tokens. The gradient is computed with it, so that logits need not be kept, nor made again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, original: Tensor, model: Any, head: Any) -> Tensor:
        own = model.get_output_embeddings()
        theirs = _log_probabilities(model, own if head is None else head, original)
        with torch.set_grad_enabled(ctx.needs_input_grad[0]):
            hidden = hidden.detach().requires_grad_(ctx.needs_input_grad[0])
            summed = F.kl_div(_log_probabilities(model, own, hidden), theirs, reduction="sum", log_target=True)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(*torch.autograd.grad(summed, hidden))
        return summed.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return grad * ctx.saved_tensors[0], None, None, None


def _run(model: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
    """What the head reads of rows ``[rows, T]``, ``[tokens, hidden]``, and the model's logits of their first tokens."""
    head = output_head(model)
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple) -> tuple:
        seen.append(args[0])
        # The model's own logits are not needed; a few tell whether ours are the same.
        return (args[0][:, :_COMPARED_TOKENS], *args[1:])

    handle = head.register_forward_pre_hook(keep)
    try:
        logits = model(input_ids=rows.to(input_device(model)), use_cache=False).logits
    finally:
        handle.remove()
    return seen[0].flatten(0, 1), logits


def _log_probabilities(model: Any, head: Any, hidden: Tensor) -> Tensor:
    logits = _logits(model, head, hidden)
    return logits.log_softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _logits(model: Any, head: Any, hidden: Tensor) -> Tensor:
    """A head's logits, and what some models do to them afterwards, by the settings that say so."""
    config = model.config.get_text_config()
    logits = head(hidden)
    if (factor := getattr(config, "logit_scale", None)) is not None:
        logits = logits * factor
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


def _check_logits(model: Any, hidden: Tensor, logits: Tensor) -> None:
    ours, theirs = _logits(model, model.get_output_embeddings(), hidden).float(), logits.float()
    # Far above the rounding of any dtype, far below what a factor or a cap does.
    if not torch.allclose(ours, theirs, rtol=0.02, atol=0.02 * float(theirs.abs().max())):
        raise ModelError(
            f"{type(model).__name__} does more to its logits than is known here, so it cannot be distilled. "
            "Use distill=False."
        )


def _finite(state: Tensor) -> bool:
    return bool(torch.isfinite(state).all())


__all__ = ["Divergence", "logit_bytes", "output_head", "teacher_states"]
