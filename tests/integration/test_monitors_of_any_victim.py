"""Monitors beside augmentations, sizes and validation loaders of any kind."""

import logging

import lightning.pytorch
import pytest
import torch
from lightly.transforms.multi_view_transform import MultiViewTransform
from lightly.transforms.simclr_transform import SimCLRTransform
from torch.utils.data import DataLoader
from torchvision import transforms as T
from torchvision.transforms import v2

from cp_plugin import CraftPoison, KNNMonitor, Poison
from cp_plugin.callbacks import Defence
from cp_plugin.callbacks.inject import NoisePoison
from cp_plugin.config.baselines import RandomConfig
from cp_plugin.config.settings import UserError
from cp_plugin.data import Photos
from tests.support.own_module import loader, simclr, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*logging interval.*"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.*"),
]
NORMAL = ([0.5, 0.4, 0.3], [0.2, 0.25, 0.3])
AUGMENTS = [T.RandAugment(), T.TrivialAugmentWide(), T.AutoAugment(), T.AugMix(), v2.RandAugment()]


def data(*steps):
    view = T.Compose([T.RandomResizedCrop(24), *steps, T.ToTensor(), T.Normalize(*NORMAL)])
    return Photos(train=True, patches=2, transform=MultiViewTransform([view, view]))


def queries():
    return Photos(train=False, patches=2, transform=T.ToTensor())


def validating():
    module = simclr(lightning.pytorch)
    type(module).validation_step = lambda self, batch, batch_idx, dataloader_idx=0: None
    return module


@pytest.mark.parametrize(
    "augment", AUGMENTS, ids=lambda one: type(one).__module__[-9:] + repr(one)[:12]
)
def test_an_augmentation_without_a_mirror_does_not_hinder_who_makes_no_views(augment, tmp_path):
    from cp_plugin.mirror.pipeline import mirror_outline

    images = data(augment)
    outline = mirror_outline(images.transform)
    assert (outline.views, outline.view_size) == (2, (24, 24))
    grey = torch.full((1, 3, 1, 1), 0.5)
    assert torch.allclose(outline.normalize(grey), T.Normalize(*NORMAL)(grey))
    monitor = KNNMonitor(query=queries(), every_n_epochs=1)
    callbacks = [NoisePoison(RandomConfig()), Defence("smoothing"), Defence("noise"), monitor]
    fitting = trainer(lightning.pytorch, tmp_path, *callbacks, max_epochs=1)
    fitting.fit(simclr(lightning.pytorch), loader(images))
    assert 0 <= monitor.results[-1]["knn_poisoned_bank"] <= 100


def test_what_may_normalise_or_size_the_views_is_refused():
    from cp_plugin.mirror.pipeline import mirror_outline

    after = T.Compose([T.RandomResizedCrop(24), T.ToTensor(), T.Lambda(lambda image: image * 2)])
    with pytest.raises(UserError, match="normalisation cannot be told from the transform"):
        mirror_outline(after)
    with pytest.raises(UserError, match="size of the views cannot be told, since Lambda"):
        mirror_outline(T.Compose([T.Lambda(lambda image: image.crop((0, 0, 9, 9))), T.ToTensor()]))


@pytest.mark.parametrize("several", [list, lambda two: dict(zip("ab", two, strict=True))])
def test_several_validation_loaders_need_a_choice(several, tmp_path):
    two = [DataLoader(queries(), 8), DataLoader(queries(), 8)]
    fitting = trainer(lightning.pytorch, tmp_path, KNNMonitor(), max_epochs=1)
    with pytest.raises(UserError, match=r"one validation loader and found 2; pass .*query="):
        fitting.fit(validating(), loader(data()), several(two))


def test_one_validation_loader_in_a_list_serves(tmp_path):
    monitor = KNNMonitor()
    fitting = trainer(lightning.pytorch, tmp_path, monitor, max_epochs=1)
    fitting.fit(validating(), loader(data()), [DataLoader(queries(), 8)])
    assert len(monitor.results) == 1


@pytest.mark.parametrize("size", [24, 48])
def test_a_monitor_of_deltas_that_are_not_of_the_crops_size(size, tmp_path):
    images = Photos(train=True, patches=2, transform=SimCLRTransform(32, gaussian_blur=0))
    monitor = KNNMonitor(query=queries(), every_n_epochs=1)
    craft = CraftPoison(rounds=1, model_steps=1, noise_steps=2, pgd_steps=1, image_size=size)
    fitting = trainer(lightning.pytorch, tmp_path, craft, monitor, max_epochs=1)
    fitting.fit(simclr(lightning.pytorch), loader(images))
    poison = Poison.load(tmp_path / "poison.safetensors")
    assert poison.perturbation.shape == (3, size, size)
    assert monitor._bank.images.shape[1:] == (3, 32, 32)
    changed = monitor._bank.poisoned(poison).images
    assert changed.shape == monitor._bank.images.shape
    assert not torch.equal(changed, monitor._bank.images)


@pytest.mark.filterwarnings("ignore:You have overridden `on_after_batch_transfer`.*")
@pytest.mark.parametrize("owner", ["module", "data"])
def test_a_hook_that_may_normalise_batches_is_named(owner, tmp_path, caplog):
    class Hooked:
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch

    class Images(lightning.pytorch.LightningDataModule):
        def train_dataloader(self):
            return loader(data())

    module, images = simclr(lightning.pytorch), Images()
    hooked = module if owner == "module" else images
    hooked.__class__ = type("Hooked", (Hooked, type(hooked)), {"__module__": __name__})
    fitting = trainer(lightning.pytorch, tmp_path, KNNMonitor(query=queries()), max_epochs=1)
    with caplog.at_level(logging.WARNING, "cp_plugin"):
        fitting.fit(module, datamodule=images)
    assert caplog.text.count("Hooked.on_after_batch_transfer is not looked into") == 1
