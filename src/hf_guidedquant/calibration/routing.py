"""Experts that few calibration tokens are routed to borrow statistics from the other experts of their layer.

With fewer tokens than inputs a Hessian is singular, and a solver would fit those tokens at the expense of all others;
without any there is no Hessian. Such an expert gets as many average tokens as it lacks, ``H += (K - tokens) H̄``. On the
way up all experts read the same space, and ``H̄`` is the mean over the tokens of all of them, ``Σ H / Σ tokens``. On the
way down each reads hidden units of its own, of which only the size can be borrowed: ``H̄`` is then the identity, times
the mean diagonal of that. Of the curvature of outputs as much is borrowed, ``G += (K - tokens) Ḡ``; it is the other way
round with what experts write: hidden units of their own on the way up, and one space on the way down.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import listed
from ..experts import DOWN, unfused_experts
from ..plan import LayerPlan
from .collector import LayerStatistics

logger = logging.getLogger(__name__)


def with_fellows(model: nn.Module, layers: Sequence[LayerPlan], segment: Sequence[LayerPlan]) -> list[LayerPlan]:
    """``layers``, and those of their ``segment`` that they may have to borrow from.

    What an expert borrows must not depend on which of its fellows an interrupted run has solved.
    """
    wanted = {layer.name for layer in layers}
    for names, _ in _fellows(model):
        if not wanted.isdisjoint(names):
            wanted.update(names)
    return [layer for layer in segment if layer.name in wanted]


def lend(model: nn.Module, statistics: Mapping[str, LayerStatistics]) -> None:
    """Add average tokens to the statistics of experts that got fewer than they have inputs, in place.

    Args:
        model: Its experts are linear layers.
        statistics: By name of the layer; if an expert's are among them, its fellows' are too.
    """
    poor: dict[str, int] = {}
    for names, shared in _fellows(model):
        shapes = {statistics[name].hessian.shape for name in names if name in statistics}
        for shape in shapes:
            alike = [name for name in names if name in statistics and statistics[name].hessian.shape == shape]
            poor |= _lend({name: statistics[name] for name in alike}, shared)
    if poor:
        logger.warning(
            "Layers of experts that got fewer calibration tokens than they have inputs, and borrow from other experts: "
            "%d, of which %d got none (fewest: %s). More or longer calibration rows reach more experts.",
            len(poor),
            sum(count == 0 for count in poor.values()),
            listed([f"{name} {count}" for name, count in sorted(poor.items(), key=lambda item: item[1])], 3),
        )


def _lend(fellows: Mapping[str, LayerStatistics], shared: bool) -> dict[str, int]:
    """The same among layers with statistics of one shape; returns the tokens of those that got too few."""
    tokens = {name: int(layer.tokens) for name, layer in fellows.items()}
    inputs = next(iter(fellows.values())).hessian.shape[-1]
    poor = {name: count for name, count in tokens.items() if count < inputs}
    if poor and any(tokens.values()):
        _add_averages({name: layer.hessian for name, layer in fellows.items()}, tokens, inputs, shared)
        curvatures = {n: layer.curvature.unsqueeze(0) for n, layer in fellows.items() if layer.curvature is not None}
        _add_averages(curvatures, tokens, inputs, not shared)
        for name, count in poor.items():
            fellows[name].borrowed = inputs - count
    return poor


def _add_averages(sums: Mapping[str, Tensor], tokens: Mapping[str, int], wanted: int, shared: bool) -> None:
    """Add average tokens to sums over fewer tokens than are wanted, in place."""
    total = sum(tokens[name] for name in sums)
    if total == 0:
        return
    mean = _mean(list(sums.values()), total, shared)
    for name, own in sums.items():
        if tokens[name] < wanted:
            own.add_(mean.to(own.device), alpha=wanted - tokens[name])


def _mean(sums: Sequence[Tensor], tokens: int, shared: bool) -> Tensor:
    """What an average token adds to sums over tokens."""
    mean = torch.zeros_like(sums[0])
    for total in sums:
        mean.add_(total.to(mean.device), alpha=1 / tokens)
    if shared:
        return mean
    size = (mean.diagonal(dim1=-2, dim2=-1) if mean.dim() == 3 else mean).mean(dim=-1)  # [g]
    if mean.dim() == 2:
        return size.unsqueeze(-1).expand_as(mean)
    return size.view(-1, 1, 1) * torch.eye(mean.shape[-1], device=mean.device)


def _fellows(model: nn.Module) -> Iterator[tuple[list[str], bool]]:
    """Names of linear layers in the same place of all experts of a module, and whether all read one space."""
    for name, experts in unfused_experts(model).items():
        for part in (experts.up, DOWN):
            yield [f"{name}.{number}.{part}" for number in range(experts.num_experts)], part != DOWN


__all__ = ["lend", "with_fellows"]
