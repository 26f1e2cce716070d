"""kornia's augmentations in a pipeline that the mirror reads: its own pixels, draws apart."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from scipy.stats import ks_2samp
from torch import Tensor
from torchvision import transforms as v1

from cp_plugin.config.settings import UserError
from cp_plugin.mirror import mirror

pytestmark = pytest.mark.filterwarnings("ignore")  # of kornia's own uses of what is deprecated
K = pytest.importorskip("kornia.augmentation")

GIVEN: dict[str, tuple[Any, ...]] = {
    "CenterCrop": (8,),
    "ColorJiggle": (0.4, 0.4, 0.4, 0.1),
    "ColorJitter": (0.4, 0.4, 0.4, 0.1),
    "Denormalize": ([0.5] * 3, [0.2] * 3),
    "Normalize": ([0.5] * 3, [0.2] * 3),
    "PadTo": ((20, 20),),
    "RandomAffine": (20,),
    "RandomBrightness": ((0.5, 1.5),),
    "RandomContrast": ((0.5, 1.5),),
    "RandomCrop": ((8, 8),),
    "RandomFisheye": (torch.tensor([-0.3, 0.3]),) * 2 + (torch.tensor([0.9, 1.0]),),
    "RandomGamma": ((0.5, 1.5),),
    "RandomGaussianBlur": ((3, 3), (0.1, 2.0)),
    "RandomHue": ((-0.3, 0.3),),
    "RandomMotionBlur": (3, 35.0, 0.5),
    "RandomRain": ((20, 30), (1, 3), (1, 3)),
    "RandomResizedCrop": ((8, 8),),
    "RandomRotation": (30,),
    "RandomRotation90": ((1, 3),),
    "RandomSaturation": ((0.5, 1.5),),
    "RandomShear": (0.2,),
    "RandomTranslate": ((0.1, 0.1),),
    "Resize": ((8, 8),),
}
STRAIGHT = ("RandomClahe", "RandomEqualize", "RandomJPEG", "RandomPosterize")
NOT_HERE = ("LongestMaxSize", "SmallestMaxSize", "RandomDissolving")
"""The first two are refused, the last asks for another package."""
SERVED = [
    name
    for name, cls in vars(K).items()
    if inspect.isclass(cls) and issubclass(cls, K.AugmentationBase2D)
    if "Base" not in name and name not in NOT_HERE
]


def augmentation(name: str) -> Any:
    cls = getattr(K, name)
    always = {"p": 1.0} if "p" in inspect.signature(cls).parameters else {}
    if name in ("Normalize", "Denormalize"):
        always = {}
    return cls(*GIVEN.get(name, ()), keepdim=True, **always)


def images(count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(count, 3, 18, 17, generator=generator, dtype=torch.float64) * 0.9 + 0.05


@pytest.mark.parametrize("name", SERVED)
def test_an_augmentation(name: str) -> None:
    """It is pure, its shape is foretold, and its gradient is what it is declared to be."""
    twin = mirror(v1.Compose([v1.ToTensor(), augmentation(name)]))
    x = images().requires_grad_()
    params = twin.sample(x, torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    (view,) = twin.apply(x, params)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(view, twin.apply(x, params)[0])
    assert view.shape != x.shape or not torch.equal(view, x)
    size = twin.view_size
    assert tuple(view.shape[2:]) == (size or tuple(x.shape[2:]))
    declared = {part.gradient for part in twin.pipelines[0].walk()} - {"exact"}
    assert declared == ({"straight_through"} if name in STRAIGHT else set())
    if declared:
        up = torch.randn_like(view)
        torch.testing.assert_close(*torch.autograd.grad(view, x, up), up)
    else:
        assert torch.autograd.gradcheck(
            lambda pixels: twin.apply(pixels, params)[0], (x,), eps=1e-7, atol=1e-5, fast_mode=True
        )


def simclr(**settings: Any) -> Any:
    return K.AugmentationSequential(
        K.RandomResizedCrop((12, 12), (0.3, 1.0)),
        K.RandomHorizontalFlip(p=0.5),
        K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        K.RandomGrayscale(p=0.2),
        K.RandomGaussianBlur((3, 3), (0.1, 2.0), p=0.5),
        **settings,
    )


def test_a_sequence_makes_the_views_that_kornia_makes() -> None:
    normalize = K.Normalize([0.4, 0.5, 0.6], [0.2, 0.3, 0.4], keepdim=True)
    host = v1.Compose([v1.ToTensor(), simclr(keepdim=True), normalize])
    image = images(1).float()[0]
    torch.manual_seed(0)
    theirs = torch.stack([normalize(host.transforms[1](image)) for _ in range(300)])
    twin = mirror(host)
    assert twin.crop_size == 12
    (mine,) = twin(image.expand(300, -1, -1, -1), torch.Generator().manual_seed(0))
    for measure in (lambda x: x.mean((1, 2, 3)), lambda x: x.std((1, 2, 3)),
                    lambda x: (x[:, 0] - x[:, 2]).mean((1, 2))):  # fmt: skip
        assert ks_2samp(measure(mine).numpy(), measure(theirs).numpy()).pvalue > 1e-3
    blank = torch.zeros(1, 3, 2, 2)
    torch.testing.assert_close(twin.normalize(blank), normalize(blank))


def test_kornia_keeps_nothing_of_the_mirror() -> None:
    host = simclr(keepdim=True)
    crop = next(host.children())
    twin = mirror(v1.Compose([v1.ToTensor(), host]))
    twin(images().requires_grad_())
    assert not crop._params
    held = [part.host for part in twin.pipelines[0].walk() if hasattr(part, "host")]
    assert len(held) == 5
    assert not any(part._params for part in held)


@pytest.mark.parametrize(
    ("transform", "text"),
    [
        (simclr(), "keepdim=True"),
        (K.RandomHorizontalFlip(), "keepdim=True"),
        (simclr(keepdim=True, data_keys=["input", "mask"]), r"data_keys=\['input'\]"),
        (simclr(keepdim=True, random_apply=2), "neither random_apply"),
        (simclr(keepdim=True, same_on_batch=True), "nor same_on_batch"),
        (K.RandomMixUpV2(), "one image of one size of each image, got RandomMixUpV2"),
        (K.LongestMaxSize(8), "got LongestMaxSize"),
    ],
)
def test_what_is_refused(transform: Any, text: str) -> None:
    with pytest.raises(UserError, match=text):
        mirror(v1.Compose([v1.ToTensor(), transform]))


def test_a_pillow_image_is_refused() -> None:
    with pytest.raises(UserError, match="RandomHorizontalFlip expected a float tensor"):
        mirror(K.RandomHorizontalFlip(keepdim=True))
