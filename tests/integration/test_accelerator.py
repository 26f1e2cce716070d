"""What can be said of accelerators without one, on the device `meta`: it has shapes but no values.

Whoever asks it for a value, as `.item()`, a boolean index or `torch.unique` do, makes the processor
wait for the accelerator; on `meta` it is an error.
"""

from contextlib import nullcontext

import pytest
import torch

from cp_plugin.apps.hydra_app import compose
from cp_plugin.attack.loop import Attack
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.attack.rows import Rows
from cp_plugin.config.settings import CraftConfig
from cp_plugin.data import Photos, RawDataset
from cp_plugin.data.loading import moved
from cp_plugin.engine.methods import build_method
from cp_plugin.engine.pipeline import build_pipeline
from cp_plugin.engine.settings import complete
from cp_plugin.hosts.lightning import LightningHost
from cp_plugin.mirror import mirror

META = torch.device("meta")


# Lightly's SimCLR loss and MoCo queue themselves ask for values.
@pytest.mark.parametrize("augmentations", ["cifar_paper", "symmetric", "asymmetric"])
@pytest.mark.parametrize("granularity", ["sample", "class"])
def test_a_noise_step_waits_for_no_value(augmentations, granularity, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # unknown to `meta`
    narrow = "backbone.kwargs.channels=[8,8,8,8]"
    cfg = complete(compose("byol", [narrow, f"augmentations={augmentations}"]))
    size = cfg.augmentations[0].crop_size
    photos = Photos(train=True, patches=1)
    photos.transform = build_pipeline(cfg)
    raw = RawDataset(photos, size)
    twin = mirror(photos.transform).to(META)
    twin._seen_devices.add(META)  # the first batch on a device is looked at
    everything = torch.ones(len(photos), dtype=torch.bool)
    rows = Rows.of_samples(everything)
    if granularity == "class":
        rows = Rows.of_classes(torch.tensor(photos.targets), everything)
    perturbation = Perturbation.zeros(len(photos), (3, size, size), 8 / 255)
    perturbation.move(META)
    host = LightningHost(build_method(cfg, size).to(META), raw.with_views)
    config = CraftConfig(granularity=granularity, pgd_steps=2)
    attack = Attack(host, twin, perturbation, rows, config, seed=0)
    attack._checked = True  # so is the first gradient
    batch = moved(raw.collate([raw[row] for row in range(8)]), META)
    losses = list(attack.noise_phase([batch, batch], 0))
    assert [loss.device.type for loss in losses] == ["meta", "meta"]
    assert perturbation.stored.device.type == "meta"
