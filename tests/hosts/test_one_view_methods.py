"""Methods that compare no two views: crafted with, and trained as victims."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import lightning.pytorch
import pytest
import torch
from lightly.models import utils
from lightly.transforms import MAETransform
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from cp_plugin import CraftPoison, InjectPoison, Poison
from cp_plugin.attack.inject import inject
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.data import Photos
from tests.support.lightly_masked_modules import MASKED, SIDE
from tests.support.watched import Watched

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*logging interval.*"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated"),
]
STYLES = {style.name: style for style in MASKED}
CRAFT: dict[str, Any] = {
    **{"rounds": 4, "model_steps": 4, "noise_steps": 6, "pgd_steps": 2, "step_size": 0.2},
    **{"granularity": "sample", "dtype": "float32", "init": "random", "seed": 3},
}
VIEW = MAETransform(input_size=SIDE)
PLAIN = transforms.Compose([transforms.ToTensor(), VIEW.transform.transforms[-1]])


class Small(Dataset[Any]):
    """Photographs of as many pixels as the modules see."""

    def __init__(self, transform: Any) -> None:
        self.photos, self.transform = Photos(train=True, patches=2), transform

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, row: int) -> Any:
        image = Image.fromarray(self.photos.data[row]).resize((SIDE, SIDE))
        return self.transform(image), row % 3, f"{row}.png"


def fit(module: Any, data: Any, folder: Any, *callbacks: Any, **settings: Any) -> None:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = lightning.pytorch.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        enable_checkpointing=False,
        callbacks=list(callbacks),
        **{"max_epochs": 20, **quiet, **settings},
    )
    trainer.fit(module, DataLoader(data, batch_size=12, shuffle=True))


def losses(module: Any, images: Tensor) -> Tensor:
    """Return the mean loss on masks that no craft has drawn."""
    found = []
    module.eval()
    for number in range(40):
        torch.manual_seed(1000 + number)
        with torch.no_grad():
            found.append(module.training_step(([images], None), 0))
    module.train()
    return torch.stack(found).mean()


@pytest.mark.parametrize("name", ["mae", "ijepa"])
def test_a_craft_lowers_the_loss_on_held_out_masks(name, tmp_path, caplog):
    torch.manual_seed(0)
    module, data, craft = STYLES[name].build(lightning.pytorch), Small(VIEW), Watched(**CRAFT)
    with caplog.at_level(logging.INFO, logger="cp_plugin"):
        fit(module, data, tmp_path, craft)
    told = [line for line in caplog.messages if "compares no two views" in line]
    assert len(told) == 1
    assert "the paper" in told[0]
    assert craft.phases == 4
    poison = Poison.load(tmp_path / "poison.safetensors")
    delta = poison.perturbation.stored
    assert 0 < delta.abs().max() <= 8 / 255 + 1e-6
    noise = torch.empty_like(delta).uniform_(-8 / 255, 8 / 255)
    random = dataclasses.replace(poison, perturbation=Perturbation(noise, 8 / 255))
    clean, noisy, crafted = (
        losses(module, torch.stack([one[0] for one in images]))
        for images in (Small(PLAIN), inject(Small(PLAIN), random), inject(Small(PLAIN), poison))
    )
    assert crafted < clean
    assert crafted < noisy
    victim = STYLES[name].build(lightning.pytorch)
    before = losses(victim, torch.stack([image for image, *_ in Small(PLAIN)]))
    fit(victim, Small(VIEW), tmp_path, InjectPoison(poison))
    assert (
        losses(victim, torch.stack([image for image, *_ in inject(Small(PLAIN), poison)])) < before
    )


def test_masks_are_drawn_anew_in_every_noise_step(tmp_path, monkeypatch):
    drawn: list[Tensor] = []
    original = utils.random_token_mask

    def noted(*args: Any, **kwargs: Any) -> Any:
        kept, hidden = original(*args, **kwargs)
        drawn.append(hidden)
        return kept, hidden

    class Noted(CraftPoison):
        def _noise_phase(self, trainer: Any, pl_module: Any) -> Tensor:
            drawn.clear()
            return super()._noise_phase(trainer, pl_module)

    monkeypatch.setattr(utils, "random_token_mask", noted)
    module = STYLES["mae"].build(lightning.pytorch)
    settings = {"rounds": 1, "model_steps": 1, "noise_steps": 2, "pgd_steps": 3}
    fit(module, Small(VIEW), tmp_path, Noted(**CRAFT | settings))
    steps = drawn[-6:]
    assert len({tuple(hidden.flatten().tolist()) for hidden in steps}) == 6


@pytest.mark.parametrize("name", ["simmim", "aim", "capi"])
def test_others_are_crafted_with(name, tmp_path, caplog):
    settings = {"rounds": 2, "model_steps": 2, "noise_steps": 1, "pgd_steps": 1}
    craft = Watched(**CRAFT | settings)
    with caplog.at_level(logging.INFO, logger="cp_plugin"):
        fit(STYLES[name].build(lightning.pytorch), Small(VIEW), tmp_path, craft)
    assert craft.phases == 2
    branch = ", ".join(STYLES[name].momentum) or "none"
    assert f"momentum branch of {name.upper().replace('SIMMIM', 'SimMIM')}: {branch}" in caplog.text
    assert Poison.load(tmp_path / "poison.safetensors").perturbation.stored.abs().max() > 0
