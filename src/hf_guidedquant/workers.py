"""Several processes that quantize one model together, as `torchrun` and `accelerate launch` start them.

Every process holds the whole model. Each takes a share of the calibration rows, and then a share of the layers; what is
solved is handed to all, so that every process ends with the same quantized model.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from .errors import WorkerError

Item = TypeVar("Item")


class Workers:
    """This process and its fellows. A process that was started alone has none, and everything here costs nothing.

    Args:
        meet: Wait for the processes that were started together to find each other, if they have not yet. All of them
            must ask for that.

    Attributes:
        rank: Number of this process.
        size: Number of processes.
    """

    def __init__(self, meet: bool = True) -> None:
        # PartialState knows the environment variables and the backend for the device.
        if meet and int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
            PartialState()
        together = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and reports."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's part of something that all have."""
        return items[self.rank :: self.size]

    def owners(self, costs: Sequence[float]) -> list[int]:
        """Who takes which job, so that nobody has much more to do than the others: the largest first, to the idlest."""
        load = [0.0] * self.size
        found = [0] * len(costs)
        for job in sorted(range(len(costs)), key=lambda job: -costs[job]):
            found[job] = load.index(min(load))
            load[found[job]] += costs[job]
        return found

    def check_agreement(self, facts: Mapping[str, Any]) -> None:
        """Make sure that all processes work on the same thing.

        Raises:
            WorkerError: They do not; the message names what differs.
        """
        if self.size == 1:
            return
        everyone: list[Any] = [None] * self.size
        with _fellows():
            dist.all_gather_object(everyone, dict(facts))
        for name in facts:
            if len({repr(one.get(name)) for one in everyone}) > 1:
                values = ", ".join(f"process {rank}: {one.get(name)}" for rank, one in enumerate(everyone))
                raise WorkerError(f"The processes of this run disagree about the {name} ({values}). Give all the same.")

    def add_up(self, tensor: Tensor) -> None:
        """Sum of everyone's ``tensor`` for everyone, in place."""
        if self.size > 1:
            with _fellows():
                dist.all_reduce(tensor)

    def hand_over(self, tensor: Tensor, owner: int) -> None:
        """The owner's ``tensor`` for everyone, in place."""
        if self.size > 1:
            with _fellows():
                # No backend knows int16.
                dist.broadcast(tensor.view(torch.uint8) if tensor.dtype == torch.int16 else tensor, src=owner)

    def tell(self, value: Any, owner: int) -> Any:
        """The owner's ``value``, any small picklable object, for everyone."""
        if self.size == 1:
            return value
        box = [value]
        with _fellows():
            dist.broadcast_object_list(box, src=owner, device=_object_device())
        return box[0]


@contextmanager
def _fellows() -> Iterator[None]:
    """What torch says when another process is gone, in plain words."""
    try:
        yield
    except (RuntimeError, dist.DistBackendError) as error:
        raise WorkerError(f"Another process of this run has stopped; its own output says why. ({error})") from error


def _object_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


__all__ = ["Workers"]
