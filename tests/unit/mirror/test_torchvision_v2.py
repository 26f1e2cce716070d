"""Transforms of torchvision's v2 that are its own, and which of v2 have no counterpart."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from scipy.stats import ks_2samp
from torch import Tensor
from torchvision import transforms as v1
from torchvision import tv_tensors
from torchvision.transforms import functional as F
from torchvision.transforms import v2

from cp_plugin.config.settings import UserError
from cp_plugin.data.pipelines import dotted_name
from cp_plugin.mirror import mirror
from cp_plugin.mirror.registry import RULES
from tests.bench import pillow as oracle

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
TO_FLOAT = v2.ToDtype(torch.float32, scale=True)
SERVED = {
    "noise of bytes": [v2.ToImage(), v2.GaussianNoise(0.1, 0.2), TO_FLOAT],
    "noise of floats": [v2.ToImage(), TO_FLOAT, v2.GaussianNoise(0.0, 0.2)],
    "noise that is not clipped": [v2.ToImage(), TO_FLOAT, v2.GaussianNoise(0.1, 0.3, clip=False)],
    "channels": [v2.ToImage(), v2.RandomChannelPermutation(), TO_FLOAT],
    "photometric": [v2.RandomPhotometricDistort(), v2.ToImage(), TO_FLOAT],
    "photometric of tensors": [v2.ToImage(), v2.RandomPhotometricDistort(p=0.8), TO_FLOAT],
    "JPEG": [v2.JPEG((5, 60)), v2.ToImage(), TO_FLOAT],
    "JPEG of tensors": [v2.ToImage(), v2.JPEG((5, 60)), TO_FLOAT],
}
WITHOUT = {
    "FiveCrop": "five images of one", "TenCrop": "ten images of one",
    "Lambda": "any function", "LinearTransformation": "whitening, which changes the range",
    "ElasticTransform": "a displacement for every pixel",
    "RandomIoUCrop": "boxes", "RandomResize": "a size of its own for each image",
    "RandomShortestSize": "a size of its own for each image",
    "RandomZoomOut": "a size of its own for each image",
    "ScaleJitter": "a size of its own for each image",
    "CutMix": "batches", "MixUp": "batches", "UniformTemporalSubsample": "videos",
    "ClampBoundingBoxes": "boxes", "ClampKeyPoints": "points",
    "ConvertBoundingBoxFormat": "boxes", "SanitizeBoundingBoxes": "boxes",
    "SanitizeKeyPoints": "points", "SetClampingMode": "boxes", "Transform": "the base class",
}  # fmt: skip
"""Classes of v2 that the mirror refuses by their names, and why."""


@pytest.mark.parametrize("name", SERVED)
def test_views_are_spread_as_the_hosts_are(name: str) -> None:
    host = v2.Compose(SERVED[name])
    (picture,) = oracle.photographs(16, 1)
    torch.manual_seed(0)
    theirs = torch.stack([host(picture) for _ in range(300)])
    assert isinstance(theirs[0], Tensor)
    given = F.to_tensor(picture).expand(300, -1, -1, -1)
    (mine,) = mirror(host)(given, torch.Generator().manual_seed(0))
    assert (mine - given).abs().mean() > 0.01
    noise = 0.003 * torch.randn(2, 300)  # rounding aside
    for measure in (
        lambda x: x.mean((1, 2, 3)),
        lambda x: x.std((1, 2, 3)),
        lambda x: (x[:, 0] - x[:, 2]).mean((1, 2)),
        lambda x: (x - given[0]).abs().mean((1, 2, 3)),
    ):
        pair = (measure(mine) + noise[0], measure(theirs) + noise[1])
        assert ks_2samp(*(values.numpy() for values in pair)).pvalue > 1e-3


@pytest.mark.parametrize("name", SERVED)
def test_gradients_are_what_they_are_declared_to_be(name: str) -> None:
    twin = mirror(v2.Compose(SERVED[name]))
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(4, 3, 9, 8, generator=generator, dtype=torch.float64) * 0.2 + 0.4
    x.requires_grad_()
    params = twin.sample(x, torch.Generator().manual_seed(5))
    (view,) = twin.apply(x, params)
    assert not torch.equal(view, x)
    declared = {part.gradient for part in twin.pipelines[0].walk()}
    if "straight_through" in declared:
        up = torch.randn_like(view)
        torch.testing.assert_close(*torch.autograd.grad(view, x, up), up)
        return
    assert torch.autograd.gradcheck(
        lambda pixels: twin.apply(pixels, params)[0], (x,), eps=1e-7, atol=1e-5, fast_mode=True
    )


@pytest.mark.parametrize("mode", ["constant", "edge", "reflect", "symmetric"])
@pytest.mark.parametrize("library", [v1, v2], ids=["v1", "v2"])
def test_padding(library: Any, mode: str) -> None:
    host = library.Pad([1, 2, 3, 4], fill=50, padding_mode=mode)
    pictures = oracle.photographs(12, 2)
    given = oracle.to_tensor(pictures)
    twin = mirror(host)
    assert twin.view_size is None
    torch.testing.assert_close(twin(given)[0], oracle.to_tensor([host(p) for p in pictures]))
    assert mirror(library.Compose([library.CenterCrop(8), host])).view_size == (14, 12)


def test_an_image_of_colours_stays_so() -> None:
    given = oracle.to_tensor(oracle.photographs(12, 1))
    assert torch.equal(mirror(v2.Compose([v2.RGB(), v2.ToImage()]))(given)[0], given)


def test_what_takes_other_images_is_refused() -> None:
    with pytest.raises(UserError, match="GaussianNoise expected a tensor"):
        mirror(v2.GaussianNoise())
    with pytest.raises(UserError, match="JPEG expected a Pillow image or a uint8 tensor"):
        mirror(v2.Compose([v2.ToImage(), TO_FLOAT, v2.JPEG(50)]))


def test_every_class_of_v2_has_a_counterpart_or_is_refused_by_name() -> None:
    classes = {
        name: cls
        for name, cls in vars(v2).items()
        if inspect.isclass(cls) and issubclass(cls, v2.Transform)
    }
    missing = {name for name, cls in classes.items() if dotted_name(cls) not in RULES}
    assert missing == set(WITHOUT)


def test_tv_tensors_are_images_of_a_data_set() -> None:
    """What a pipeline of v2 makes of a tv_tensor is what the mirror makes of its pixels."""
    host = v2.Compose([v2.RandomHorizontalFlip(1.0), v2.Resize((10, 9), antialias=True), TO_FLOAT])
    bytes_CHW = (oracle.to_tensor(oracle.photographs(16, 1))[0] * 255).to(torch.uint8)
    theirs = host(tv_tensors.Image(bytes_CHW))
    twin = mirror(v2.Compose([v2.ToImage(), host]))
    (mine,) = twin(bytes_CHW[None] / 255)
    assert (mine[0] - theirs).abs().max() <= 1.01 / 255
