"""A budget of bits, spent where the end loss gains most.

Layers that share a product must share their bits, so they are one item here. The loss of an item at a width is what the
guided objective predicts, ``Σ (ŵ - w)ᵀ H (ŵ - w)`` over its rows: up to a factor common to all layers, the second-order
change of the end loss. Losses of different items add up.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """Layers that take the same width.

    Attributes:
        weights: Weights of all of them.
        losses: Bits -> predicted loss; the widths to choose from.
    """

    weights: int
    losses: Mapping[int, float]


def allocate(items: Sequence[Item], budget: float) -> list[int]:
    """Bits of every item, with a mean over all weights of at most ``budget``.

    From the smallest widths, the step with the largest gain per bit that still fits is taken again and again, where
    steps go along the lower convex hull of an item's losses: that is optimal but for what the last steps leave over
    (the fractional knapsack). Ties go to the earlier item, so the result is a function of its arguments.

    Raises:
        ValueError: The budget is smaller than the smallest widths.
    """
    chosen = [min(item.losses) for item in items]
    left = budget * sum(item.weights for item in items) - sum(
        bits * item.weights for bits, item in zip(chosen, items, strict=True)
    )
    if left < -1e-6:
        raise ValueError(f"A budget of {budget} bits is less than the smallest widths take.")
    steps = [
        (gain / (bits * item.weights), index, bits * item.weights, bits)
        for index, item in enumerate(items)
        for gain, bits in _hull(item.losses)
    ]
    # Gains per bit fall along a hull, so a stable order keeps the steps of an item in theirs.
    stopped: set[int] = set()
    for _, index, cost, bits in sorted(steps, key=lambda step: -step[0]):
        if index in stopped:
            continue
        if cost <= left + 1e-6:
            chosen[index] += bits
            left -= cost
        else:
            stopped.add(index)
    return chosen


def _hull(losses: Mapping[int, float]) -> list[tuple[float, int]]:
    """Steps (gain, bits) along the lower convex hull of bits -> loss, as long as they gain anything."""
    points = sorted(losses.items())
    hull = [points[0]]
    for point in points[1:]:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    pairs = itertools.pairwise(hull)
    return [(a[1] - b[1], b[0] - a[0]) for a, b in pairs if b[1] < a[1]]


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


__all__ = ["Item", "allocate"]
