"""Methods of stable-pretraining in a trainer of their own: crafted with, and trained as victims."""

from __future__ import annotations

import logging
from typing import Any

import lightning
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms import v2
from torchvision.transforms.functional import to_tensor

from cp_plugin import CraftPoison, InjectPoison, Poison
from cp_plugin.config.settings import UserError
from cp_plugin.data import Photos
from cp_plugin.data.batch import Batch
from cp_plugin.hosts.gradients import momentum_gradients, preserve_state
from cp_plugin.hosts.modes import hold_still
from cp_plugin.hosts.stable_pretraining import SptHost
from cp_plugin.mirror import mirror
from tests.support.spt_modules import byol, conv, simclr
from tests.support.watched import Watched

spt = pytest.importorskip(
    "stable_pretraining", reason="stable-pretraining is not installed: pip install cp-plugin[spt]"
)
forward = pytest.importorskip("stable_pretraining.forward")
transforms = pytest.importorskip("stable_pretraining.data.transforms")

pytestmark = [
    pytest.mark.usefixtures("spt_folder"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`.*"),
    pytest.mark.filterwarnings("ignore:.*logging interval.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:You have overridden `on_after_batch_transfer`.*"),
]
CRAFT: dict[str, Any] = {
    **{"rounds": 2, "model_steps": 2, "noise_steps": 2, "pgd_steps": 1},
    **{"granularity": "sample", "dtype": "float32", "seed": 5},
}


def view() -> Any:
    return transforms.Compose(
        transforms.RGB(),
        transforms.RandomResizedCrop(32, scale=(0.2, 1.0)),
        transforms.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        transforms.RandomGrayscale(p=0.2),
        transforms.RandomHorizontalFlip(),
        transforms.PILGaussianBlur(p=0.5),
        transforms.ToImage(mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25]),
    )


def photos(named: bool = False) -> Any:
    views = {"first": view(), "second": view()} if named else [view(), view()]
    return spt.data.FromTorchDataset(
        Photos(train=True, patches=2),
        names=["image", "label"],
        transform=transforms.MultiViewTransform(views),
    )


def vicreg() -> Any:
    return spt.Module(
        forward=forward.vicreg,
        backbone=conv(),
        projector=nn.Linear(8, 8),
        vicreg_loss=spt.losses.VICRegLoss(),
        optim={"optimizer": {"type": "SGD", "lr": 0.01}},
    )


def barlow_twins() -> Any:
    return spt.Module(
        forward=forward.barlow_twins,
        backbone=conv(),
        projector=nn.Linear(8, 8),
        barlow_loss=spt.losses.BarlowTwinsLoss(lambd=5e-3),
        optim={"optimizer": {"type": "SGD", "lr": 0.01}},
    )


TRAINER: dict[str, Any] = {
    **{"accelerator": "cpu", "max_epochs": 2, "limit_train_batches": 3},
    **{"logger": False, "enable_checkpointing": False, "enable_progress_bar": False},
    **{"enable_model_summary": False, "num_sanity_val_steps": 0},
}


def fit(module: Any, data: Any, *callbacks: Any, **settings: Any) -> Any:
    trainer = lightning.Trainer(**TRAINER | settings, callbacks=list(callbacks))
    trainer.fit(module, DataLoader(data, batch_size=12, shuffle=True))
    return trainer


def probed(module: Any) -> tuple[Any, list[Any]]:
    """A module with what its users run beside: EMA, a queue and a linear probe on labels."""
    probe = spt.callbacks.OnlineProbe(
        module,
        name="probe",
        input="embedding",
        target="label",
        probe=nn.Linear(8, 12),
        loss=nn.CrossEntropyLoss(),
        optimizer={"type": "SGD", "lr": 0.1},
        metrics={"top1": MulticlassAccuracy(12)},
    )
    return module, [spt.callbacks.TeacherStudentCallback(), probe]


@pytest.mark.parametrize(
    ("method", "branch"),
    [
        *((method, "none") for method in (simclr, vicreg, barlow_twins)),
        (byol, "backbone.teacher, projector.teacher"),
    ],
)
def test_a_poison_is_crafted(method, branch, tmp_path, caplog):
    """Beside their own callbacks, whose state and the module's a noise phase leaves alone."""
    torch.manual_seed(0)
    data, craft = photos(), Watched(**CRAFT)
    module, beside = probed(method())
    with caplog.at_level(logging.INFO, logger="cp_plugin"):
        trainer = fit(module, data, craft, *beside)
    assert f"momentum branch of {method.__name__}: {branch}" in caplog.messages
    assert (craft.phases, trainer.global_step) == (2, 4)
    poison = Poison.load(tmp_path / "poison.safetensors")
    assert (poison.info["host"], poison.info["method"]) == ("stable-pretraining", method.__name__)
    assert len(poison.perturbation) == len(data)


class Records(lightning.Callback):
    """Keeps the first view of each image that is trained on, in 8 bit."""

    def __init__(self) -> None:
        self.seen: dict[int, Tensor] = {}

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, number: int) -> None:
        first = batch["views"][0]
        self.seen |= zip(first["sample_idx"].tolist(), (first["image"] * 255).round(), strict=True)


@pytest.mark.parametrize("granularity", ["sample", "class"])
def test_a_victim_is_trained_on_it(granularity, tmp_path):
    """From its own data set of a folder of images; no pixel is off by more than 8 levels."""
    folder = folder_of_photographs(tmp_path / "images")
    craft = CraftPoison(**CRAFT | {"granularity": granularity})
    module, beside = probed(simclr())
    fit(module, folder(transforms.MultiViewTransform([view(), view()])), craft, *beside)
    poison, records = Poison.load(tmp_path / "poison.safetensors"), Records()
    plain = transforms.Compose(transforms.RGB(), transforms.ToImage())
    data = folder(transforms.MultiViewTransform([plain, plain]))
    fit(byol(), data, InjectPoison(poison), records, limit_train_batches=1.0)
    assert len(records.seen) == len(data)
    changes = [
        (image - data[row]["views"][0]["image"] * 255).abs().max()
        for row, image in records.seen.items()
    ]
    assert 0 < max(changes) <= 8 + 1e-3
    assert sum(bool(change > 0.5) for change in changes) > len(changes) / 2


def folder_of_photographs(root: Any) -> Any:
    """Write photographs as class folders; return what makes their `HFDataset`."""
    embedded = Photos(train=True, patches=2)
    for number, (pixels, label) in enumerate(zip(embedded.data, embedded.targets, strict=True)):
        folder = root / "train" / f"class{label:02}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number}.png")

    def made(transform: Any) -> Any:
        found = {"data_dir": str(root), "split": "train", "cache_dir": str(root / "cache")}
        return spt.data.HFDataset("imagefolder", transform=transform, **found)

    return made


def test_named_views_and_a_manager(tmp_path):
    """As its own command runs a training: a `DataModule` and a `Manager`."""
    craft = CraftPoison(**CRAFT | {"dir": str(tmp_path)})
    train, val = (DataLoader(photos(named=True), batch_size=12) for _ in range(2))
    trainer = lightning.Trainer(**TRAINER, callbacks=[craft])
    manager = spt.Manager(trainer, named_views(), spt.data.DataModule(train=train, val=val), seed=0)
    manager()
    assert Poison.load(tmp_path / "poison.safetensors").info["method"] == "named"


def named_views() -> Any:
    def named(self: Any, batch: Any, stage: str) -> Any:
        if not self.training:
            return {}
        assert {"first", "second", "batch_idx"} == set(batch)
        first, second = (self.backbone(batch[name]["image"]) for name in ("first", "second"))
        return {"loss": -(first * second).mean()}

    return spt.Module(forward=named, backbone=conv(), optim={"optimizer": {"type": "SGD"}})


@pytest.mark.parametrize("method", [simclr, byol, vicreg, barlow_twins])
def test_the_gradient_is_that_of_finite_differences(method, double_precision):
    """Through both branches."""
    torch.manual_seed(0)
    module = method()
    images, direction = torch.rand(6, 3, 16, 16), torch.randn(6, 3, 16, 16)
    host = SptHost(module, lambda labels, views: sample_of(labels, views))
    batch = Batch(torch.arange(6), torch.arange(6) + 1, images, torch.arange(6) % 3)

    def views(delta: Tensor) -> list[Tensor]:
        return [images + delta, (images + delta).flip(-1) * 0.9]

    assert host.detect_momentum(views(torch.zeros(())), batch, batch.sample)
    for network in host.momentum_modules():
        for parameter in network.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)

    def loss(delta: Tensor, momentum: Any) -> Tensor:
        with momentum_gradients(module, momentum):
            found = host.loss(views(delta), batch)
        assert found is not None
        return found

    def gradient(momentum: Any) -> Tensor:
        delta = torch.zeros_like(images, requires_grad=True)
        with preserve_state(module):
            hold_still(module)
            return torch.autograd.grad(loss(delta, momentum), delta)[0]

    def value(step: float) -> float:
        with preserve_state(module), torch.no_grad():
            hold_still(module)
            return float(loss(step * direction, ()))

    branch = host.momentum_modules()
    found = gradient(branch)
    true = (value(1e-5) - value(-1e-5)) / 2e-5
    assert abs(float((found * direction).sum()) - true) <= 1e-5 * abs(true) + 1e-9
    if branch:
        stock = gradient(())
        assert (found - stock).norm() > 0.01 * stock.norm()


def sample_of(labels: Tensor, views: Any) -> dict[str, Any]:
    return {"views": [{"image": view, "label": labels} for view in views]}


STEPS = {
    "RandomResizedCrop": lambda: transforms.RandomResizedCrop(16, (1.0, 1.0), (1.0, 1.0)),
    "Resize": lambda: transforms.Resize(16),
    "CenterCrop": lambda: transforms.CenterCrop(16),
    "RandomHorizontalFlip": lambda: transforms.RandomHorizontalFlip(p=1.0),
    "RandomVerticalFlip": lambda: transforms.RandomVerticalFlip(p=1.0),
    "RandomGrayscale": lambda: transforms.RandomGrayscale(p=1.0),
    "RandomSolarize": lambda: transforms.RandomSolarize(128, p=1.0),
    "never ColorJitter": lambda: transforms.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.0),
    "PILGaussianBlur": lambda: transforms.PILGaussianBlur(sigma=[1.0, 1.0]),
    "GaussianBlur": lambda: transforms.GaussianBlur(3, (1.0, 1.0)),
}


@pytest.mark.parametrize("name", STEPS)
def test_the_mirror_makes_the_pixels_of_each_transform(name):
    image = Image.fromarray(Photos(train=True, patches=1).data[0])
    end = transforms.ToImage(mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.2])
    steps = [transforms.RGB(), STEPS[name](), end]
    if name == "GaussianBlur":  # torchvision's is of tensors
        steps = [transforms.ToImage(), STEPS[name]()]
    expected = transforms.Compose(*steps)({"image": image})["image"]
    pixels = to_tensor(image)[None]
    (made,) = mirror(transforms.Compose(*steps))(pixels)
    # A level of 8 bit, as the normalisation has it.
    torch.testing.assert_close(made[0], torch.Tensor(expected), atol=1.1 / 255 / 0.2, rtol=0)
    if not name.startswith("never") and "Crop" not in name and name != "Resize":
        assert not torch.equal(made, mirror(transforms.Compose(transforms.ToImage()))(pixels)[0])


def test_the_mirror_draws_as_for_torchvisions_own():
    pixels, ranges = torch.rand(8, 3, 32, 32), (0.4, 0.4, 0.4, 0.1)
    own = v2.RandomApply([v2.ColorJitter(*ranges)], 0.8)
    theirs = transforms.Compose(transforms.ColorJitter(*ranges, p=0.8), transforms.ToImage())
    stock = v2.Compose([own, v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    (made,), (expected,) = (
        mirror(one)(pixels, torch.Generator().manual_seed(3)) for one in (theirs, stock)
    )
    assert torch.equal(made, expected)
    assert not torch.equal(made, pixels)


def test_other_parts_of_a_sample_are_refused():
    with pytest.raises(UserError, match=r"RandomGrayscale expected source and target 'image'"):
        mirror(transforms.Compose(transforms.RandomGrayscale(source="depth")))
