"""One delta for each group of like images, without labels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader
from torchvision import transforms

from cp_plugin.attack.inject import inject
from cp_plugin.attack.poison_file import MEMBERS, Poison
from cp_plugin.callbacks import CraftPoison, CraftUnlearnableClusters
from cp_plugin.config.baselines import ErrorMinConfig
from cp_plugin.config.settings import CraftConfig, UserError
from cp_plugin.data import RawDataset
from cp_plugin.loop import PoisonLoop
from tests.support.small_runs import TWO_COPIES, TWO_CROPS, Pictures, Small, fit

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
ALTERNATE = {"rounds": 5, "model_steps": 2, "noise_steps": 2, "pgd_steps": 1}
JOINT = {"rounds": 10, "model_steps": 1, "schedule": "joint"}
CLEAN = 2
"""Steps of both that come before there are clusters."""
SETTINGS = {"granularity": "cluster", "clusters": 3, "seed": 3, "dtype": "float32"}
STEPS = [pytest.param(ALTERNATE, id="alternate"), pytest.param(JOINT, id="joint")]


class Unlabelled(Pictures):
    """Pictures without classes."""

    def __init__(self, transform: Any, count: int = 16) -> None:
        super().__init__(transform, count)
        self.targets = [-1] * count


class Saving(pl.Callback):
    """Saves a checkpoint after every step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        trainer.save_checkpoint(self.folder / f"step={trainer.global_step}.ckpt")


def keys_of(data: Any) -> list[int]:
    raw = RawDataset(data, None)
    return [raw[row].key for row in range(len(raw))]


@pytest.fixture
def craft(tmp_path: Path) -> Callable[..., Poison]:
    def run(
        steps: dict[str, Any], path: str | None = None, callback: Any = None, **settings: Any
    ) -> Poison:
        pl.seed_everything(0, verbose=False)
        folder = tmp_path / ("whole" if path is None else "resumed")
        crafting = callback or CraftPoison(dir=str(folder), **{**SETTINGS, **steps, **settings})
        trainer = pl.Trainer(
            **{"accelerator": "cpu", "devices": 1, "max_epochs": 9, "logger": False},
            **{"enable_progress_bar": False, "enable_model_summary": False},
            callbacks=[crafting] + ([Saving(folder)] if path is None else []),
            enable_checkpointing=False,
            default_root_dir=folder,
        )
        loader = DataLoader(Unlabelled(TWO_CROPS), 4, shuffle=True)
        trainer.fit(Small(), loader, ckpt_path=None if path is None else tmp_path / "whole" / path)
        found = Poison.load(folder / "poison.safetensors")
        (folder / "poison.safetensors").unlink()
        return found

    return run


@pytest.mark.parametrize("steps", STEPS)
def test_like_images_share_a_delta(craft: Any, tmp_path: Path, steps: dict[str, Any]) -> None:
    """Each image is in the cluster whose centre its features are nearest to."""
    seen: dict[str, Any] = {}

    def placed(encoder: Any, centres: Tensor) -> Any:
        seen.update(encoder=copy.deepcopy(encoder), centres=centres)
        return {"placement.centres": centres}, {}

    callback = CraftPoison(dir=str(tmp_path / "whole"), **{**SETTINGS, **steps})
    callback.placed = placed
    poison = craft(steps, callback=callback)
    data = Unlabelled(None)
    with torch.no_grad():
        features = functional.normalize(seen["encoder"](data.clean()))
    nearest = torch.cdist(features, seen["centres"]).argmin(1)
    assert poison.classes == ("cluster 0", "cluster 1", "cluster 2")
    assert poison.rows(keys=keys_of(Unlabelled(TWO_CROPS))).tolist() == nearest.tolist()
    assert torch.equal(poison.attached["placement.centres"], seen["centres"])
    delta = poison.perturbation.stored
    assert delta.shape == (3, 3, 16, 16)
    assert len(delta.flatten(1).unique(dim=0)) == 3
    victim = inject(Unlabelled(transforms.PILToTensor()), poison)
    for row in range(len(data)):
        clean = torch.from_numpy(data.images[row]).permute(2, 0, 1)
        expected = poison.apply(clean[None], nearest[row : row + 1])[0]
        assert torch.equal(victim[row][0], expected)


@pytest.mark.parametrize("steps", STEPS)
def test_the_surrogate_sees_clean_images_until_there_are_clusters(
    tmp_path: Path, steps: dict[str, Any]
) -> None:
    module, data = Small(), Unlabelled(TWO_COPIES)
    callback = CraftPoison(dir=str(tmp_path), **{**SETTINGS, **steps})
    fit(module, DataLoader(data, 4), tmp_path, callback, max_epochs=9)
    clean = data.clean()
    for number, batch in enumerate(module.batches):
        rows = torch.arange(4) + 4 * number % len(data)
        same = torch.allclose(batch[0][0], clean[rows], atol=1e-6)
        assert same == (number < CLEAN), number
    assert callback.schedule.noise_steps_done == 8


@pytest.mark.parametrize("steps", STEPS)
def test_a_resumed_craft_has_the_clusters_of_one_never_stopped(
    craft: Any, steps: dict[str, Any]
) -> None:
    whole = craft(steps)
    for step in (1, 2, 3, 7):
        resumed = craft(steps, f"step={step}.ckpt")
        assert torch.equal(resumed.perturbation.stored, whole.perturbation.stored), step
        assert torch.equal(resumed.attached[MEMBERS], whole.attached[MEMBERS]), step


def test_a_part_of_the_images(craft: Any) -> None:
    poison = craft(ALTERNATE, fraction=0.5)
    rows = poison.rows(keys=keys_of(Unlabelled(TWO_CROPS)))
    assert int((rows >= 0).sum()) == 8
    assert poison.fraction == 0.5


@pytest.mark.parametrize("steps", STEPS)
def test_a_plain_loop_and_its_state(steps: dict[str, Any], tmp_path: Path) -> None:
    def loop() -> tuple[PoisonLoop, Small, Any]:
        torch.manual_seed(1)
        module = Small()
        loader = DataLoader(Unlabelled(TWO_CROPS), 4)
        poison = PoisonLoop(loader, module, dir=str(tmp_path), **{**SETTINGS, **steps})
        return poison, module, torch.optim.SGD(module.parameters(), lr=0.05)

    def epoch(poison: PoisonLoop, module: Small, optimizer: Any) -> None:
        for batch in poison:
            poison.backward(module.training_step(batch, 0))
            optimizer.step()
            optimizer.zero_grad()

    poison, module, optimizer = loop()
    epoch(poison, module, optimizer)
    state, weights = poison.state_dict(), copy.deepcopy(module.state_dict())
    found = poison.poison()
    assert found.classes == ("cluster 0", "cluster 1", "cluster 2")
    assert sorted(found.attached[MEMBERS][:, 0].tolist()) == sorted(keys_of(Unlabelled(TWO_CROPS)))
    other, module, _ = loop()
    other.load_state_dict(state)
    module.load_state_dict(weights)
    assert torch.equal(other.poison().attached[MEMBERS], found.attached[MEMBERS])
    assert torch.equal(other.poison().perturbation.stored, found.perturbation.stored)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"clusters": 17}, r"16 images cannot be put into 17 clusters"),
        ({"clusters": 1}, r"poison.clusters must be 2 or more, got 1"),
        ({"init": "other.safetensors"}, r"cannot take over the rows of other.safetensors"),
        (
            {"rounds": 1},
            r"training would end after 2 optimiser steps, and the first noise phase comes after 4",
        ),
    ],
)
def test_what_does_not_fit_is_refused(craft: Any, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        craft(ALTERNATE, **settings)


def test_a_supervised_poison_has_classes() -> None:
    with pytest.raises(UserError, match="granularity"):
        ErrorMinConfig(granularity="cluster")
    assert CraftConfig(granularity="cluster").clusters == 10


@pytest.mark.parametrize("step", [20, 36])
def test_unlearnable_clusters_go_on_where_they_were_killed(
    craft: Any, tmp_path: Path, step: int
) -> None:
    """In the training of the surrogate, and after its last step, before there are clusters."""

    def callback(folder: str) -> CraftUnlearnableClusters:
        settings: dict[str, Any] = {"clusters": 3, "epochs": 2, "seed": 3}
        return CraftUnlearnableClusters(dir=str(tmp_path / folder), **settings)

    whole = craft({}, callback=callback("whole"))
    resumed = craft({}, f"step={step}.ckpt", callback("resumed"))
    assert torch.equal(resumed.perturbation.stored, whole.perturbation.stored)
    assert whole.perturbation.stored.abs().max() > 0
    assert torch.equal(resumed.attached[MEMBERS], whole.attached[MEMBERS])
