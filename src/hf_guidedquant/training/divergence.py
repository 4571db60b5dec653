"""How far a model's predictions are from the original's, which is there as its last hidden states.

The original's output head makes its logits of them again: one model in memory is enough, and that head, where the
model's own is quantized.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from ..calibration.collector import MAX_BAD_ROWS, input_device
from ..errors import CalibrationError, ModelError
from ..running import evaluating
from .batches import stacks

# Tokens whose logits exist at a time.
_LOGIT_TOKENS = 512
# Tokens of a row whose logits are compared with the model's own.
_COMPARED_TOKENS = 8


def teacher_states(model: PreTrainedModel, rows: Sequence[Tensor]) -> list[Tensor]:
    """What the output head reads, of every row: ``[T, hidden]`` in the model's dtype, on the CPU.

    Args:
        model: The original, with an output head.
        rows: Token ids, int64 ``[T]`` each.

    Raises:
        ModelError: The model's logits cannot be made again from these states.
        CalibrationError: There are less than two rows, or more than 10 % of them give NaN or infinity.
    """
    if len(rows) < 2:
        raise CalibrationError("Distillation needs two calibration rows at least: one to train on, one to hold back.")
    states: list[Tensor] = []
    checked = False
    with torch.no_grad(), evaluating(model), tqdm(total=len(rows), desc="Original", unit="row") as bar:
        for row in rows:
            hidden, logits = _run(model, [row])
            states.append(hidden.cpu())
            if not checked and _finite(states[-1]):
                _check_logits(model, hidden[:_COMPARED_TOKENS], logits)
                checked = True
            bar.update()
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

    @torch.no_grad()
    def mean(self, which: Sequence[int]) -> float:
        """Per token of some rows."""
        return sum(float(self._summed([index])) for index in which) / self.tokens(which)

    def backward(self, which: Sequence[int]) -> float:
        """Add the gradients of some rows' summed KL to the parameters', and return that sum.

        A sum, because shares of a mean over many tokens would vanish in fp16.
        """
        total = 0.0
        with torch.enable_grad():
            for stack in stacks(self.rows, which):
                summed = self._summed(stack)
                summed.backward()
                total += float(summed.detach())
        return total

    def _summed(self, stack: Sequence[int]) -> Tensor:
        """Summed KL of rows of one length, in pieces whose logits exist one at a time, forward and backward."""
        hidden, _ = _run(self.model, [self.rows[index] for index in stack])
        original = torch.cat([self.states[index] for index in stack]).to(hidden.device)
        pieces = zip(hidden.split(_LOGIT_TOKENS), original.split(_LOGIT_TOKENS), strict=True)
        summed = partial(checkpoint, _summed_kl, self.model, self.head, use_reentrant=False, preserve_rng_state=False)
        return torch.stack([summed(*piece) for piece in pieces]).sum()


def _summed_kl(model: Any, head: Any, hidden: Tensor, original: Tensor) -> Tensor:
    own = model.get_output_embeddings()
    ours = _log_probabilities(model, own, hidden)
    with torch.no_grad():
        theirs = _log_probabilities(model, own if head is None else head, original)
    return F.kl_div(ours, theirs, reduction="sum", log_target=True)


def _run(model: Any, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """What the head reads of rows of one length, ``[tokens, hidden]``, and the model's logits of the first tokens."""
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(model).__name__} has no output head, so there are no predictions to distill.")
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple) -> tuple:
        seen.append(args[0])
        # The model's own logits are not needed; a few tell whether ours are the same.
        return (args[0][:, :_COMPARED_TOKENS], *args[1:])

    handle = head.register_forward_pre_hook(keep)
    try:
        ids = torch.stack(list(rows)).to(input_device(model))
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
    return seen[0].flatten(0, 1), logits[0]


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


__all__ = ["Divergence", "teacher_states"]
