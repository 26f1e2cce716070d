"""A craft that is resumed from any of its checkpoints ends with the poison of one never stopped."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, Sampler

from cp_plugin.attack.poison_file import Poison
from cp_plugin.callbacks import CraftPoison
from cp_plugin.data.order import Order
from tests.support.small_runs import TWO_CROPS, Pictures, Small

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
SETTINGS = {"rounds": 4, "model_steps": 3, "noise_steps": 3, "pgd_steps": 1, "seed": 3}


class Dropping(Small):
    """Draws from the global generator at every step of the model."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        noise = torch.rand(()) if self.training else 0.5
        return super().training_step(batch, batch_idx) * (0.5 + noise)

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        # Lightning asks for the loader here, before it has read the checkpoint's loops.
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Saving(pl.Callback):
    """Saves a checkpoint after every step, and at the end of every epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        trainer.save_checkpoint(self.folder / f"step={trainer.global_step}.ckpt")

    def on_train_epoch_end(self, trainer: Any, *args: Any) -> None:
        trainer.save_checkpoint(self.folder / f"epoch={trainer.current_epoch}.ckpt")


class Counting(Sampler[int]):
    """An order that comes of a count of iterations, as a sampler of one's own may have it."""

    def __init__(self, count: int) -> None:
        self.count, self.turn = count, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Any:
        self.turn += 1
        return iter([(self.turn * 5 + row * 3) % self.count for row in range(self.count)])


class FromAList(Counting):
    """An order that no plain value tells."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.turns: list[int] = []

    def __iter__(self) -> Any:
        self.turns.append(self.turn)
        self.turn = len(self.turns)
        return super().__iter__()


def shuffled(workers: int = 0) -> DataLoader[Any]:
    return DataLoader(Pictures(TWO_CROPS), 4, shuffle=True, num_workers=workers)


def own_generator() -> DataLoader[Any]:
    return DataLoader(
        Pictures(TWO_CROPS), 4, shuffle=True, generator=torch.Generator().manual_seed(8)
    )


def with_replacement() -> DataLoader[Any]:
    data = Pictures(TWO_CROPS)
    return DataLoader(data, 4, sampler=RandomSampler(data, replacement=True))


def counting() -> DataLoader[Any]:
    return DataLoader(Pictures(TWO_CROPS), 4, sampler=Counting(16))


@pytest.fixture
def craft(tmp_path: Path) -> Callable[..., Poison]:
    """Crafts with a checkpoint at every step, or goes on from one of them."""

    def run(loader: DataLoader[Any], path: str | None = None, **settings: Any) -> Poison:
        pl.seed_everything(0, verbose=False)
        folder = tmp_path / ("whole" if path is None else "resumed")
        trainer = pl.Trainer(
            **{"accelerator": "cpu", "devices": 1, "max_epochs": 3, "logger": False},
            **{"enable_progress_bar": False, "enable_model_summary": False},
            callbacks=[CraftPoison(dir=str(folder), **{**SETTINGS, **settings})]
            + ([Saving(folder)] if path is None else []),
            enable_checkpointing=False,
            default_root_dir=folder,
        )
        known = None if path is None else tmp_path / "whole" / path
        trainer.fit(Dropping(), loader, ckpt_path=known)
        found = Poison.load(folder / "poison.safetensors")
        (folder / "poison.safetensors").unlink()
        return found

    return run


def equal(one: Poison, other: Poison) -> bool:
    assert sorted(one.keys.tolist()) == sorted(other.keys.tolist())
    order = one.rows(other.keys.tolist())
    return torch.equal(one.perturbation.stored[order], other.perturbation.stored)


@pytest.mark.parametrize("loader", [shuffled, own_generator, with_replacement, counting])
def test_a_craft_resumed_in_the_midst_of_an_epoch_is_the_one_never_stopped(craft, loader):
    whole = craft(loader())
    # Step 3 ends a model phase, and 4 and 8 an epoch.
    for name in ("step=1", "step=3", "step=4", "epoch=0", "step=6", "epoch=1", "step=11"):
        assert equal(craft(loader(), f"{name}.ckpt"), whole), name


def test_so_it_is_with_worker_processes_and_rows_of_int8(craft):
    short = {"dtype": "int8", "step_size": 0.003}
    whole = craft(shuffled(2), **short)
    for step in (2, 4):
        assert equal(craft(shuffled(2), f"step={step}.ckpt", **short), whole), step


def test_an_order_that_cannot_be_restored_is_said_to_be_drawn_anew(craft, caplog):
    def loader() -> DataLoader[Any]:
        return DataLoader(Pictures(TWO_CROPS), 4, sampler=FromAList(16))

    craft(loader())
    with caplog.at_level(logging.WARNING, "cp_plugin"):
        craft(loader(), "step=6.ckpt")
    assert "drawn anew" in caplog.text


def test_what_a_sampler_was_made_with_is_not_carried_to_another_process():
    def made(process: int) -> Order:
        sampler = Counting(16)
        sampler.process = process
        return Order(DataLoader(Pictures(TWO_CROPS), 4, sampler=sampler))

    first, second = made(0), made(1)
    for _ in range(2):
        list(first)
    saved = first.sources()
    second.restore_sources(saved)
    kept = vars(second.inner.sampler)
    assert (kept["turn"], kept["process"], kept["count"]) == (2, 1, 16)
