"""Contrastive poisoning called as the Adversarial Robustness Toolbox calls its own attacks."""

import numpy as np
import pytest
import torch

from cp_plugin import InjectPoison, Poison
from cp_plugin.config.settings import UserError
from cp_plugin.data import Photos

attacks = pytest.importorskip("art.attacks.attack", reason="the extra `art` is not installed")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
SMALL = (
    *("max_epochs=4", "optimizer.batch_size=12", "data.num_workers=0", "poison.rounds=2"),
    *("poison.model_steps=4", "poison.noise_steps=2", "backbone.kwargs.channels=[8,8,8,8]"),
    *("method_kwargs.proj_hidden_dim=16", "method_kwargs.proj_output_dim=8"),
)


@pytest.fixture(scope="module")
def attack_class():
    from cp_plugin.apps.toolbox import ContrastivePoisoning

    return ContrastivePoisoning


@pytest.fixture(scope="module")
def photos():
    """Images in bytes, (N, H, W, 3), and their labels."""
    data = Photos(train=True, patches=4)
    return data.data, np.array(data.targets)


def in_levels(images):
    return np.rint(255 * images).astype(int)


@pytest.mark.parametrize("group", ["cp", "cp_class"])
def test_arrays_come_back_within_the_budget_with_the_labels(attack_class, photos, group):
    x, y = (photos[0] / 255).astype(np.float32).transpose(0, 3, 1, 2), photos[1]
    attack = attack_class(group, overrides=SMALL)
    assert isinstance(attack, attacks.PoisoningAttackBlackBox)
    assert group in repr(attack)
    found, labels = attack.poison(x, y)
    assert labels is y
    assert (found.dtype, found.shape) == (x.dtype, x.shape)
    changes = np.abs(in_levels(found) - in_levels(x)).reshape(len(x), -1).max(1)
    assert changes.max() == 8
    assert (changes > 0).mean() > 0.9
    if group == "cp_class":  # all images of a class carry the same
        for label in np.unique(y):
            inside = (x[y == label] > 8.5 / 255) & (x[y == label] < 246.5 / 255)
            own = np.where(inside, in_levels(found[y == label]) - in_levels(x[y == label]), 99)
            assert all(len(set(pixel) - {99}) <= 1 for pixel in own.reshape(len(own), -1).T)


def test_bytes_and_channels_last_give_the_same_and_the_poison_can_be_kept(
    attack_class, photos, tmp_path
):
    x, y = photos[0], np.eye(12)[photos[1]]
    attack = attack_class(overrides=SMALL, clip_values=(0, 255), channels_first=False)
    found, _ = attack.poison(x, y)
    first = attack_class(overrides=SMALL).poison((x / 255).transpose(0, 3, 1, 2), photos[1])[0]
    assert np.array_equal(found, in_levels(first).transpose(0, 2, 3, 1))
    kept = Poison.load(attack.crafted.save(tmp_path / "poison.safetensors"))
    keys = kept.rows(attack.crafted.keys.tolist())
    assert torch.equal(keys, torch.arange(len(keys)))
    InjectPoison(kept)


def test_labels_are_needed_for_classes_alone(attack_class, photos):
    x = (photos[0] / 255).transpose(0, 3, 1, 2)
    found, labels = attack_class(overrides=SMALL).poison(x)
    assert labels is None
    assert np.abs(in_levels(found) - in_levels(x)).max() == 8
    with pytest.raises(UserError, match="label"):
        attack_class("cp_class", overrides=SMALL).poison(x)


def test_mistakes(attack_class, photos):
    x = photos[0] / 255
    attack = attack_class(overrides=SMALL)
    with pytest.raises(ValueError, match="channels_first"):
        attack.poison(x)
    with pytest.raises(ValueError, match="clip_values"):
        attack.poison(x.transpose(0, 3, 1, 2) * 2)
    with pytest.raises(ValueError, match="labels of shape"):
        attack.poison(x.transpose(0, 3, 1, 2), photos[1][:5])
    with pytest.raises(ValueError, match="clip_values"):
        attack.set_params(clip_values=(1, 0))
    with pytest.raises(UserError, match="nothing"):
        attack_class("nothing", overrides=SMALL).poison(x.transpose(0, 3, 1, 2))
