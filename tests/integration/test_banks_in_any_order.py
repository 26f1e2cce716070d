"""A monitor's banks are the clean images, and these plus delta, whatever callbacks stand where."""

from itertools import permutations

import lightning.pytorch
import pytest
import torch
from lightly.transforms.multi_view_transform import MultiViewTransform
from torch.utils.data import DataLoader, Subset
from torchvision.transforms import ToTensor

from cp_plugin import CraftPoison, InjectPoison, KNNMonitor, Poison, PoisonLoop, poisoned
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.callbacks import Defence, MirrorViews
from cp_plugin.callbacks.inject import NoisePoison
from cp_plugin.config.baselines import RandomConfig
from cp_plugin.config.settings import UserError
from cp_plugin.data import Photos, RawDataset
from cp_plugin.defences import Smoothing
from cp_plugin.evaluation.banks import Bank
from tests.support.own_module import loader, simclr, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*logging interval.*"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.*"),
]
EPS = 8 / 255
COUNT = 24


def data():
    # Views are the images themselves.
    return Photos(train=True, patches=2, transform=MultiViewTransform([ToTensor(), ToTensor()]))


def clean_images(images):
    raw = RawDataset(images, None)
    return torch.stack([raw[row].image for row in range(len(raw))])


def poison_of(kind, images):
    count = len(images.classes) if kind == "class" else COUNT
    rows = torch.linspace(-8, 8, count * 3072).round().view(count, 3, 32, 32) / 255
    if kind == "class":
        return Poison(Perturbation(rows, EPS), "class", classes=images.classes)
    raw = RawDataset(images, None)
    keys = torch.tensor([raw[row].key for row in range(COUNT)])
    return Poison(Perturbation(rows, EPS), "sample", keys=keys)


class Banks(KNNMonitor):
    """Keeps what it measured on."""

    def _evaluate(self, *arguments):
        super()._evaluate(*arguments)
        self.clean, self.changed = self._bank.images, self._bank.poisoned(self._poison()).images


def run(tmp_path, images, *callbacks):
    module = simclr(lightning.pytorch)
    fitting = trainer(lightning.pytorch, tmp_path, *callbacks, max_epochs=1)
    batches = DataLoader(images, batch_size=COUNT)
    fitting.fit(module, batches)
    assert batches.dataset is images
    return module.seen[0][0]


def expected(poison, images, clean):
    raw = RawDataset(images, None)
    keys = [raw[row].key for row in range(COUNT)]
    return poison.apply(clean, poison.rows(keys, [images.classes[y] for y in images.targets]))


@pytest.mark.parametrize("kind", ["class", "sample"])
def test_injection_defence_mirror_and_monitor_in_any_order(kind, tmp_path):
    images = data()
    clean, poison = clean_images(images), poison_of(kind, images)
    changed = expected(poison, images, clean)
    assert (changed.int() - clean.int()).abs().max() == 8
    smooth = Smoothing()(changed).float() / 255
    for order in permutations(range(4)):
        monitor = Banks(query=Photos(train=False, patches=1), every_n_epochs=1)
        all_four = [InjectPoison(poison), Defence("smoothing"), MirrorViews(), monitor]
        view = run(tmp_path, images, *(all_four[place] for place in order))
        assert torch.equal(monitor.clean, clean), order
        assert torch.equal(monitor.changed, changed), order
        assert torch.allclose(view, smooth, atol=1e-6), order


def test_noise_mirror_and_monitor_in_any_order(tmp_path):
    images = data()
    clean = clean_images(images)
    for order in permutations(range(3)):
        noise = NoisePoison(RandomConfig(seed=1), tmp_path / str(order))
        monitor = Banks(query=Photos(train=False, patches=1), every_n_epochs=1)
        three = [noise, MirrorViews(), monitor]
        view = run(tmp_path, images, *(three[place] for place in order))
        changed = expected(noise.poison(), images, clean)
        assert torch.equal(monitor.clean, clean), order
        assert torch.equal(monitor.changed, changed), order
        assert torch.allclose(view, changed.float() / 255, atol=1e-6), order


@pytest.mark.parametrize("first", [True, False])
def test_a_craft_and_a_monitor_in_either_order(first, tmp_path):
    images = data()
    clean = clean_images(images)
    craft = CraftPoison(rounds=1, model_steps=1, noise_steps=1, granularity="class")
    monitor = Banks(query=Photos(train=False, patches=1), every_n_epochs=1)
    run(tmp_path, images, *((monitor, craft) if first else (craft, monitor)))
    assert torch.equal(monitor.clean, clean)
    assert torch.equal(monitor.changed, expected(craft.poison(), images, clean))


def test_two_poisons_and_two_makers_of_views_are_refused(tmp_path):
    images = data()
    poison = poison_of("class", images)
    craft = {"rounds": 1, "model_steps": 1, "noise_steps": 1}
    for callbacks, text in (
        ((InjectPoison(poison), InjectPoison(poison)), "InjectPoison and InjectPoison both bring"),
        ((InjectPoison(poison), CraftPoison(**craft)), "InjectPoison and CraftPoison both bring"),
        ((MirrorViews(), CraftPoison(**craft)), "MirrorViews and CraftPoison both make the views"),
    ):
        with pytest.raises(UserError, match=text):
            run(tmp_path, images, *callbacks)


def test_a_data_set_that_carries_a_poison_takes_no_second(tmp_path):
    images = data()
    poison = poison_of("class", images)
    carrying = Subset(poisoned(images, poison), range(COUNT))
    with pytest.raises(UserError, match="carry a class poison already"):
        poisoned(carrying, poison)
    with pytest.raises(UserError, match="carry a class poison already"):
        run(tmp_path, carrying, InjectPoison(poison))
    with pytest.raises(UserError, match="carry a class poison already"):
        PoisonLoop(loader(carrying), simclr(lightning.pytorch))


def test_a_bank_of_a_poisoned_data_set_is_clean():
    from cp_plugin.data import clean_dataset

    images = data()
    clean, poison = clean_images(images), poison_of("sample", images)
    carrying = Subset(poisoned(images, poison), range(COUNT))
    assert not torch.equal(clean_images(carrying), clean)
    assert torch.equal(Bank.clean(carrying, None).images, clean)
    assert clean_dataset(images) is images
