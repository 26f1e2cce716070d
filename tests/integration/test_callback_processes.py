"""A poison crafted by the callback in several processes, and in other numbers of them by turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from cp_plugin.callbacks import CraftPoison
from tests.support.processes import in_processes, of_rank
from tests.support.small_runs import TWO_CROPS, Pictures, Small

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed.*"),
]
BATCH, IMAGES = 8, 24
SAVED = 4
"""Steps after which the state is taken that another run goes on from: one step into an epoch."""
KINDS: dict[str, dict[str, Any]] = {
    "sample": {},
    "class": {"granularity": "class"},
    "joint": {"schedule": "joint"},
}


class Pairs(Small):
    """Two views of an image as alike as they get: the mean over processes is that over images."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x0, x1 = batch[0]
        z0, z1 = self.head(self.backbone(x0)), self.head(self.backbone(x1))
        return (z0 - z1).square().mean()


def craft(rank: int, processes: int, kind: str, folder: Path, begun: Path | None = None) -> Tensor:
    """Craft in one of the processes and return delta, in the order of the images.

    Args:
        rank: which of the processes this is.
        processes: how many there are.
        kind: of poison.
        folder: where the run is.
        begun: the checkpoint of a run to go on from.
    """
    data = Pictures(TWO_CROPS, IMAGES)
    sampler = DistributedSampler(data, processes, rank, seed=5)
    loader = DataLoader(data, BATCH // processes, sampler=sampler)
    crafting = CraftPoison(
        **{"rounds": 4, "model_steps": 2, "noise_steps": 2, "pgd_steps": 2, "seed": 3},
        **{"dtype": "float32", "dir": str(folder), **KINDS[kind]},
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        use_distributed_sampler=False,
        max_epochs=4,
        callbacks=[crafting, ModelCheckpoint(folder, every_n_train_steps=SAVED, save_top_k=-1)],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Pairs(), loader, ckpt_path=begun)
    assert crafting.schedule.finished
    return crafting.attack.perturbation.stored


def run(rank: int, *arguments: Any) -> None:
    _, _, folder, *_ = arguments
    torch.save(craft(rank, *arguments), of_rank(folder, rank))


def crafted(processes: int, kind: str, folder: Path, begun: Path | None = None) -> list[Tensor]:
    """Return the delta of each process."""
    folder.mkdir()
    if processes == 1:
        return [craft(0, 1, kind, folder, begun)]
    in_processes(processes, run, processes, kind, folder, begun)
    return [torch.load(of_rank(folder, rank)) for rank in range(processes)]


def same(found: Tensor, wanted: Tensor) -> bool:
    """Whether all rows but a few signs of gradients near zero are those that are wanted."""
    return bool(torch.isclose(found, wanted, atol=1e-6).float().mean() > 0.999)


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_several_processes_make_the_poison_that_one_makes(
    processes: int, kind: str, tmp_path: Path
) -> None:
    (alone,) = crafted(1, kind, tmp_path / "alone")
    first, *others = crafted(processes, kind, tmp_path / "together")
    for other in others:
        assert torch.equal(first, other)
    assert same(first, alone)


@pytest.mark.parametrize("kind", KINDS)
def test_a_craft_goes_on_in_another_number_of_processes(kind: str, tmp_path: Path) -> None:
    whole = {count: crafted(count, kind, tmp_path / f"whole-{count}") for count in (1, 2)}
    assert same(whole[2][0], whole[1][0])
    for before, after in ((1, 2), (2, 1), (2, 2), (2, 4)):
        (begun,) = (tmp_path / f"whole-{before}").glob(f"*step={SAVED}.ckpt")
        first, *others = crafted(after, kind, tmp_path / f"from-{before}-to-{after}", begun)
        for other in others:
            assert torch.equal(first, other)
        assert same(first, whole[1][0]), f"{before} to {after}"
        if before == after:
            assert torch.equal(first, whole[before][0])
