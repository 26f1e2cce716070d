"""Poisons that contrastive poisoning is compared with, each against what its paper states."""

import pytest
import torch
from torch.nn import functional
from torchvision import transforms

from cp_plugin import Poison
from cp_plugin.attack.noise import random_poison, synthetic_poison
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.callbacks import inject
from cp_plugin.config.baselines import ErrorMinConfig, RandomConfig, SyntheticConfig, TapConfig
from cp_plugin.config.settings import UserError, build
from cp_plugin.data import Photos, RawDataset

EPS = 8 / 255


@pytest.fixture
def data():
    return Photos(train=True, patches=6, transform=transforms.ToTensor())


def linearly_told_apart(points, labels, held_out):
    """Accuracy in percent of least squares on one-hot labels, fitted on the other points."""
    with_bias = torch.cat([points, torch.ones(len(points), 1)], 1).double()
    targets = functional.one_hot(labels).double()
    solution = torch.linalg.lstsq(with_bias[~held_out], targets[~held_out]).solution
    right = (with_bias[held_out] @ solution).argmax(1) == labels[held_out]
    return 100 * right.double().mean().item()


def patch_means(poison, data):
    """What a poison adds to each image in 8-bit levels, (N, 48): far fewer axes than images."""
    raw = RawDataset(data, None)
    keys = [raw[row].key for row in range(len(data))]
    names = [data.classes[label] for label in data.targets]
    added = poison.offsets(poison.rows(keys, names)).float()
    return functional.avg_pool2d(added, 8).flatten(1)


def test_synthetic_noise_is_linearly_separable_and_random_noise_is_not():
    data = Photos(train=True, patches=30)
    labels, held_out = torch.tensor(data.targets), torch.arange(360) % 3 == 0
    poison = synthetic_poison(data, 32, SyntheticConfig(), seed=3)
    assert linearly_told_apart(patch_means(poison, data), labels, held_out) == 100
    noise = random_poison(data, 32, RandomConfig(), seed=3)
    assert linearly_told_apart(patch_means(noise, data), labels, held_out) < 30


def test_synthetic_noise_keeps_within_its_budget_and_fills_its_patches(data):
    poison = synthetic_poison(data, 32, SyntheticConfig(eps=6 / 255, patch=8), seed=0)
    delta = poison.perturbation.gather(torch.arange(len(poison.perturbation)))
    assert torch.allclose(delta.abs().amax((1, 2, 3)), torch.tensor(6 / 255))
    squares = delta.unfold(2, 8, 8).unfold(3, 8, 8)
    assert torch.equal(squares.amax((-2, -1)), squares.amin((-2, -1)))
    assert len(delta) == 72
    again = synthetic_poison(data, 32, SyntheticConfig(eps=6 / 255, seed=0), seed=9)
    assert torch.equal(again.perturbation.stored, poison.perturbation.stored)


def test_synthetic_noise_a_class_and_patches_that_do_not_divide_the_image(data):
    config = SyntheticConfig(granularity="class", patch=5)
    poison = synthetic_poison(data, 32, config, seed=0)
    assert poison.perturbation.shape == (3, 32, 32)
    assert poison.classes == tuple(data.classes)


def test_synthetic_noise_with_too_few_patches(data):
    with pytest.raises(UserError, match="3 patches cannot hold 12 classes apart"):
        synthetic_poison(data, 32, SyntheticConfig(patch=32), seed=0)


def test_gaussian_noise_has_the_clipped_distribution(data):
    poison = random_poison(data, 32, RandomConfig(distribution="gaussian"), seed=0)
    units = poison.perturbation.gather(torch.arange(72)) / EPS
    # Of a standard normal beyond 1: 31.73 %; standard deviation once clipped: 0.7180.
    assert (units.abs() > 0.9999).float().mean().item() == pytest.approx(0.3173, abs=0.01)
    assert units.std().item() == pytest.approx(0.7180, abs=0.01)
    assert units.abs().max() <= 1 + 1e-6


@pytest.mark.parametrize(
    ("config", "values", "text"),
    [
        (TapConfig, {"fraction": 0}, r"poison\.fraction must be in \(0, 1\], got 0\.0"),
        (TapConfig, {"granularity": "class"}, r"poison\.granularity is not a setting"),
        (TapConfig, {"pgd_steps": 0}, r"poison\.pgd_steps must be an integer of at least 1"),
        (TapConfig, {"targeted": "yes"}, r"poison\.targeted must be true or false"),
        (ErrorMinConfig, {"step_size": 3}, r"poison\.step_size is in units of eps"),
        (ErrorMinConfig, {"dual_branch": True}, r"poison\.dual_branch is not a setting"),
        (SyntheticConfig, {"separation": 0.1}, r"poison\.separation must be in \[1, 1000\]"),
        (SyntheticConfig, {"patch": 0}, r"poison\.patch must be an integer of at least 1"),
        (SyntheticConfig, {"fraction": 1.5}, r"poison\.fraction must be in \(0, 1\]"),
        (RandomConfig, {"distribution": "cauchy"}, r"must be one of uniform, gaussian"),
        (RandomConfig, {"fraction": -1}, r"poison\.fraction must be in \(0, 1\]"),
    ],
)
def test_mistakes_in_settings(config, values, text):
    with pytest.raises(UserError, match=text):
        build(config, values)


def changed_of(dataset, clean):
    """Which images of an injected data set differ from the clean ones, bool (N)."""
    pairs = zip((dataset[row][0] for row in range(len(clean))), clean, strict=True)
    return torch.tensor([not torch.equal(image, plain) for image, plain in pairs])


@pytest.mark.parametrize("granularity", ["sample", "class"])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 1.0])
def test_a_part_of_each_class_is_injected_and_the_choice_is_in_the_file(
    granularity, fraction, tmp_path
):
    data = Photos(train=True, patches=10, transform=transforms.PILToTensor())
    clean = torch.from_numpy(data.data).permute(0, 3, 1, 2)
    config = RandomConfig(granularity=granularity, fraction=fraction)
    file = random_poison(data, 32, config, seed=1).save(tmp_path / "part.safetensors")
    changed = changed_of(inject(data, Poison.load(file)), clean)
    each = torch.bincount(torch.tensor(data.targets)[changed], minlength=12)
    assert each.tolist() == [round(10 * fraction)] * 12
    whole = random_poison(data, 32, RandomConfig(granularity=granularity), seed=1)
    assert torch.equal(changed_of(inject(data, whole, fraction), clean), changed)
    if fraction == 0.5:
        smaller = changed_of(inject(data, whole, 0.2), clean)
        assert bool((changed | ~smaller).all())  # a smaller part lies within a larger one
        assert 0 < smaller.sum() < changed.sum()


def test_images_without_a_label_stay_clean():
    data = Photos(train=True, patches=3)
    data.targets = [-1 if row % 3 == 0 else label for row, label in enumerate(data.targets)]
    data.transform = transforms.PILToTensor()
    poison = synthetic_poison(data, 32, SyntheticConfig(), seed=0)
    clean = torch.from_numpy(data.data).permute(0, 3, 1, 2)
    changed = changed_of(inject(data, poison), clean)
    assert torch.equal(changed, torch.tensor(data.targets) >= 0)


def test_an_old_file_poisons_every_image(data):
    poison = Poison(Perturbation.zeros(12, (3, 32, 32), EPS), "class", classes=tuple(data.classes))
    assert poison.fraction == 1
    assert poison.rows([1, 2], [data.classes[0], None]).tolist() == [0, -1]
