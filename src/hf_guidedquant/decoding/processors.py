"""Transformers' logits processors inside a captured step: no host reads, no shapes that grow."""

from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from ..errors import DecodingError


class ScoresOnly:
    """A processor that reads nothing but the scores: its own code is captured."""

    def __init__(self, processor: Any, scores: Tensor) -> None:
        self.processor = processor

    @staticmethod
    def constants(processor: Any) -> dict[str, Hashable]:
        """The settings that capture makes constants."""
        return vars(processor)

    def start(self, processor: Any, prompt: Tensor) -> None:
        """Take over the prompt ``[batch, length]`` and the other settings of this call's processor."""

    def __call__(self, scores: Tensor, generated: Tensor) -> Tensor:
        """Process scores ``[batch, vocabulary]`` after ``generated`` (``[1]``) new tokens."""
        return self.processor(None, scores)

    def observe(self, tokens: Tensor) -> None:
        """See the tokens ``[batch]`` that were chosen."""


class RepetitionPenalty(ScoresOnly):
    """Keeps which tokens have occurred, where the original looks through all ids so far."""

    def __init__(self, processor: Any, scores: Tensor) -> None:
        self.penalty = processor.penalty
        self.seen = torch.zeros_like(scores, dtype=torch.bool)

    @staticmethod
    def constants(processor: Any) -> dict[str, Hashable]:
        return {"penalty": processor.penalty}

    def start(self, processor: Any, prompt: Tensor) -> None:
        # Which part of the prompt counts differs between versions of Transformers: ask the original.
        ones = torch.ones_like(self.seen, dtype=torch.float32)
        self.seen.copy_(processor(prompt, ones) != 1)

    def __call__(self, scores: Tensor, generated: Tensor) -> Tensor:
        penalized = torch.where(scores < 0, scores * self.penalty, scores / self.penalty)
        return torch.where(self.seen, penalized, scores)

    def observe(self, tokens: Tensor) -> None:
        self.seen.scatter_(1, tokens[:, None], True)


class Forbidden(ScoresOnly):
    """Tokens that are impossible, for ever or until enough others were generated."""

    def __init__(self, processor: Any, scores: Tensor) -> None:
        self.tokens = torch.zeros_like(scores[0], dtype=torch.bool)
        self.until = torch.zeros(1, dtype=torch.int64, device=scores.device)

    @staticmethod
    def constants(processor: Any) -> dict[str, Hashable]:
        return {}

    def start(self, processor: Any, prompt: Tensor) -> None:
        ids, until = _forbidden(processor, prompt.shape[1])
        self.tokens.copy_(token_mask(ids, self.tokens))
        self.until.fill_(until)

    def __call__(self, scores: Tensor, generated: Tensor) -> Tensor:
        return scores.masked_fill(self.tokens & (generated < self.until), -torch.inf)


def _forbidden(processor: Any, prompt_length: int) -> tuple[Tensor, int]:
    """The token ids that a processor forbids, and the number of new tokens from which on they are allowed."""
    if isinstance(processor, SuppressTokensLogitsProcessor):
        return processor.suppress_tokens, torch.iinfo(torch.int64).max
    if isinstance(processor, MinLengthLogitsProcessor):
        return processor.eos_token_id, processor.min_length - prompt_length
    return processor.eos_token_id, processor.prompt_length_to_skip + processor.min_new_tokens - prompt_length


_CAPTURABLE: dict[type[LogitsProcessor], type[ScoresOnly]] = {
    EpsilonLogitsWarper: ScoresOnly,
    InfNanRemoveLogitsProcessor: ScoresOnly,
    LogitNormalization: ScoresOnly,
    MinLengthLogitsProcessor: Forbidden,
    MinNewTokensLengthLogitsProcessor: Forbidden,
    MinPLogitsWarper: ScoresOnly,
    RepetitionPenaltyLogitsProcessor: RepetitionPenalty,
    SuppressTokensLogitsProcessor: Forbidden,
    TemperatureLogitsWarper: ScoresOnly,
    TopKLogitsWarper: ScoresOnly,
    TopPLogitsWarper: ScoresOnly,
    TypicalLogitsWarper: ScoresOnly,
}


def token_mask(ids: Tensor, like: Tensor) -> Tensor:
    """``[vocabulary]`` flags of the given token ids, on the device of ``like`` (``[vocabulary]``)."""
    return torch.isin(torch.arange(len(like), device=like.device), ids.to(like.device))


def settings(processors: Iterable[LogitsProcessor]) -> tuple[Hashable, ...]:
    """What a captured step depends on: the processors in order, with the numbers that capture makes constants.

    Raises:
        DecodingError: A processor cannot be captured.
    """
    found: list[Hashable] = []
    for processor in processors:
        if type(processor) not in _CAPTURABLE:
            known = ", ".join(sorted(kind.__name__ for kind in _CAPTURABLE))
            raise DecodingError(f"the logits processor {type(processor).__name__} (it can run {known})")
        found.append((type(processor), *sorted(_CAPTURABLE[type(processor)].constants(processor).items())))
    return tuple(found)


def captured(processors: Iterable[LogitsProcessor], scores: Tensor) -> list[ScoresOnly]:
    """The captured counterparts of the processors, for scores of this shape (``[batch, vocabulary]``)."""
    return [_CAPTURABLE[type(processor)](processor, scores) for processor in processors]


__all__ = ["ScoresOnly", "captured", "settings", "token_mask"]
