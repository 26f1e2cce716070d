"""Views that a transform or a data set returns by name: crafted on, poisoned, put back."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms

from cp_plugin import CraftPoison, InjectPoison, Poison
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.callbacks import MirrorViews
from cp_plugin.config.settings import UserError
from cp_plugin.data.slots import elements
from tests.support.small_runs import CROPS, Pictures, Small, fit

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.*"),
]
EPS = 8 / 255
COPY = transforms.ToTensor()


class Pair(NamedTuple):
    query: Any
    key: Any


class ByName:
    """A user's own class, which returns views by name."""

    def __init__(self, step: Any) -> None:
        self.step = step

    def __call__(self, image: Any) -> Any:
        return {"view1": self.step(image), "view2": self.step(image)}


class Nested(ByName):
    def __call__(self, image: Any) -> Any:
        return {"global": [self.step(image)], "local": (self.step(image),)}


class Named(ByName):
    def __call__(self, image: Any) -> Any:
        return Pair(self.step(image), self.step(image))


class WithImage(ByName):
    def __call__(self, image: Any) -> Any:
        return {"view1": self.step(image), "view2": self.step(image), "whole": image}


class Whole(Pictures):
    """Returns what the transform returns."""

    def __getitem__(self, row: int) -> Any:
        views = self.transform(Image.fromarray(self.images[row]))
        return {"views": views, "target": self.targets[row]}


class Spread(Pictures):
    """Returns the views beside other entries."""

    def __getitem__(self, row: int) -> Any:
        views = self.transform(Image.fromarray(self.images[row]))
        assert isinstance(views, dict)
        return {**views, "target": self.targets[row]}


class Taken(Pictures):
    """Takes the views out by name, the second one first."""

    def __getitem__(self, row: int) -> Any:
        views = self.transform(Image.fromarray(self.images[row]))
        return views["view2"], views["view1"], self.targets[row]


class Twice(Pictures):
    """Calls a transform of one view twice."""

    def __getitem__(self, row: int) -> Any:
        image = Image.fromarray(self.images[row])
        first, second = self.transform(image), self.transform(image)
        return {"view1": first, "view2": second, "target": self.targets[row]}


class Half(Pictures):
    """Leaves a view out."""

    def __getitem__(self, row: int) -> Any:
        return self.transform(Image.fromarray(self.images[row]))["view1"], self.targets[row]


FORMS: dict[str, tuple[type[Pictures], Any]] = {
    "whole": (Whole, ByName),
    "nested": (Whole, Nested),
    "named tuple": (Whole, Named),
    "spread": (Spread, ByName),
    "taken": (Taken, ByName),
    "twice": (Twice, lambda step: step),
}


class Reading(Small):
    """Takes the views wherever they stand in the batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.training:
            self.batches.append(batch)
        x0, x1 = (
            value for value in elements(batch) if isinstance(value, Tensor) and value.ndim == 4
        )
        z0, z1 = self.head(self.backbone(x0)), self.head(self.backbone(x1))
        return self.criterion(z0, z1) + (z0 - z1).square().mean()


def shape_of(batch: Any) -> Any:
    """Return a batch's form: the names and types of its containers, and the shapes in it."""
    if isinstance(batch, dict):
        return {name: shape_of(value) for name, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch).__name__, [shape_of(value) for value in batch]
    return tuple(batch.shape), batch.dtype


@pytest.mark.parametrize("form", FORMS)
def test_views_by_name_are_crafted_on(form: str, tmp_path: Path) -> None:
    dataset, transform = FORMS[form]
    loader = DataLoader(dataset(transform(CROPS)), 8)
    stock, module = Reading(), Reading()
    fit(stock, loader, tmp_path)
    settings = {"rounds": 1, "model_steps": 1, "noise_steps": 2, "pgd_steps": 1, "init": "zero"}
    fit(module, loader, tmp_path, CraftPoison(dir=str(tmp_path), seed=1, **settings))
    assert shape_of(module.batches[0]) == shape_of(stock.batches[0])
    made = Poison.load(tmp_path / "poison.safetensors")
    assert made.perturbation.stored.float().abs().max() > 0


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_victims_with_views_by_name_carry_delta_in_every_view(
    form: str, mirrored: bool, tmp_path: Path
) -> None:
    dataset, transform = FORMS[form]
    data = dataset(transform(COPY))
    delta = torch.full((2, 3, 16, 16), EPS)
    poison = Poison(Perturbation(delta, EPS), "class", None, Pictures.classes)
    module = Reading()
    callbacks = [InjectPoison(poison), *([MirrorViews()] if mirrored else [])]
    fit(module, DataLoader(data, 8), tmp_path, *callbacks)
    views = [v for v in elements(module.batches[0]) if isinstance(v, Tensor) and v.ndim == 4]
    assert len(views) == 2
    for view in views:
        change = (view - data.clean()[:8]).clamp(min=0)
        assert change.max() == pytest.approx(EPS, abs=1e-6)


def test_a_view_that_is_left_out_is_refused(tmp_path: Path) -> None:
    loader = DataLoader(Half(ByName(CROPS)), 8)
    says = "Half returns 1 of an image.s views and its transform makes 2"
    with pytest.raises(UserError, match=says):
        fit(Reading(), loader, tmp_path, CraftPoison(dir=str(tmp_path)))


def test_a_dictionary_with_anything_else_in_it_is_refused_by_name(tmp_path: Path) -> None:
    loader = DataLoader(Whole(WithImage(CROPS)), 8)
    with pytest.raises(UserError, match="WithImage"):
        fit(Reading(), loader, tmp_path, CraftPoison(dir=str(tmp_path)))
