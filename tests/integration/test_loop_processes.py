"""A poison crafted by a plain loop in several processes: one delta, that which one process makes.

Not in a room of unit tests, since processes of their own are started.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightly.transforms.simclr_transform import SimCLRTransform
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from cp_plugin import PoisonLoop
from cp_plugin.data import Photos
from tests.support.processes import in_processes, of_rank

BATCH = 8
KINDS: dict[str, dict[str, Any]] = {
    "siamese": {},
    "momentum": {"momentum_modules": ["other0"]},
    "class": {"granularity": "class"},
    "joint": {"schedule": "joint"},
    "short steps of int8": {"dtype": "int8", "step_size": 0.002},
}


class Online(nn.Module):
    """A network without batch statistics, which would differ between the processes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 15 * 15, 8)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def craft(
    processes: int, rank: int, kind: str, begun: Path | None = None, epochs: int = 4
) -> Tensor:
    """Craft in one of the processes and return delta, in the order of the images.

    Args:
        processes: how many there are.
        rank: which of them this is.
        kind: of poison.
        begun: a file with the state after some epochs, to go on from; written if it is not there.
        epochs: after which it ends.
    """
    torch.manual_seed(0)
    momentum = kind == "momentum"
    data = Photos(train=True, patches=2, transform=SimCLRTransform(input_size=32, gaussian_blur=0))
    sampler = DistributedSampler(data, processes, rank, shuffle=False)
    loader = DataLoader(data, BATCH // processes, sampler=sampler, drop_last=True)
    model: nn.Module = Online()
    slow = copy.deepcopy(model).requires_grad_(False) if momentum else nn.Identity()
    for parameter in slow.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    if processes > 1:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    poison = PoisonLoop(
        *(loader, model, slow),
        **{"rounds": 2, "model_steps": 2, "noise_steps": 2, "pgd_steps": 2},
        **{"seed": 3, "dtype": "float32", **KINDS[kind]},
    )
    if begun is not None and begun.exists():
        state = torch.load(begun)
        poison.load_state_dict(state["poison"])
        online(model).load_state_dict(state["model"])
    for _ in range(epochs):
        for batch in poison:
            x0, x1 = batch[0]
            if momentum:
                with torch.no_grad():
                    key = slow(x1)
            else:
                key = model(x1)
            poison.backward((model(x0) - key).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    if begun is not None:
        if rank == 0 and not begun.exists():
            state = {"poison": poison.state_dict(), "model": online(model).state_dict()}
            torch.save(state, begun)
        return poison.state_dict()["tensors"]["delta"]
    assert poison.finished
    assert len(poison.losses) == (0 if kind == "joint" else 2)
    return poison.state_dict()["tensors"]["delta"]


def online(model: nn.Module) -> nn.Module:
    """Return the network itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def run(rank: int, folder: Path, processes: int, *arguments: Any) -> None:
    torch.save(craft(processes, rank, *arguments), of_rank(folder, rank))


@pytest.mark.parametrize(
    ("processes", "kind"),
    [
        *((2, kind) for kind in KINDS),
        pytest.param(4, "siamese", marks=pytest.mark.slow),
        pytest.param(4, "class", marks=pytest.mark.slow),
        pytest.param(4, "joint", marks=pytest.mark.slow),
    ],
)
def test_several_processes_make_the_poison_that_one_makes(
    processes: int, kind: str, tmp_path: Path
) -> None:
    in_processes(processes, run, tmp_path, processes, kind)
    deltas = [torch.load(of_rank(tmp_path, rank)) for rank in range(processes)]
    for delta in deltas[1:]:
        assert torch.equal(deltas[0], delta)
    alone = craft(1, 0, kind)
    torch.manual_seed(0)
    assert deltas[0].abs().max() > 0
    same = torch.isclose(deltas[0].float(), alone.float(), atol=1e-6)
    assert same.float().mean() > 0.999


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4)])
def test_a_craft_goes_on_in_another_number_of_processes(
    before: int, after: int, tmp_path: Path
) -> None:
    def crafted(processes: int, begun: Path, epochs: int) -> Tensor:
        if processes == 1:
            return craft(1, 0, "siamese", begun, epochs)
        in_processes(processes, run, tmp_path, processes, "siamese", begun, epochs)
        return torch.load(of_rank(tmp_path, 0))

    crafted(1, tmp_path / "by one.pt", 1)
    alone = crafted(1, tmp_path / "by one.pt", 1)
    begun = tmp_path / "state.pt"
    first = crafted(before, begun, 1)
    changed = crafted(after, begun, 1)
    assert not torch.equal(first, changed)
    same = torch.isclose(changed.float(), alone.float(), atol=1e-6)
    assert same.float().mean() > 0.999
