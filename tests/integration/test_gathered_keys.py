"""Two processes: the gradient through gathered keys is that of one process with the whole batch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from cp_plugin.hosts.gradients import check_momentum_gradients, momentum_gradients
from tests.support.processes import in_processes, of_rank

BATCH, WIDTH, WORLD = 6, 5, 2


class GatherFunction(torch.autograd.Function):
    """A host's own differentiable gather calls `all_gather` too; it must keep working."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, ...]:
        output = [torch.zeros_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(output, x)
        return tuple(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = torch.stack(gradients)
        dist.all_reduce(total)
        return total[dist.get_rank()]


@torch.no_grad()
def gather_without_gradient(x: Tensor) -> Tensor:
    output = [torch.ones_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(output, x)
    return torch.cat(output)


class Host(nn.Module):
    """Queries against the keys of all processes."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.online = nn.Sequential(nn.Linear(4, WIDTH), nn.Tanh())
        self.momentum = copy.deepcopy(self.online)
        self.momentum[0].weight.data.mul_(1.3)
        self.requires_grad_(False)
        self.register_buffer("queue", torch.zeros(BATCH, WIDTH))

    def loss(self, x: Tensor, distributed: bool) -> Tensor:
        query = self.online(x)
        with torch.no_grad():
            key = self.momentum(x * 0.9)
        keys, offset = key, 0
        if distributed:
            offset = dist.get_rank() * len(x)
            if self.how == "no_grad":
                keys = gather_without_gradient(key)
            else:
                keys = torch.cat(GatherFunction.apply(key))
            with torch.no_grad():
                self.queue[:] = gather_without_gradient(key)
        return F.cross_entropy(query @ keys.T / 0.3, torch.arange(len(x)) + offset)


def gradient(how: str, rows: slice, distributed: bool) -> Tensor:
    host = Host(how)
    images = torch.rand(BATCH, 4, generator=torch.Generator().manual_seed(1))[rows]
    delta = torch.zeros_like(images, requires_grad=True)
    with (gradients := momentum_gradients(host, [host.momentum])):
        loss = host.loss(images + delta, distributed)
    check_momentum_gradients(gradients, loss, delta)
    assert not host.queue.requires_grad
    return torch.autograd.grad(loss, delta)[0]


def run(rank: int, folder: Path) -> None:
    original = dist.all_gather
    half = BATCH // WORLD
    rows = slice(rank * half, (rank + 1) * half)
    results = {how: gradient(how, rows, True) for how in ("no_grad", "function")}
    assert dist.all_gather is original
    torch.save(results, of_rank(folder, rank))


def test_gradient_through_gathered_keys(tmp_path: Path) -> None:
    in_processes(WORLD, run, tmp_path)
    for how in ("no_grad", "function"):
        parts = [torch.load(of_rank(tmp_path, rank))[how] for rank in range(WORLD)]
        whole = gradient(how, slice(None), False)
        assert torch.allclose(torch.cat(parts) / WORLD, whole, rtol=1e-4, atol=1e-7)


def test_one_process_is_left_alone() -> None:
    if dist.is_initialized():
        pytest.skip("a process group of another test is alive")
    before = dist.all_gather
    host = Host("no_grad")
    with momentum_gradients(host, [host.momentum]):
        assert dist.all_gather is before
