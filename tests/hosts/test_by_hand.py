"""Modules that optimise by hand: crafted with as with the trainer's own optimisation."""

from __future__ import annotations

from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from lightly.loss import NTXentLoss, VICRegLoss
from lightly.models.utils import update_momentum
from lightly.transforms.simclr_transform import SimCLRTransform
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from cp_plugin import CraftPoison, Poison
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.callbacks.supervised import CraftTap
from cp_plugin.config.settings import UserError
from cp_plugin.data import Photos
from tests.support.lightly_modules import online, with_momentum
from tests.support.watched import Watched

ROOTS = {"lightning.pytorch": lightning.pytorch, "pytorch_lightning": pytorch_lightning}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.*"),
]
CRAFT = {
    **{"rounds": 2, "model_steps": 2, "noise_steps": 2, "pgd_steps": 2},
    **{"granularity": "class", "dtype": "float32", "seed": 5},
}


def simclr(root: Any, hand: bool) -> Any:
    class SimCLR(online(root)):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = not hand
            self.trained = 0

        def loss(self, batch: Any) -> Tensor:
            x0, x1 = batch[0]
            return NTXentLoss()(self(x0), self(x1))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            if hand:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                self.clip_gradients(optimizer, 0.5, "norm")
                optimizer.step()
                self.lr_schedulers().step()
            return loss

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.trained += 1

        def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
            self.clip_gradients(optimizer, 0.5, "norm")

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    return SimCLR()


def byol(root: Any, hand: bool) -> Any:
    class BYOL(with_momentum(root)):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = not hand

        def ema(self) -> None:
            update_momentum(self.backbone, self.backbone_momentum, m=0.9)
            update_momentum(self.projection_head, self.projection_head_momentum, m=0.9)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x0, x1 = batch[0]
            if not hand:
                self.ema()
                return -(self(x0) * self.forward_momentum(x1)).mean()
            optimizer = self.optimizers(use_pl_optimizer=False)
            self.ema()
            loss = -(self(x0) * self.forward_momentum(x1)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return None

    return BYOL()


def two_optimizers(root: Any, hand: bool) -> Any:
    """Two terms of VICReg, each with a backward pass, an optimizer and a closure of its own."""

    class Two(online(root)):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = not hand
            self.trained = 0
            self.clip()

        @torch.no_grad()
        def clip(self) -> None:
            for parameter in self.projection_head.parameters():
                parameter.clamp_(-0.5, 0.5)

        def losses(self, batch: Any) -> tuple[Tensor, Tensor]:
            z0, z1 = (self(view) for view in batch[0])
            return VICRegLoss(25, 0, 0)(z0, z1), VICRegLoss(0, 25, 1)(z0, z1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if not hand:
                return self.losses(batch)[0] + self.losses(batch)[1]
            first, second = self.optimizers()
            for optimizer, number in ((first, 0), (second, 1)):

                def closure(number: int = number) -> None:
                    self.zero_grad()
                    self.manual_backward(self.losses(batch)[number])

                with optimizer.toggle_model():
                    optimizer.step(closure=closure)
                self.clip()  # as a critic's weights are
            return {"kept": 1}

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.trained += 1

        def configure_optimizers(self) -> Any:
            if not hand:
                return torch.optim.SGD(self.parameters(), lr=0.0)
            parts = (self.backbone, self.projection_head)
            return [torch.optim.SGD(part.parameters(), lr=0.0) for part in parts]

    return Two()


def fit(root: Any, module: Any, folder: Any, craft: Any = None, **settings: Any) -> Any:
    photos = Photos(train=True, patches=2, transform=SimCLRTransform(32, gaussian_blur=0))
    chosen = {"max_epochs": 3, "limit_train_batches": 2} | settings
    trainer = root.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[craft or CraftPoison(**CRAFT)],
        **{name: value for name, value in chosen.items() if name != "ckpt_path"},
    )
    trainer.fit(module, DataLoader(photos, batch_size=12), ckpt_path=chosen.get("ckpt_path"))
    return trainer


def crafted(root: Any, build: Any, hand: bool, folder: Any, **settings: Any) -> Tensor:
    torch.manual_seed(0)
    fit(root, build(root, hand), folder, CraftPoison(**CRAFT | settings))
    return Poison.load(folder / "poison.safetensors").perturbation.stored


@pytest.mark.parametrize("build", [simclr, byol])
@pytest.mark.parametrize("root", ROOTS.values(), ids=ROOTS)
def test_the_poison_is_that_of_automatic_optimisation(root, build, tmp_path):
    """Bit for bit; BYOL through both branches."""
    by_hand = crafted(root, build, True, tmp_path / "hand")
    assert torch.equal(by_hand, crafted(root, build, False, tmp_path / "automatic"))
    if build is byol:
        single = crafted(root, build, True, tmp_path / "single", dual_branch=False)
        assert not torch.equal(by_hand, single)


def test_several_losses_of_a_step_add_up(tmp_path, monkeypatch):
    """The gradient of delta is that of their sum."""
    gradients: list[Tensor] = []
    own = Perturbation.descend

    def descend(self: Any, rows: Tensor, gradient: Tensor, *rest: Any) -> None:
        gradients.append(gradient.clone())
        own(self, rows, gradient, *rest)

    monkeypatch.setattr(Perturbation, "descend", descend)
    first = {"rounds": 1, "noise_steps": 1, "pgd_steps": 1}
    for hand in (True, False):
        crafted(lightning.pytorch, two_optimizers, hand, tmp_path / str(hand), **first)
    by_hand, automatic = gradients
    assert automatic.abs().sum() > 0
    torch.testing.assert_close(by_hand, automatic, rtol=1e-3, atol=1e-7 * len(automatic))


@pytest.mark.parametrize("build", [simclr, byol, two_optimizers])
def test_a_noise_phase_leaves_module_and_optimizers_as_they_were(build, tmp_path):
    craft = Watched(**CRAFT)
    fit(lightning.pytorch, build(lightning.pytorch, True), tmp_path, craft)
    assert craft.phases == 2


def test_a_training_step_is_one_model_step(tmp_path):
    """However many optimizers step in it, none too, and whatever limit the user has set."""
    module = two_optimizers(lightning.pytorch, True)
    trainer = fit(lightning.pytorch, module, tmp_path / "two")
    assert (module.trained, trainer.global_step) == (4, 8)

    class Accumulates(type(simclr(lightning.pytorch, True))):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(self.loss(batch))
            if batch_idx % 2:
                self.optimizers().step()
                self.optimizers().zero_grad()

    module = Accumulates()
    trainer = fit(lightning.pytorch, module, tmp_path / "half")
    assert (module.trained, trainer.global_step) == (4, 2)
    module, craft = two_optimizers(lightning.pytorch, True), Watched(**CRAFT)
    trainer = fit(lightning.pytorch, module, tmp_path / "limited", craft, max_steps=6)
    assert (module.trained, trainer.global_step, craft.phases) == (3, 6, 1)


def test_restarts_and_resumption_count_model_steps(tmp_path):
    craft = Watched(**CRAFT | {"restarts": 1})
    module = two_optimizers(lightning.pytorch, True)
    fit(lightning.pytorch, module, tmp_path / "restarts", craft)
    assert (module.trained, craft.phases) == (8, 4)
    whole = crafted(lightning.pytorch, two_optimizers, True, tmp_path / "whole", rounds=3)
    torch.manual_seed(0)
    folder = tmp_path / "resumed"
    module = two_optimizers(lightning.pytorch, True)
    trainer = fit(
        lightning.pytorch, module, folder, CraftPoison(**CRAFT | {"rounds": 3}), max_epochs=1
    )
    trainer.save_checkpoint(folder / "last.ckpt")
    (folder / "poison.safetensors").unlink()
    module, craft = two_optimizers(lightning.pytorch, True), CraftPoison(**CRAFT | {"rounds": 3})
    fit(lightning.pytorch, module, folder, craft, ckpt_path=folder / "last.ckpt")
    assert module.trained == 4
    assert torch.equal(craft.poison().perturbation.stored, whole)


def test_losses_beside_and_losses_that_do_not_fit(tmp_path):
    """A probe trained on detached features is left alone; a step that shows no loss is an error."""

    class Probed(type(simclr(lightning.pytorch, True))):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.probe = torch.nn.Linear(8, 2)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            features = self.backbone(batch[0][0]).flatten(1).detach()
            self.manual_backward(F.cross_entropy(self.probe(features), batch[1] % 2))
            super().training_step(batch, batch_idx)

    torch.manual_seed(0)
    fit(lightning.pytorch, Probed(), tmp_path / "probed")

    class Silent(type(simclr(lightning.pytorch, True))):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch)

    with pytest.raises(UserError, match=r"Silent left all of them out, .* to manual_backward"):
        fit(lightning.pytorch, Silent(), tmp_path / "silent")

    class Cut(type(simclr(lightning.pytorch, True))):  # type: ignore[misc]
        def loss(self, batch: Any) -> Tensor:
            return self(batch[0][0].data).mean() + self.projection_head[0].weight.sum()

    with pytest.raises(UserError, match="expected a loss that depends on the views"):
        fit(lightning.pytorch, Cut(), tmp_path / "cut")


def test_a_classifier_by_hand_is_misled(tmp_path):
    class Classifier(type(simclr(lightning.pytorch, True))):  # type: ignore[misc]
        def loss(self, batch: Any) -> Tensor:
            return F.cross_entropy(self(batch[0][0]), batch[1] % 8)

    stored = []
    for hand in (True, False):
        torch.manual_seed(0)
        module = Classifier()
        module.automatic_optimization = not hand
        if not hand:
            module.training_step = lambda batch, batch_idx, m=module: m.loss(batch)
        craft = CraftTap(dir=str(tmp_path / str(hand)), seed=5, pgd_steps=2, dtype="float32")
        fit(lightning.pytorch, module, tmp_path, craft, max_epochs=1)
        stored.append(craft.poison().perturbation.stored)
    assert torch.equal(*stored)
