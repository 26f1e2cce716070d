"""Several processes, one perturbation: what each has to know of the others' images.

With one process every function returns what it is given.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist


class Share(NamedTuple):
    """Which of the images of all processes are this process's own."""

    rank: int
    processes: int

    def positions(self, count: int) -> slice:
        """Return the places of this process's images among those of all, if each has `count`.

        As `DistributedSampler` deals them: the first image of each process, the second of each, …
        """
        return slice(self.rank, self.rank + count * self.processes, self.processes)


def share() -> Share:
    """Return this process's place among those that train together."""
    if dist.is_available() and dist.is_initialized():
        return Share(dist.get_rank(), dist.get_world_size())
    return Share(0, 1)


def gathered(values_B: Tensor) -> Tensor:
    """Return int64 values of all processes' images, on the CPU, interleaved as they are dealt.

    Args:
        values_B: (B) of this process; all processes have as many.
    """
    own = share()
    if own.processes == 1:
        return values_B.cpu()
    values = values_B.to(_device())
    parts = [torch.empty_like(values) for _ in range(own.processes)]
    dist.all_gather(parts, values)
    return torch.stack(parts, dim=1).flatten().cpu()


def summed(values: Tensor) -> Tensor:
    """Return the sum over all processes, in place."""
    if share().processes > 1:
        dist.all_reduce(values)
    return values


def total(value: int) -> int:
    """Return the sum of a number over all processes."""
    if share().processes == 1:
        return value
    return int(summed(torch.tensor(value, device=_device())))


def of_first(values: Tensor) -> Tensor:
    """Return what the first process has, on the CPU: sums of several threads differ by a hair."""
    if share().processes == 1:
        return values
    sent = values.to(_device())
    dist.broadcast(sent, 0)
    return sent.cpu()


def _device() -> torch.device:
    """Return where tensors must be for the processes to exchange them."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
