"""What training on rows has in common: their order, how many go together, and how large the steps are."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..errors import CalibrationError

# Tokens of rows of one length that go through the model together, at most.
_STACKED_TOKENS = 8192
# Share of the training in which the steps grow to their largest.
_RISE = 0.1


def shuffled(items: Sequence[int], generator: torch.Generator) -> list[int]:
    """The items in random order."""
    return [items[index] for index in torch.randperm(len(items), generator=generator).tolist()]


def held_back(count: int, share: float) -> int:
    """How many of so many rows are not trained on: one at least."""
    return max(1, round(share * count))


def check_rows(count: int) -> None:
    """Refuse to train on too few rows.

    Raises:
        CalibrationError: Less than two.
    """
    if count < 2:
        raise CalibrationError("Training needs two calibration rows at least: one to learn from, one to hold back.")


def set_aside(items: Sequence[int], share: float, generator: torch.Generator) -> tuple[list[int], list[int]]:
    """Items to learn from, and others, one at least, to tell how well they were learned from."""
    order = shuffled(items, generator)
    count = held_back(len(order), share)
    return order[count:], order[:count]


def batches(rows: Sequence[Tensor], order: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Numbers of rows in order, as many at a time as have so many tokens together."""
    batch: list[int] = []
    for index in order:
        batch.append(index)
        if sum(rows[i].numel() for i in batch) >= tokens:
            yield batch
            batch = []
    if batch:
        yield batch


def stacks(rows: Sequence[Tensor], which: Sequence[int]) -> Iterator[list[int]]:
    """Numbers of rows that can go through a model together: of one length, and not too many."""
    alike: dict[int, list[int]] = {}
    for index in which:
        alike.setdefault(rows[index].numel(), []).append(index)
    for length, indices in alike.items():
        size = max(1, _STACKED_TOKENS // length)
        yield from (indices[start : start + size] for start in range(0, len(indices), size))


def stack_size(length: int, tokens: int) -> int:
    """Rows of a length that go through a model together, of batches with so many tokens."""
    return max(1, min(_STACKED_TOKENS // length, -(-tokens // length)))


def rate(progress: float) -> float:
    """Share of the largest step at a share of the training: a short rise, then half a cosine."""
    if progress < _RISE:
        return progress / _RISE
    return 0.5 * (1 + math.cos(math.pi * (progress - _RISE) / (1 - _RISE)))


__all__ = ["batches", "check_rows", "held_back", "rate", "set_aside", "shuffled", "stack_size", "stacks"]
