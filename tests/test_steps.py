"""Training steps: AdamW on clipped means, with decay, bad gradients left out, the same numbers from CUDA graphs."""

import pytest
import torch
from test_trained_linear import EPS
from torch import nn

from hf_guidedquant.training.steps import Steps


def parameters(device="cpu"):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(3, n, generator=generator).to(device)) for n in (4, 5)]


def data(count=12, rows=2):
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(3, generator=generator) for _ in range(rows)] for _ in range(count)]


def summed(found):
    def loss(x):
        return sum(((x.to(p.dtype) @ p).sin() + x.sum().to(p.dtype) * p.square().mean()).sum() for p in found)

    return loss


def trained(device, clip, graphs=False, rows=None):
    found = parameters(device)
    groups = [{"params": [p], "largest": 0.1 * (i + 1), "decay": 0.3 * i} for i, p in enumerate(found)]
    steps = Steps(summed(found), groups, clip=clip, graphs=graphs)
    for number, batch in enumerate(rows or data()):
        steps.add(batch)
        if number % 2:
            steps.step(1 / (1 + number), items=6.0)
    return found, steps.total()


@pytest.mark.parametrize("clip", [None, 1e6, 0.3])
def test_steps_are_those_of_adamw_in_float64(clip):
    """Six steps of at most 0.1 and 0.2, of which rounding spoils a small part."""
    found, total = trained("cpu", clip)
    expected = [nn.Parameter(p.detach().double()) for p in parameters()]
    groups = [{"params": [p], "weight_decay": decay} for p, decay in zip(expected, (0.0, 0.3 / 0.2), strict=True)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    losses = []
    for number, batch in enumerate(data()):
        loss = summed(expected)(torch.stack(batch))
        loss.backward()
        losses.append(float(loss.detach()))
        if number % 2:
            for group, largest in zip(optimizer.param_groups, (0.1, 0.2), strict=True):
                group["lr"] = largest / (1 + number)
            for parameter in expected:
                parameter.grad /= 6
            if clip is not None:
                nn.utils.clip_grad_norm_(expected, clip)
            optimizer.step()
            optimizer.zero_grad()
    for p, q, start in zip(found, expected, parameters(), strict=True):
        assert (q - start).abs().max() > 0.05
        assert (p - q).abs().max() < 1e-4
    assert abs(total - sum(losses)) < 1e4 * EPS * sum(map(abs, losses))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_with_a_gradient_that_is_not_finite_is_left_out(value):
    first, second = (nn.Parameter(torch.ones(2, 4)) for _ in range(2))
    groups = [{"params": [p], "largest": 0.1} for p in (first, second)]
    steps = Steps(lambda x: (x[:, 0].sum() * first).sum() + (x[:, 1].sum() * second).sum(), groups, clip=1.0)
    steps.add([torch.tensor([1.0, value])])
    steps.step(1.0)
    assert all(torch.equal(parameter, torch.ones(2, 4)) for parameter in (first, second))
    steps.add([torch.tensor([1.0, 2.0])])
    steps.step(1.0)
    assert all(torch.allclose(parameter, torch.full((2, 4), 0.9)) for parameter in (first, second))


def test_decay_is_relative_to_the_largest_step():
    """Without a gradient a step does nothing else; half a step takes half as much."""
    first, second, still = (nn.Parameter(torch.ones(4)) for _ in range(3))
    groups = [
        {"params": [first], "largest": 1e-3, "decay": 0.2},
        {"params": [second], "largest": 10.0, "decay": 0.2},
        {"params": [still], "largest": 0.0, "decay": 0.2},
    ]
    steps = Steps(lambda x: (x.sum() * 0 * (first + second + still)).sum(), groups)
    steps.add([torch.ones(1)])
    steps.step(0.5)
    assert all(torch.allclose(parameter, torch.full((4,), 0.9)) for parameter in (first, second))
    assert torch.equal(still, torch.ones(4))


def test_what_is_tried_out_is_forgotten():
    found = parameters()
    steps = Steps(summed(found), [{"params": found, "largest": 0.1}])
    steps.try_out(data()[0])
    assert steps.total() == 0
    steps.step(1.0)
    assert all(torch.equal(p, q) for p, q in zip(found, parameters(), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("clip", [None, 0.3])
def test_graphs_give_the_same_numbers(clip):
    """Of rows of two shapes, in turns."""
    rows = [batch for pair in zip(data(), data(rows=3), strict=True) for batch in pair]
    (eager, total), (graphed, other) = (trained("cuda", clip, graphs, rows) for graphs in (False, True))
    assert total == other
    assert all(torch.equal(p, q) for p, q in zip(eager, graphed, strict=True))
