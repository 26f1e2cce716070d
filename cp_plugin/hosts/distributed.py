"""Several processes, one perturbation: what each has to know of the others' images.

With one process every function returns what it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from cp_plugin.util.undo import Exchanges


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


@contextmanager
def gather_with_gradient(opens: Callable[[Tensor], bool]) -> Iterator[None]:
    """Make `torch.distributed.all_gather` differentiable for the tensors that `opens` accepts.

    torch's own has no gradient, so a host that gathers its keys would cut its momentum branch. The
    gradient of a gathered tensor is the sum over the losses of all processes. With one process
    nothing changes.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        yield
        return
    original = dist.all_gather

    def all_gather(
        tensor_list: list[Tensor],
        tensor: Tensor,
        group: Any = None,
        async_op: bool = False,
        **options: Any,
    ) -> Any:
        if async_op or not opens(tensor):
            return original(tensor_list, tensor, group, async_op, **options)
        with torch.enable_grad():
            tensor_list[:] = _Gather.apply(tensor, original, group)
        return None

    with Exchanges() as exchanged:
        exchanged.attribute(dist, "all_gather", all_gather)
        yield


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, gather: Any, group: Any) -> tuple[Tensor, ...]:
        ctx.group = group
        gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        gather(gathered, tensor.contiguous(), group)
        return tuple(gathered)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        total = torch.stack(gradients)
        dist.all_reduce(total, group=ctx.group)
        return total[dist.get_rank(ctx.group)], None, None
