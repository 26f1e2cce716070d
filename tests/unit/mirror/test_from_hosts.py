"""Reading the hosts' own pipelines, and refusing what is not known."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightly.transforms as lightly
import numpy as np
import pytest
import torch
from lightly.transforms.multi_view_transform import MultiViewTransform
from omegaconf import OmegaConf
from PIL import Image
from scipy.stats import ks_2samp
from torch import Tensor
from torchvision import transforms as v1
from torchvision.transforms import InterpolationMode as Mode
from torchvision.transforms import v2

from cp_plugin.config.settings import UserError
from cp_plugin.engine.pipeline import build_pipeline
from cp_plugin.mirror import Operation, Params, mirror, register_op
from cp_plugin.mirror.registry import OPS

SOLO = Path(os.environ.get("SOLO_LEARN_ROOT", Path.home() / "solo-learn"))
NODES = {
    "cifar/augmentations/symmetric.yaml": [32, 32],
    "cifar/augmentations/asymmetric.yaml": [32, 32],
    "cifar-multicrop/augmentations/swav.yaml": [32, 32, 18, 18, 18, 18, 18, 18],
    "imagenet-100/augmentations/symmetric.yaml": [224, 224],
}
MULTI_CROP = [48, 48, 24, 24, 24, 24, 24, 24]
LIGHTLY = {
    "SimCLR": (lightly.SimCLRTransform(input_size=48, rr_prob=0.3, vf_prob=0.2), [48, 48]),
    "MoCoV1": (lightly.MoCoV1Transform(input_size=48), [48, 48]),
    "MoCoV2": (lightly.MoCoV2Transform(input_size=48, rr_prob=0.5, rr_degrees=30), [48, 48]),
    "BYOL": (lightly.BYOLTransform(), [224, 224]),
    "SimSiam": (lightly.SimSiamTransform(input_size=48), [48, 48]),
    "DINO": (lightly.DINOTransform(global_crop_size=48, local_crop_size=24), MULTI_CROP),
    "SwaV": (lightly.SwaVTransform(crop_sizes=(48, 24)), MULTI_CROP),
    "VICReg": (lightly.VICRegTransform(input_size=48), [48, 48]),
    "MMCR": (lightly.MMCRTransform(k=3), [224] * 3),
    "MultiView": (MultiViewTransform([v1.RandomCrop(20), v2.CenterCrop(30)]), [20, 30]),
}  # fmt: skip


def pictures(count: int = 2, size: int = 56) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 7, 7, generator=generator)
    return torch.nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 1)


def picture() -> Image.Image:
    return v1.functional.to_pil_image(pictures(1)[0])


@pytest.mark.parametrize("name", LIGHTLY)
def test_lightly(name: str) -> None:
    pipeline, sizes = LIGHTLY[name]
    twin = mirror(pipeline)
    views = twin(pictures())
    assert [view.shape[-1] for view in views] == sizes
    assert twin.views == len(sizes)
    assert twin.crop_size == max(sizes)
    theirs = pipeline(picture())
    assert [view.size[-1] if isinstance(view, Image.Image) else view.shape[-1]
            for view in theirs] == sizes  # fmt: skip


@pytest.fixture
def solo(monkeypatch: pytest.MonkeyPatch) -> Any:
    if not SOLO.is_dir():
        pytest.skip(f"no checkout of solo-learn at {SOLO}")
    monkeypatch.syspath_prepend(str(SOLO))
    return pytest.importorskip("solo.data.pretrain_dataloader")


@pytest.mark.parametrize("name", NODES)
def test_solo_learn(solo: Any, name: str) -> None:
    nodes = OmegaConf.load(SOLO / "scripts/pretrain" / name)
    singles = [solo.build_transform_pipeline("cifar10", node) for node in nodes]
    counts = [node.num_crops for node in nodes]
    pipeline = solo.prepare_n_crop_transform(singles, counts)
    images = pictures(2, 40)
    own = OmegaConf.create({"data": {"dataset": "cifar10"}, "augmentations": nodes})
    of_objects, of_nodes = mirror(pipeline), mirror(build_pipeline(own))
    assert [view.shape[-1] for view in of_objects(images)] == NODES[name]
    mine = of_objects(images, torch.Generator().manual_seed(3))
    same = of_nodes(images, torch.Generator().manual_seed(3))
    for view, other in zip(mine, same, strict=True):
        torch.testing.assert_close(view, other)


def test_solo_learns_equalisation_and_resize(solo: Any) -> None:
    pipeline = v1.Compose([v1.Resize(32, Mode.BICUBIC), solo.Equalization(), v1.ToTensor()])
    image = picture()
    given = v1.functional.to_tensor(image)[None]
    # Levels that the resize rounds differently move to a neighbouring entry of the table.
    difference = (mirror(pipeline)(given)[0][0] - pipeline(image)).abs()
    assert difference.mean() < 1.5 / 255


def test_views_look_like_the_hosts() -> None:
    """Over many draws the host's views and the mirror's have the same means and deviations."""
    pipeline = lightly.SimCLRTransform(input_size=16, normalize=None).transforms[0]
    image = picture()
    torch.manual_seed(0)
    np.random.seed(0)
    theirs = torch.stack([pipeline(image) for _ in range(600)])
    given = v1.functional.to_tensor(image).expand(600, -1, -1, -1)
    (mine,) = mirror(pipeline)(given, torch.Generator().manual_seed(0))
    for measure in (lambda x: x.mean((1, 2, 3)), lambda x: x.std((1, 2, 3)),
                    lambda x: (x[:, 0] - x[:, 2]).mean((1, 2))):  # fmt: skip
        assert ks_2samp(measure(mine).numpy(), measure(theirs).numpy()).pvalue > 1e-3


def test_compose_is_one_view_and_lists_are_many() -> None:
    compose = v2.Compose([v2.ToImage(), v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, True)])
    assert mirror(compose).views == 1
    assert mirror(compose).crop_size is None
    assert mirror([compose, compose]).views == 2


def test_normalize_is_the_pipelines_last() -> None:
    twin = mirror(v1.Compose([v1.ToTensor(), v1.Normalize((0.5,) * 3, (0.25,) * 3)]))
    images = pictures()
    torch.testing.assert_close(twin.normalize(images), (images - 0.5) / 0.25)
    assert mirror(v1.ToTensor()).normalize(images) is images


class Darker:
    """A transform of a user's own."""

    factor = 0.5

    def __call__(self, image: Any) -> Any:
        return image.point(lambda level: level * self.factor)


class Scale(Operation):
    def __init__(self, factor: float) -> None:
        super().__init__("Darker")
        self.factor = factor

    def apply(self, images: Tensor, params: Params) -> Tensor:
        return images * self.factor


class MyFlip(v1.RandomHorizontalFlip):
    """A subclass may do anything."""


def test_unknown_class_and_its_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cp_plugin.mirror.registry.OPS", dict(OPS))
    with pytest.raises(UserError, match=r"Darker: register one with .*register_op\(Darker"):
        mirror(v1.Compose([Darker(), v1.ToTensor()]))
    register_op(Darker, lambda host: Scale(host.factor))
    images = pictures()
    torch.testing.assert_close(mirror(v1.Compose([Darker()]))(images)[0], images * 0.5)
    register_op(Darker, lambda host: "no operation")  # type: ignore[arg-type,return-value]
    with pytest.raises(UserError, match="must return an Operation, got str"):
        mirror(Darker())
    with pytest.raises(UserError, match="expected a class first"):
        register_op(Darker(), lambda host: Scale(1))  # type: ignore[arg-type]


class OwnMultiView(MultiViewTransform):
    """Inherits the call, so it means the same."""


class OtherMultiView(MultiViewTransform):
    """Does something else with what the pipelines make."""

    def __call__(self, image: Any) -> Any:
        return [view * 0.5 for view in super().__call__(image)]


class Reversed(MultiViewTransform):
    """Returns the views in another order."""

    def __call__(self, image: Any) -> Any:
        return super().__call__(image)[::-1]


def test_subclasses() -> None:
    with pytest.raises(UserError, match=r"MyFlip: register"):
        mirror(v1.Compose([MyFlip()]))
    assert mirror(OwnMultiView([v1.ToTensor()])).views == 1
    with pytest.raises(UserError, match="OtherMultiView"):
        mirror(OtherMultiView([v1.ToTensor()]))
    turned = mirror(Reversed([v1.CenterCrop(24), v1.CenterCrop(16)]))
    assert [tuple(view.shape[2:]) for view in turned(torch.rand(1, 3, 32, 32))] == [
        (16, 16),
        (24, 24),
    ]


@pytest.mark.parametrize(
    ("pipeline", "text"),
    [
        (v1.Lambda(lambda image: image), "Lambda hides a function"),
        (v2.Lambda(lambda image: image), "Lambda hides a function"),
        (v1.RandomRotation(10, expand=True), "expand=False"),
        (v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32)]), "scale=True"),
        (v1.RandomApply([v1.ToTensor()]), "move the conversion"),
        (v1.Compose([v1.ToTensor(), v1.Resize(8, antialias=False)]), "antialias=True"),
        ([], "at least one view"),
        ([{"crop_size": 32}], "builtins.dict"),  # nodes are the engine's: build_pipeline
        ("simclr", "builtins.str"),
    ],
)
def test_refused_pipelines(pipeline: object, text: str) -> None:
    with pytest.raises(UserError, match=text):
        mirror(pipeline)


@pytest.mark.filterwarnings("ignore")  # of what the package imports
def test_albumentations_are_refused_with_what_to_write_instead() -> None:
    A = pytest.importorskip("albumentations")
    with pytest.raises(UserError, match=r"HorizontalFlip is of albumentations.*with RandomHorizon"):
        mirror(A.HorizontalFlip())
    with pytest.raises(UserError, match=r"with Compose of torchvision.*register_op"):
        mirror(v1.Compose([A.Compose([A.RandomCrop(8, 8)])]))


@pytest.mark.parametrize(
    ("name", "other"), [("ToGray", "RandomGrayscale"), ("CLAHE", "transforms")]
)
def test_classes_of_albumentations_are_known_by_their_names(name: str, other: str) -> None:
    module = "albumentations.augmentations.pixel.transforms"
    host = type(name, (), {"__module__": module})()
    with pytest.raises(
        UserError, match=rf"{name} is of albumentations.*with {other} of torchvision"
    ):
        mirror(host)
