"""Poisons of a supervised surrogate, crafted whole, and victims of a part of the images."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader
from torchvision import transforms

from cp_plugin import InjectPoison, Poison
from cp_plugin.attack.noise import random_poison
from cp_plugin.callbacks import CraftErrorMin, CraftTap
from cp_plugin.config.baselines import RandomConfig
from cp_plugin.config.settings import UserError
from cp_plugin.data import Photos, RawDataset

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*logging interval.*"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.*"),
]


class Classifier(LightningModule):
    """A small network of a user's own, trained by cross-entropy on `(view, label)`."""

    def __init__(self, classes=12):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AvgPool2d(3),
            nn.Flatten(),
            nn.Linear(200, classes),
        )
        self.images = []

    def training_step(self, batch, batch_index):
        view, labels = batch
        self.images.append(view.detach())
        return functional.cross_entropy(self.net(view), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


@pytest.fixture
def data():
    return Photos(train=True, patches=6, transform=transforms.ToTensor())


def fit(folder, data, callback, epochs, batch_size=24):
    torch.manual_seed(0)
    module = Classifier()
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=callback,
        logger=False,
        accelerator="cpu",
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    shuffled = DataLoader(data, batch_size=batch_size, shuffle=True, drop_last=True)
    trainer.fit(module, shuffled)
    return module.eval()


def images_and_labels(data, poison=None):
    """All images in [0, 1], clean or poisoned, and their labels."""
    raw, labels = RawDataset(data, None), torch.tensor(data.targets)
    items = [raw[row] for row in range(len(data))]
    images = torch.stack([item.image for item in items])
    if poison is not None:
        names = [data.classes[label] for label in data.targets]
        images = poison.apply(images, poison.rows([item.key for item in items], names))
    return images.float() / 255, labels


@torch.no_grad()
def loss_of(module, data, poison=None):
    images, labels = images_and_labels(data, poison)
    return functional.cross_entropy(module.net(images), labels).item()


@pytest.mark.parametrize(("granularity", "pgd_steps"), [("sample", 4), ("class", 2)])
def test_error_minimising_loss_falls_below_clean(data, tmp_path, granularity, pgd_steps):
    craft = CraftErrorMin(
        granularity=granularity,
        rounds=6,
        model_steps=2,
        pgd_steps=pgd_steps,
        seed=0,
        dir=str(tmp_path),
    )
    module = fit(tmp_path, data, craft, epochs=100)
    poison = Poison.load(tmp_path / "poison.safetensors")
    assert poison.granularity == granularity
    assert poison.info["poison"] == "error_min"
    assert module.trainer.global_step == 12
    surrogate = loss_of(module, data, poison)
    assert surrogate < 0.9 * loss_of(module, data)
    noise = random_poison(data, 32, RandomConfig(), seed=0)
    assert surrogate < 0.9 * loss_of(module, data, noise)
    victim = fit(tmp_path, data, InjectPoison(poison), epochs=4)
    assert loss_of(victim, data, poison) < 0.9 * loss_of(victim, data)


@pytest.mark.parametrize("targeted", [False, True])
def test_tap_raises_the_loss_of_the_model_it_was_made_on(data, tmp_path, targeted):
    craft = CraftTap(targeted=targeted, pgd_steps=8, step_size=0.2, dir=str(tmp_path))
    module = fit(tmp_path, data, craft, epochs=60, batch_size=20)
    assert loss_of(module, data) < 1.5  # it has learned: chance is log 12 = 2.5
    clean, labels = images_and_labels(data)
    seen = torch.cat(module.images)
    assert all((clean == view).flatten(1).all(1).any() for view in seen[::50])  # trained on clean
    poison = Poison.load(tmp_path / "poison.safetensors")
    assert len(poison.perturbation) == 72  # also of images that the last, short batch left out
    noise = random_poison(data, 32, RandomConfig(), seed=0)
    for harmless in (None, noise):
        assert loss_of(module, data, poison) > 1.5 * loss_of(module, data, harmless)
    if targeted:
        moved = images_and_labels(data, poison)[0]
        following = (labels + 1) % 12
        with torch.no_grad():
            before, after = (
                functional.cross_entropy(module.net(images), following) for images in (clean, moved)
            )
        assert after < before - 0.5


@pytest.mark.parametrize("craft", [CraftErrorMin, CraftTap])
def test_a_supervised_poison_on_unlabelled_data(craft, data, tmp_path):
    class Unlabelled(torch.utils.data.Dataset):
        def __init__(self):
            self.transform = data.transform

        def __len__(self):
            return 48

        def __getitem__(self, row):
            return self.transform(Image.fromarray(data.data[row])), 0

    with pytest.raises(UserError, match="needs labelled images and this data set has no labels"):
        fit(tmp_path, Unlabelled(), craft(dir=str(tmp_path)), epochs=1)


def test_a_victim_of_a_part_writes_what_it_used(data, tmp_path):
    whole = random_poison(data, 32, RandomConfig(granularity="class"), seed=1)
    callback = InjectPoison(whole, fraction=0.5, folder=tmp_path / "victim")
    fit(tmp_path, data, callback, epochs=1)
    used = Poison.load(tmp_path / "victim" / "poison.safetensors")
    assert used.fraction == 0.5
    assert torch.equal(used.chosen, callback.poison().chosen)
    assert len(used.chosen) == 36


def test_crafting_a_class_poison_for_a_part_records_the_images(data, tmp_path):
    steps = {"rounds": 1, "model_steps": 6, "noise_steps": 1, "pgd_steps": 1}
    craft = CraftErrorMin(granularity="class", fraction=0.5, **steps, dir=str(tmp_path))
    module = fit(tmp_path, data, craft, epochs=2)
    poison = Poison.load(tmp_path / "poison.safetensors")
    clean, labels = images_and_labels(data)
    changed = (images_and_labels(data, poison)[0] != clean).flatten(1).any(1)
    assert torch.bincount(labels[changed], minlength=12).tolist() == [3] * 12
    # The surrogate saw the other half as it is.
    seen = torch.cat(module.images)
    for image, poisoned in zip(clean, changed, strict=True):
        as_it_is = bool((seen == image).flatten(1).all(1).any())
        assert as_it_is != bool(poisoned)
