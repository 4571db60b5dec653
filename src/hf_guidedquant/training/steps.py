"""Steps down a loss: gradients of rows are added up, then AdamW moves the parameters. On a GPU both are CUDA graphs."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..replay import Replay, Replays, stacked


class Steps:
    """Trains parameters on a summed loss.

    Args:
        loss: ``(*inputs) -> `` the sum over rows that go through the model together, fp32 or fp64.
        groups: Parameter groups, each with the ``largest`` step that its parameters take, and perhaps with ``decay``,
            the share of themselves that they lose beside a step of that size.
        clip: Norm that the gradient of all parameters together is shortened to; None for as it is.
        eps: AdamW's.
        after: What is done after every step.
        graphs: Whether to use CUDA graphs (see :func:`hf_guidedquant.replay.worth_graphs`).
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        groups: Sequence[dict[str, Any]],
        *,
        clip: float | None = None,
        eps: float = 1e-8,
        after: Callable[[], None] = lambda: None,
        graphs: bool = False,
    ) -> None:
        self._clip, self._after = clip, after
        self._parameters: list[nn.Parameter] = [parameter for group in groups for parameter in group["params"]]
        self._device = self._parameters[0].device
        rates = [torch.zeros((), device=self._device) for _ in groups]
        self._largest = torch.tensor([group["largest"] for group in groups], device=self._device)
        self._optimizer: Any = torch.optim.AdamW(
            [
                {"params": group["params"], "lr": rate, "weight_decay": _weight_decay(group)}
                for group, rate in zip(groups, rates, strict=True)
            ],
            betas=(0.9, 0.95),
            eps=eps,
            fused=True,
            capturable=self._device.type == "cuda",
        )
        self._rates = rates
        self._rate, self._items = (torch.zeros((), device=self._device) for _ in range(2))
        self._total = torch.zeros((), device=self._device, dtype=torch.float64)
        self._taken, self._left_out = 0, torch.zeros((), device=self._device)
        self._gradients = [torch.zeros_like(parameter) for parameter in self._parameters]
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        # Not a method: what refers to itself keeps its memory until Python looks for such things.
        self._backward = partial(_backward, loss, self._total)
        self._adding = Replays(self._backward, self._device, graphs, "Training")
        self._stepping = Replay(self._device, "Training") if graphs else None

    def add(self, *inputs: Sequence[Tensor]) -> None:
        """Add the gradients of rows that go through the model together.

        Args:
            inputs: For each of the loss's, the rows' tensors, of one shape. They are stacked on the device.
        """
        self._adding(*inputs)

    def step(self, rate: float, items: float = 1.0) -> None:
        """Move the parameters by the gradients added since the last step; not if any is NaN or infinite.

        Args:
            rate: Share of the largest step.
            items: How many terms the gradients are a sum of.
        """
        self._rate.fill_(rate)
        self._items.fill_(items)
        self._taken += 1
        if self._stepping is None:
            self._step()
        else:
            self._stepping(self._step)

    def left_out(self) -> str:
        """How many steps were not taken because of gradients that are NaN or infinite; empty if all were."""
        count = int(self._left_out)
        return f"{count} of {self._taken} steps were left out, because gradients were NaN or infinite" if count else ""

    def total(self) -> float:
        """Sum of the losses since this was last asked."""
        total = float(self._total)
        self._total.zero_()
        return total

    def state(self) -> list[dict[str, Tensor]]:
        """What AdamW remembers of every parameter, in order: the number of its steps, and its gradient's moments."""
        return [dict(self._optimizer.state[parameter]) for parameter in self._parameters]

    def restore(self, state: Sequence[Mapping[str, Tensor]]) -> None:
        """Go on from what :meth:`state` was. Only before the first step."""
        for parameter, kept in zip(self._parameters, state, strict=True):
            self._optimizer.state[parameter] = {name: tensor.to(parameter.device) for name, tensor in kept.items()}

    def try_out(self, *inputs: Sequence[Tensor]) -> None:
        """Compute the gradients of rows, and forget them."""
        self._backward(*(stacked(rows, self._device) for rows in inputs))
        torch._foreach_zero_(self._gradients)
        self._total.zero_()

    def _step(self) -> None:
        norm = nn.utils.get_total_norm(self._gradients) / self._items
        shortened = 1.0 if self._clip is None else (norm / self._clip).clamp_min(1)
        # The fused step divides gradients by the one and leaves all as it is if the other is 1.
        self._optimizer.grad_scale = self._items * shortened
        self._optimizer.found_inf = 1 - norm.isfinite().float()
        self._left_out += self._optimizer.found_inf
        torch._foreach_copy_(self._rates, list((self._largest * self._rate).unbind()))
        self._optimizer.step()
        torch._foreach_zero_(self._gradients)
        self._after()


def _weight_decay(group: dict[str, Any]) -> float:
    """What AdamW multiplies with the size of a step."""
    return group.get("decay", 0.0) / group["largest"] if group["largest"] else 0.0


def _backward(loss: Callable[..., Tensor], total: Tensor, *inputs: Tensor) -> None:
    """Add gradients of the loss to the parameters', and the loss to ``total``."""
    with torch.enable_grad():
        found = loss(*inputs)
        found.backward()
    total += found.detach()


__all__ = ["Steps"]
