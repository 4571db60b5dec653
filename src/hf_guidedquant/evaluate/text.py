"""How good a model is, and how far from its original: perplexity and KL divergence on a text."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.utils.logging import tqdm

from ..calibration.collector import input_device
from ..calibration.rows import tokenize
from ..errors import EvaluationError
from ..running import evaluating

# Tokens whose logits exist at a time.
_LOGIT_TOKENS = 256


@dataclass(frozen=True)
class Comparison:
    """A model beside its original, on one text.

    Attributes:
        perplexity, original_perplexity: See :func:`perplexity`.
        kl: Mean KL(original ‖ model) of the predictions, in nats per token.
        top1: Share of the tokens for which both models think the same one most likely.
        tokens: Predicted tokens that these are means over.
        context: Tokens per window.
    """

    perplexity: float
    original_perplexity: float
    kl: float
    top1: float
    tokens: int
    context: int


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, text_or_dataset: Any, context: int = 2048) -> float:
    """Perplexity on a text, by the protocol that quantization papers use.

    The whole text is tokenized once, without special tokens, and cut into non-overlapping windows of ``context``
    tokens; each window is read by itself, and the result is ``exp`` of the mean negative log-likelihood over the
    ``context - 1`` predicted tokens of all windows. The rest that does not fill a window is left out, unless the text
    is shorter than one. Logits exist for some tokens of a window at a time.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer. Not used for token ids.
        text_or_dataset: A text, a list of texts or a Dataset with a ``text`` column (joined by blank lines), or token
            ids as an int64 tensor.
        context: Tokens per window, at least 2.

    Raises:
        EvaluationError: Fewer than two tokens, or a ``context`` below 2 or beyond the model's.
    """
    windows = _windows([model], tokenizer, text_or_dataset, context)
    loss = 0.0
    with evaluating(model):
        for tokens, (ours,) in _predictions([model], windows, "Perplexity"):
            loss += _loss(ours, tokens)
    return math.exp(loss / windows[:, 1:].numel())


@torch.no_grad()
def compare(model: Any, original: Any, tokenizer: Any, text_or_dataset: Any, context: int = 2048) -> Comparison:
    """Measure a model against the one it was made from, in one pass over a text.

    Windows and predicted tokens are those of :func:`perplexity`. Both models are in memory; they may be on different
    devices.

    Args:
        model: A causal language model.
        original: Another one with the same vocabulary.
        tokenizer: Their tokenizer. Not used for token ids.
        text_or_dataset: As for :func:`perplexity`.
        context: Tokens per window, at least 2.

    Raises:
        EvaluationError: Fewer than two tokens, a ``context`` below 2 or beyond the models', or vocabularies of
            different sizes.
    """
    windows = _windows([model, original], tokenizer, text_or_dataset, context)
    count = windows[:, 1:].numel()
    loss = original_loss = kl = 0.0
    agreed = 0
    with evaluating(model), evaluating(original):
        for tokens, (ours, theirs) in _predictions([model, original], windows, "Comparison"):
            if ours.shape != theirs.shape:
                raise EvaluationError(
                    f"The original's vocabulary has {theirs.shape[-1]} entries, the model's {ours.shape[-1]}. "
                    "Compare a model with the one it was quantized from."
                )
            loss += _loss(ours, tokens)
            original_loss += _loss(theirs, tokens)
            theirs = theirs.to(ours.device)
            kl += float((theirs.exp() * (theirs - ours)).sum(dtype=torch.float64))
            agreed += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
    return Comparison(
        math.exp(loss / count), math.exp(original_loss / count), kl / count, agreed / count, count, windows.shape[1]
    )


def token_ids(tokenizer: Any, text_or_dataset: Any) -> Tensor:
    """Token ids, int64 ``[tokens]``, of a text, or of a list of texts or a Dataset with a ``text`` column as one."""
    if isinstance(text_or_dataset, Tensor):
        if text_or_dataset.is_floating_point():
            raise EvaluationError(f"Token ids must be integers, got {text_or_dataset.dtype}.")
        return text_or_dataset.flatten()
    text = text_or_dataset
    if not isinstance(text, str):
        rows: Iterable[str] = text["text"] if hasattr(text, "column_names") else text
        text = "\n\n".join(row for row in rows if row)
    return tokenize(tokenizer, text)


def context_length(model: Any) -> int | None:
    """Tokens of the model's context, if it says so."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _windows(models: Sequence[Any], tokenizer: Any, text_or_dataset: Any, context: int) -> Tensor:
    """The text in windows, int64 ``[windows, tokens]``."""
    ids = token_ids(tokenizer, text_or_dataset)
    longest = min((length for length in map(context_length, models) if length is not None), default=context)
    if context > longest:
        raise EvaluationError(f"context={context} is longer than the model's context of {longest} tokens.")
    if context < 2 or ids.numel() < 2:
        raise EvaluationError(
            f"Perplexity needs a context and a text of at least 2 tokens, got {context} and {ids.numel()}."
        )
    count = ids.numel() // context
    return ids[: count * context].view(count, context) if count else ids.unsqueeze(0)


def _predictions(models: Sequence[Any], windows: Tensor, label: str) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Some tokens ``[T]`` of a window at a time, and each model's log-probabilities for them, ``[T, vocabulary]``."""
    for window in tqdm(windows, desc=label, unit="window"):
        slices = zip(*(_logits(model, window) for model in models), strict=True)
        # The last token's logits predict what is not there.
        for tokens, logits in zip(window[1:].split(_LOGIT_TOKENS), slices, strict=False):
            yield tokens, [_log_probabilities(each[: tokens.numel()]) for each in logits]


def _logits(model: Any, window: Tensor) -> Iterator[Tensor]:
    """Logits of a window, ``[T, vocabulary]``, for some tokens at a time.

    The model's body runs once. The rest, which is not only the head in some models, runs on a slice of the hidden
    states in each of several calls, in which the body answers with that slice.
    """
    ids = window.unsqueeze(0).to(input_device(model))
    body = model.base_model
    run, own = body.forward, body.__dict__.get("forward")
    whole = None
    for start in range(0, window.numel(), _LOGIT_TOKENS):

        def answer(*args: Any, first: int = start, **kwargs: Any) -> Any:
            nonlocal whole
            whole = run(*args, **kwargs) if whole is None else whole
            hidden = getattr(whole, "last_hidden_state", None)
            return whole if hidden is None else replace(whole, last_hidden_state=hidden[:, first:][:, :_LOGIT_TOKENS])

        body.forward = answer
        try:
            logits = model(input_ids=ids, use_cache=False).logits[0]
        finally:
            if own is None:
                del body.forward
            else:
                body.forward = own
        if logits.shape[0] >= window.numel():
            # One slice is all there is, or the body's answer is not what the head reads. Prompts that were learned
            # (as adapters) come before the window.
            yield from logits[-window.numel() :].split(_LOGIT_TOKENS)
            return
        yield logits


def _log_probabilities(logits: Tensor) -> Tensor:
    return logits.log_softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _loss(log_probabilities: Tensor, tokens: Tensor) -> float:
    """Summed negative log-likelihood of tokens ``[T]``, in nats."""
    chosen = log_probabilities.gather(-1, tokens.to(log_probabilities.device).unsqueeze(-1))
    return -float(chosen.sum(dtype=torch.float64))
