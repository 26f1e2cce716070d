"""AutoAugment, RandAugment, TrivialAugmentWide and AugMix against torchvision's own."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from torch import Tensor
from torchvision import transforms as v1
from torchvision.transforms import InterpolationMode as Mode
from torchvision.transforms import functional as F
from torchvision.transforms import v2

from cp_plugin.config.settings import UserError
from cp_plugin.mirror import mirror
from tests.bench import pillow as oracle

GREY = [128, 64, 32]
HOSTS = {"v1": v1, "v2": v2}
# Of every kind: the number of its strength, and the highest 99.9th percentile of errors in 1/255.
KINDS = {
    "ShearX": (7, 1.0),
    "ShearY": (5, 1.0),
    "TranslateX": (4, 1.0),
    "TranslateY": (9, 1.0),
    "Rotate": (6, 1.0),
    "Brightness": (7, 1.0),
    "Color": (8, 1.4),  # of tensors torchvision truncates the grey image too, then the blend
    "Contrast": (4, 1.0),
    "Sharpness": (8, 1.0),
    "Posterize": (7, 0.01),
    "Solarize": (6, 0.01),
    "AutoContrast": (None, 1.0),
    "Equalize": (None, 0.01),
    "Invert": (None, 0.01),
}


def auto_augment(library: Any, kind: str, filter: Mode, fill: Any) -> Any:
    """torchvision's own AutoAugment with one pair of its kind of policy."""
    host = library.AutoAugment(interpolation=filter, fill=fill)
    pair = ((kind, 1.0, KINDS[kind][0]), ("Invert", 0.0, None))
    name = "_policies" if library is v2 else "policies"
    setattr(host, name, [pair])
    return host


@pytest.mark.parametrize("filter", [Mode.NEAREST, Mode.BILINEAR])
@pytest.mark.parametrize("tensors", [False, True], ids=["Pillow", "tensors"])
@pytest.mark.parametrize("library", HOSTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_the_hosts_pixels(
    kind: str, library: str, tensors: bool, filter: Mode
) -> None:
    pictures = oracle.photographs(40, 4)
    fill = None if filter is Mode.NEAREST else GREY
    host = auto_augment(HOSTS[library], kind, filter, fill)
    before = [HOSTS[library].PILToTensor()] if tensors else []
    twin = mirror(v1.Compose([*before, host]))
    given = oracle.to_tensor(pictures)
    (view,) = twin(given, torch.Generator().manual_seed(0))
    assert not torch.equal(view, given)
    torch.manual_seed(0)
    for picture, mine in zip(pictures, view, strict=True):
        image: Any = F.pil_to_tensor(picture) if tensors else picture
        theirs = {as_bytes(host(image)) for _ in range(12)}  # one of each sign
        errors = [oracle.errors(mine, decoded(made, mine))["p99.9"] for made in theirs]
        assert min(errors) <= KINDS[kind][1] + 1e-3, errors


def as_bytes(image: Any) -> bytes:
    tensor = image if isinstance(image, Tensor) else F.pil_to_tensor(image)
    return tensor.contiguous().numpy().tobytes()


def decoded(content: bytes, like: Tensor) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view_as(like) / 255


POLICIES = {
    "RandAugment": lambda library: library.RandAugment(num_ops=2, magnitude=20),
    "TrivialAugmentWide": lambda library: library.TrivialAugmentWide(),
    "AutoAugment of CIFAR-10": lambda library: library.AutoAugment(v1.AutoAugmentPolicy.CIFAR10),
    "AugMix": lambda library: library.AugMix(severity=6),
    "AugMix without colours": lambda library: library.AugMix(
        mixture_width=2, chain_depth=2, alpha=0.5, all_ops=False
    ),
}


@pytest.mark.parametrize("library", HOSTS)
@pytest.mark.parametrize("name", POLICIES)
def test_views_are_spread_as_the_hosts_are(name: str, library: str) -> None:
    host = POLICIES[name](HOSTS[library])
    (picture,) = oracle.photographs(16, 1)
    torch.manual_seed(0)
    theirs = torch.stack([F.to_tensor(host(picture)) for _ in range(600)])
    given = F.to_tensor(picture).expand(600, -1, -1, -1)
    (mine,) = mirror(host)(given, torch.Generator().manual_seed(0))
    corner = (slice(None), slice(None), slice(0, 3), slice(0, 3))
    noise = 0.01 * torch.randn(2, 600)  # many views are alike but for a level of rounding
    for measure in (
        lambda x: x.mean((1, 2, 3)),
        lambda x: x.std((1, 2, 3)),
        lambda x: x[corner].mean((1, 2, 3)),
        lambda x: (x - given[0]).abs().mean((1, 2, 3)),
    ):
        pair = (measure(mine) + noise[0], measure(theirs) + noise[1])
        assert ks_2samp(*(values.numpy() for values in pair)).pvalue > 1e-3


@pytest.mark.parametrize("name", POLICIES)
def test_gradients_are_declared_and_reach_the_images(name: str) -> None:
    twin = mirror(POLICIES[name](v2))
    declared = {part.gradient for view in twin.pipelines for part in view.walk()}
    assert declared == {"exact", "straight_through"}
    x = torch.rand(16, 3, 12, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
    params = twin.sample(x, torch.Generator().manual_seed(1))
    again = twin.sample(x, torch.Generator().manual_seed(1))
    (view,) = twin.apply(x, params)
    assert torch.equal(view, twin.apply(x, again)[0])
    (grad,) = torch.autograd.grad(view.sum(), x)
    assert grad.isfinite().all()
    assert (grad.flatten(1).abs().amax(1) > 0).float().mean() > 0.8
    assert torch.equal(pickle.loads(pickle.dumps(copy.deepcopy(twin))).apply(x, params)[0], view)


@pytest.mark.parametrize("library", HOSTS)
def test_a_policy_keeps_the_size_and_stands_in_a_pipeline(library: str) -> None:
    T = HOSTS[library]
    crop, policy = T.RandomResizedCrop(24), T.RandAugment()
    steps = [crop, policy, v1.ToTensor()]
    if library == "v2":
        steps = [v2.ToImage(), crop, policy, v2.ToDtype(torch.float32, True)]
    twin = mirror(T.Compose(steps))
    assert twin.crop_size == 24
    assert twin(torch.rand(2, 3, 40, 30))[0].shape == (2, 3, 24, 24)


@pytest.mark.parametrize("name", ["RandAugment", "TrivialAugmentWide", "AutoAugment", "AugMix"])
def test_floats_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"{name} expected a Pillow image or a uint8 tensor"):
        mirror(v2.Compose([v1.ToTensor(), getattr(v2, name)()]))


def test_an_image_is_one_of_the_hosts() -> None:
    """A picture of few colours: what is made of it is what torchvision makes of it, no other."""
    picture = Image.new("RGB", (8, 8), (200, 100, 50))
    host = v1.TrivialAugmentWide(num_magnitude_bins=2)
    torch.manual_seed(0)
    theirs = torch.stack([F.to_tensor(host(picture)) for _ in range(500)])
    (mine,) = mirror(host)(F.to_tensor(picture).expand(50, -1, -1, -1))
    distance = (mine[:, None] - theirs).abs().amax((2, 3, 4)).amin(1)
    assert distance.max() <= 1.01 / 255
