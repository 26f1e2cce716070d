"""A host's own gathering over several processes, with the gradient that torch's leaves out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from cp_plugin.util.processes import share
from cp_plugin.util.undo import Exchanges


@contextmanager
def gather_with_gradient(opens: Callable[[Tensor], bool]) -> Iterator[None]:
    """Make `torch.distributed.all_gather` differentiable for the tensors that `opens` accepts.

    torch's own has no gradient, so a host that gathers its keys would cut its momentum branch. The
    gradient of a gathered tensor is the sum over the losses of all processes. With one process
    nothing changes.
    """
    if share().processes == 1:
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
