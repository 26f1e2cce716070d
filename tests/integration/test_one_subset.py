"""One data set and one fraction: every poison sits in the same images."""

import lightning.pytorch
import pytest
import torch
from lightly.transforms.multi_view_transform import MultiViewTransform
from torch.nn import functional
from torch.utils.data import DataLoader
from torchvision.transforms import ToTensor

from cp_plugin import CraftPoison, InjectPoison, Poison, PoisonLoop
from cp_plugin.attack.noise import random_poison, synthetic_poison
from cp_plugin.callbacks import CraftErrorMin, CraftTap
from cp_plugin.config.baselines import RandomConfig, SyntheticConfig
from cp_plugin.data import Photos, RawDataset
from tests.support.own_module import simclr, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*logging interval.*"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.*"),
]
FRACTION, PATCHES = 0.4, 5
SHORT = {"rounds": 1, "model_steps": 1, "noise_steps": 3, "pgd_steps": 1, "fraction": FRACTION}


def data():
    return Photos(train=True, patches=PATCHES, transform=MultiViewTransform([ToTensor()] * 2))


def carrying(poison, images):
    """Return the rows of the images that carry a poison."""
    raw = RawDataset(images, None)
    names = [images.classes[label] for label in images.targets]
    rows = poison.rows([raw[row].key for row in range(len(raw))], names)
    return (rows >= 0).nonzero().flatten().tolist()


def classifier():
    module = simclr(lightning.pytorch)
    head = torch.nn.Linear(8, 12)

    def training_step(batch, batch_idx):
        views, labels = batch
        return functional.cross_entropy(head(module.backbone(views[0])), labels)

    module.training_step = training_step
    return module


def fitted(folder, callback, module=None):
    images = data()
    fitting = trainer(lightning.pytorch, folder, callback, max_epochs=4)
    fitting.fit(module or simclr(lightning.pytorch), DataLoader(images, 20, shuffle=True))
    return Poison.load(folder / "poison.safetensors")


def looped(folder):
    module = simclr(lightning.pytorch)
    poison = PoisonLoop(DataLoader(data(), 20), module, **SHORT, seed=5)
    for batch in poison:
        poison_loss = module.training_step(batch, 0)
        poison.backward(poison_loss)
    return poison.poison()


def random(folder, **settings):
    return random_poison(data(), None, RandomConfig(fraction=FRACTION, **settings), 3)


def synthetic(folder, **settings):
    config = SyntheticConfig(fraction=FRACTION, patch=4, **settings)
    return synthetic_poison(data(), None, config, 3)


def injected(folder):
    whole = random_poison(data(), None, RandomConfig(), 1)
    return fitted(folder, InjectPoison(whole, fraction=FRACTION))


POISONS = {
    "random class": lambda folder: random(folder, granularity="class"),
    "synthetic sample": lambda folder: synthetic(folder, granularity="sample"),
    "synthetic class": lambda folder: synthetic(folder, granularity="class"),
    "injected": injected,
    "cp": lambda folder: fitted(folder, CraftPoison(**SHORT, seed=1)),
    "cp of another seed": lambda folder: fitted(folder, CraftPoison(**SHORT, seed=2)),
    "cp_class": lambda folder: fitted(folder, CraftPoison(**SHORT, granularity="class")),
    "error_min": lambda folder: fitted(
        folder, CraftErrorMin(**SHORT, granularity="sample"), classifier()
    ),
    "tap": lambda folder: fitted(folder, CraftTap(pgd_steps=1, fraction=FRACTION), classifier()),
    "loop": looped,
}


@pytest.mark.parametrize("make", POISONS.values(), ids=POISONS)
def test_every_poison_of_a_fraction_sits_in_the_same_images(make, tmp_path):
    images = data()
    reference = carrying(random(tmp_path, granularity="sample"), images)
    classes = torch.tensor(images.targets)[reference].bincount(minlength=12)
    assert classes.tolist() == [2] * 12
    assert carrying(make(tmp_path), images) == reference
