"""Crafting with precision=16-mixed: gradients that float16 cannot hold without a scaled loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import torch
from lightly.transforms.simclr_transform import SimCLRTransform
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.utils.data import DataLoader

from cp_plugin import CraftPoison
from cp_plugin.config.settings import UserError
from cp_plugin.data import Photos
from tests.support.lightly_modules import simclr, with_momentum

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.*"),
]
EPS = 8 / 255
CRAFT = {
    **{"init": "zero", "dtype": "float32", "seed": 5},
    **{"rounds": 1, "model_steps": 1, "noise_steps": 1, "pgd_steps": 1},
}


def byol(root: Any) -> Any:
    class BYOL(with_momentum(root)):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_index: int) -> Tensor:
            x0, x1 = batch[0]
            # A product, as in BYOL: a difference of like features would be lost to rounding.
            return -(self.forward(x0) * self.forward_momentum(x1)).mean()

    return BYOL()


def faint(build: Callable[[Any], Any], factor: float) -> Any:
    """A module with a tiny loss, whose weights stay as they are."""

    class Faint(type(build(lightning.pytorch))):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_index: int) -> Tensor:
            return factor * super().training_step(batch, batch_index)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    torch.manual_seed(0)
    return Faint()


def crafted(module: Any, folder: Path, scaler: Any = None, **settings: Any) -> Tensor:
    """Return delta after a round, in float16 where there is a scaler."""
    data = Photos(train=True, patches=2, transform=SimCLRTransform(input_size=32, gaussian_blur=0))
    craft = CraftPoison(**{**CRAFT, "dir": str(folder), **settings})
    trainer = lightning.pytorch.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)] if scaler else [],
        callbacks=[craft],
    )
    trainer.fit(module, DataLoader(data, batch_size=24))
    return craft.poison().perturbation.stored


CASES = {
    "simclr": (simclr, {}, 1e-4),
    "a momentum branch": (byol, {}, 1e-4),
    "joint": (simclr, {"schedule": "joint", "dual_branch": False}, 1e-5),
}


@pytest.mark.parametrize("case", CASES)
def test_a_tiny_loss_moves_delta_as_in_float32(case, tmp_path):
    build, settings, tiny = CASES[case]

    def after_a_round(name: str, scaler: Any = None) -> Tensor:
        return crafted(faint(build, tiny), tmp_path / name, scaler, **settings)

    single = after_a_round("single")
    half = after_a_round("half", torch.amp.GradScaler("cpu"))
    assert single.abs().max() == pytest.approx(0.1 * EPS)
    moved = single != 0  # a crop leaves a part of each image out
    assert moved.float().mean() > 0.5
    assert (half.sign() == single.sign())[moved].float().mean() > 0.9
    with pytest.raises(UserError, match="no row of the perturbation has moved"):
        after_a_round("flushed", torch.amp.GradScaler("cpu", enabled=False))


def test_an_overflow_moves_nothing(tmp_path):
    """A scale that is far too large leaves infinities and NaN."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    with pytest.raises(UserError, match="no row of the perturbation has moved"):
        crafted(faint(simclr, 1.0), tmp_path, scaler)
