"""`gpu_transform`: stable-pretraining's augmentation of whole batches on the module's device."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cp_plugin import CraftPoison, InjectPoison, KNNMonitor, Poison
from cp_plugin.callbacks import Defence, MirrorViews
from cp_plugin.config.settings import UserError
from cp_plugin.data import Photos
from tests.support.spt_modules import byol, simclr

spt = pytest.importorskip(
    "stable_pretraining", reason="stable-pretraining is not installed: pip install cp-plugin[spt]"
)
transforms = pytest.importorskip("stable_pretraining.data.transforms")
gpu = pytest.importorskip("stable_pretraining.data.gpu_transforms")
datasets = pytest.importorskip("stable_pretraining.data.datasets")

# Lightning and stable-pretraining warn of their own uses of what is deprecated.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("spt_folder")]

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.2]
CRAFT: dict[str, Any] = {
    **{"rounds": 2, "model_steps": 2, "noise_steps": 2, "pgd_steps": 3},
    **{"granularity": "sample", "dtype": "float32", "seed": 5},
}
TRAINER: dict[str, Any] = {
    **{"accelerator": "cpu", "max_epochs": 2, "limit_train_batches": 3},
    **{"logger": False, "enable_checkpointing": False, "enable_progress_bar": False},
    **{"enable_model_summary": False, "num_sanity_val_steps": 0},
}


class Seen(nn.Module):
    """A `gpu_transform` that keeps what it was given."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.images: list[Tensor] = []

    def forward(self, batch: Any) -> Any:
        self.images.append(batch["image"])
        return self.inner(batch)


def normalised(*steps: Any) -> Any:
    return gpu.GPUCompose([*steps, gpu.GPUNormalize(MEAN, STD)])


def augmented() -> Any:
    return normalised(
        gpu.ToDevice("cpu"),
        gpu.GPURandomResizedCrop((24, 24), scale=(0.2, 1.0)),
        gpu.GPUColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        gpu.GPURandomGrayscale(p=0.2),
        gpu.GPURandomHorizontalFlip(),
        gpu.GPUGaussianBlur((3, 3), (0.1, 2.0), p=0.5),
        gpu.GPURandomSolarize(p=0.2),
    )


def photos(of_batches: Any, transform: Any = None) -> Any:
    return spt.data.FromTorchDataset(
        Photos(train=True, patches=2),
        names=["image", "label"],
        transform=transform or transforms.Compose(transforms.RGB(), transforms.ToImage()),
        gpu_transform=of_batches,
    )


def built(make: Callable[[], Any]) -> Any:
    """A module with the same weights each time."""
    torch.manual_seed(0)
    return make()


def fit(module: Any, data: Any, *callbacks: Any, **settings: Any) -> Any:
    trainer = lightning.Trainer(**TRAINER | settings, callbacks=list(callbacks))
    loader = DataLoader(data, batch_size=12) if isinstance(data, torch.utils.data.Dataset) else data
    trainer.fit(module, loader)
    return trainer


@pytest.mark.parametrize("method", [simclr, byol])
def test_the_poison_is_that_of_the_same_augmentation_in_the_data_set(method, tmp_path):
    """Gradients pass the host's own batch transform as they pass the mirror of the same one."""
    flip = normalised(gpu.GPURandomHorizontalFlip(p=1.0))
    by_batch = photos(gpu.MultiView([flip, normalised()]))
    end = transforms.ToImage(mean=MEAN, std=STD)
    views = [
        transforms.Compose(transforms.RGB(), transforms.RandomHorizontalFlip(p=1.0), end),
        transforms.Compose(transforms.RGB(), end),
    ]
    by_image = photos(None, transforms.MultiViewTransform(views))
    made = []
    for name, data in (("batch", by_batch), ("image", by_image)):
        craft = CraftPoison(**CRAFT, dir=str(tmp_path / name))
        fit(built(method), data, craft)
        poison = craft.poison()
        made.append(poison.perturbation.gather(torch.arange(len(poison.perturbation))))
    assert made[0].shape == made[1].shape
    assert (made[0] != 0).float().mean() > 0.9
    assert torch.isclose(made[0], made[1], atol=1e-6).float().mean() > 0.99  # signs of tiny slopes


def test_every_noise_step_draws_anew_and_a_seed_tells_what(tmp_path):
    first, second = [], []
    for name, kept in (("first", first), ("second", second)):
        lightning.seed_everything(3)
        augmentation, views = gpu.StackedMultiView(augmented(), 2), []
        augmentation.register_forward_hook(
            lambda _, given, out, views=views: views.append(out["views"][0]["image"].detach())
        )
        craft = CraftPoison(**CRAFT, dir=str(tmp_path / name))
        fit(built(simclr), photos(augmentation), craft)
        kept.append(craft.poison().perturbation.stored)
        kept.append(views[-CRAFT["pgd_steps"] :])
    assert torch.equal(first[0], second[0])
    assert all(not torch.equal(first[1][0], view) for view in first[1][1:])


def test_a_victim_trains_on_poisoned_pixels_by_rows_and_by_stream(tmp_path):
    craft = CraftPoison(**CRAFT, dir=str(tmp_path / "craft"))
    fit(
        built(simclr), photos(gpu.StackedMultiView(augmented(), 2)), craft, limit_train_batches=None
    )
    poison = Poison.load(tmp_path / "craft" / "poison.safetensors")
    clean, seen = (Seen(gpu.StackedMultiView(augmented(), 2)) for _ in range(2))
    fit(built(simclr), photos(clean), max_epochs=1)
    fit(built(simclr), photos(seen), InjectPoison(poison), max_epochs=1)
    change = seen.images[0] - clean.images[0]
    assert 0 < float(change.abs().max()) <= poison.eps + 1e-6
    streamed = Seen(gpu.StackedMultiView(augmented(), 2))

    class Stream(datasets.IterableDataset):
        def __iter__(self):
            for image, label in Photos(train=True, patches=2):
                yield self.process_sample({"image": image, "label": label})

    plain = transforms.Compose(transforms.RGB(), transforms.ToImage())
    stream = Stream(transform=plain, gpu_transform=streamed)
    fit(built(simclr), DataLoader(stream, batch_size=12), InjectPoison(poison), max_epochs=1)
    torch.testing.assert_close(streamed.images[0], seen.images[0])
    mirrored = Seen(gpu.StackedMultiView(augmented(), 2))
    fit(built(simclr), photos(mirrored), InjectPoison(poison), MirrorViews(), max_epochs=1)
    torch.testing.assert_close(mirrored.images[0], seen.images[0])


def test_the_monitor_shows_images_as_the_batch_transform_does():
    shown: dict[str, list[Tensor]] = {}
    plain = [transforms.RGB(), transforms.CenterCrop(24), transforms.ToImage(mean=MEAN, std=STD)]
    cases = {
        "batch": photos(gpu.StackedMultiView(augmented(), 2)),
        "image": photos(None, transforms.MultiViewTransform([transforms.Compose(*plain)] * 2)),
    }
    query = Photos(train=False, patches=2)
    for name, data in cases.items():
        module, inputs = built(simclr), shown.setdefault(name, [])
        module.backbone.register_forward_pre_hook(
            lambda net, given, inputs=inputs: None if net.training else inputs.append(given[0])
        )
        fit(module, data, KNNMonitor(query=query, every_n_epochs=1), max_epochs=1)
    assert shown["batch"]
    assert [view.shape for view in shown["batch"]] == [view.shape for view in shown["image"]]
    for ours, theirs in zip(shown["batch"], shown["image"], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_defence_knows_black_and_white_of_the_batch_transform():
    module, views = built(simclr), []
    module.backbone.register_forward_pre_hook(lambda net, given: views.append(given[0].detach()))
    data = photos(gpu.StackedMultiView(normalised(), 2))
    fit(module, data, Defence("noise", std=0.5), max_epochs=1)
    black, white = (
        (torch.full((3,), value) - torch.tensor(MEAN)) / torch.tensor(STD) for value in (0.0, 1.0)
    )
    lows, highs = (getattr(torch.cat(views), end)((0, 2, 3)) for end in ("amin", "amax"))
    torch.testing.assert_close(lows, black)
    torch.testing.assert_close(highs, white)


def test_a_batch_transform_without_a_gradient_is_refused(tmp_path):
    class Cut(gpu.StackedMultiView):
        @torch.no_grad()
        def forward(self, batch):
            return super().forward(batch)

    with pytest.raises(UserError, match="or its hooks for batches"):
        fit(
            built(simclr),
            photos(Cut(normalised(), 2)),
            CraftPoison(**CRAFT, dir=str(tmp_path / "o")),
        )


def test_what_no_gradient_passes_is_named(tmp_path, caplog):
    chain = normalised(gpu.GPURandAugment())
    with caplog.at_level(logging.WARNING, "cp_plugin"):
        data = photos(gpu.StackedMultiView(chain, 2))
        fit(built(simclr), data, CraftPoison(**CRAFT, dir=str(tmp_path / "o")))
    assert "gpu_transform has RandAugment" in caplog.text


def test_a_monitor_names_the_batch_transform_that_it_cannot_read():
    class Own(nn.Module):
        def forward(self, batch):
            return batch

    with pytest.raises(UserError, match=r"cannot be told from the transform.*Own"):
        fit(built(simclr), photos(Own()), KNNMonitor(query=Photos(train=False, patches=2)))
