"""The bit budget against every possible choice."""

import itertools
import random

import pytest

from hf_guidedquant.allocate import Item, allocate


def total(items, bits):
    return sum(item.losses[b] for item, b in zip(items, bits, strict=True))


def mean(items, bits):
    return sum(item.weights * b for item, b in zip(items, bits, strict=True)) / sum(item.weights for item in items)


def random_items(seed, count=6):
    generator = random.Random(seed)
    items = []
    for _ in range(count):
        loss = generator.random() * 10 ** generator.uniform(-2, 2)
        losses = {}
        for bits in (2, 3, 4):
            losses[bits] = loss
            loss *= generator.uniform(0.1, 0.9)
        items.append(Item(generator.choice([1, 2, 7]), losses))
    return items


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("budget", [2, 2.5, 3, 3.7, 4])
def test_near_the_best_of_all_choices(seed, budget):
    items = random_items(seed)
    bits = allocate(items, budget)
    assert mean(items, bits) <= budget + 1e-9
    everything = [c for c in itertools.product((2, 3, 4), repeat=len(items)) if mean(items, c) <= budget + 1e-9]
    best = min(total(items, choice) for choice in everything)
    # Greedy along the hulls loses at most the gain of one step to the optimum.
    largest = max(item.losses[2] - item.losses[4] for item in items)
    assert best <= total(items, bits) <= best + largest
    if budget == 4:
        assert set(bits) == {4}
    if budget == 2:
        assert set(bits) == {2}


def test_a_width_above_the_hull_is_skipped():
    # From 2 to 3 bits nearly nothing is gained, from 3 to 4 everything: the step is two bits wide.
    items = [Item(1, {2: 10.0, 3: 9.9, 4: 0.0}), Item(1, {2: 3.0, 3: 1.0, 4: 0.9})]
    assert allocate(items, 3) == [4, 2]
    assert allocate(items, 3.5) == [4, 3]


def test_a_loss_that_grows_with_the_bits_is_not_paid_for():
    assert allocate([Item(1, {2: 1.0, 3: 1.0, 4: 1.5})], 4) == [2]


def test_too_small_a_budget():
    with pytest.raises(ValueError, match=r"1\.9 bits"):
        allocate([Item(1, {2: 1.0, 3: 0.5})], 1.9)
