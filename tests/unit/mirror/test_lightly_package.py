"""Every class of the installed `lightly.transforms` that maps images to images has a mirror."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from inspect import signature
from typing import Any

import lightly.transforms
import numpy as np
import pytest
import torch
from lightly.transforms.add_grid_transform import AddGridTransform
from lightly.transforms.amplitude_rescale_transform import AmplitudeRescaleTransform
from lightly.transforms.detcon_transform import DetConSTransform
from lightly.transforms.fda_transform import FDAView1Transform
from lightly.transforms.gaussian_mixture_masks_transform import GaussianMixtureMask
from lightly.transforms.image_grid_transform import ImageGridTransform
from lightly.transforms.irfft2d_transform import IRFFT2DTransform
from lightly.transforms.jigsaw import Jigsaw
from lightly.transforms.multi_crop_transform import MultiCropTranform
from lightly.transforms.multi_view_transform import MultiViewTransform
from lightly.transforms.multi_view_transform_v2 import MultiViewTransformV2
from lightly.transforms.phase_shift_transform import PhaseShiftTransform
from lightly.transforms.pirl_transform import PIRLTransform
from lightly.transforms.random_crop_and_flip_with_grid import Location, RandomResizedCropAndFlip
from lightly.transforms.random_frequency_mask_transform import RandomFrequencyMaskTransform
from lightly.transforms.rfft2d_transform import RFFT2DTransform
from lightly.transforms.rotation import RandomRotateDegrees
from lightly.transforms.vicregl_transform import VICRegLTransform
from scipy.stats import ks_2samp
from torch import Tensor
from torchvision import transforms as v1
from torchvision.transforms import functional as F
from torchvision.transforms import v2

from cp_plugin.callbacks.batches import views_of
from cp_plugin.config.settings import UserError
from cp_plugin.mirror import Mirror, mirror
from tests.bench import pillow as oracle

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*indexing argument.*"),  # Lightly's calls of torch and
    pytest.mark.filterwarnings("ignore:.*get_image_size.*"),  # torchvision
]
NO_IMAGES = {
    "DeprecatedShim": "stands for torchvision's module, it transforms nothing",
    "Location": "says where a crop was; it transforms nothing",
    "RandomResizedCropWithLocation": "returns a location too: a part of RandomResizedCropAndFlip",
    "RandomHorizontalFlipWithLocation": "takes a location too: a part of RandomResizedCropAndFlip",
    "RandomVerticalFlipWithLocation": "takes a location too: a part of RandomResizedCropAndFlip",
}
"""Classes that do not map an image to images, and why."""
TO_TENSOR = v1.ToTensor()
SPECTRAL: dict[str, Any] = {
    "AmplitudeRescaleTransform": AmplitudeRescaleTransform(),
    "PhaseShiftTransform": PhaseShiftTransform(include_negatives=True),
    "RandomFrequencyMaskTransform": RandomFrequencyMaskTransform(k=(0.2, 0.4)),
    "GaussianMixtureMask": GaussianMixtureMask(3, (2, 4)),
}
ARGUMENTS: dict[str, Callable[[type], Any]] = {
    "AddGridTransform": lambda cls: v2.Compose([cls(2, 2), TO_TENSOR]),
    "GaussianBlur": lambda cls: cls(prob=0.5),
    "ImageGridTransform": lambda cls: cls([(RandomResizedCropAndFlip(3, 24), TO_TENSOR)]),
    "IRFFT2DTransform": lambda cls: v1.Compose([TO_TENSOR, RFFT2DTransform(), cls((64, 64))]),
    "RFFT2DTransform": lambda cls: v1.Compose([TO_TENSOR, cls(), IRFFT2DTransform((64, 64))]),
    "Jigsaw": lambda cls: cls(img_size=60, crop_size=16),
    "MultiCropTranform": lambda cls: cls((24,), (2,), (0.1,), (1.0,), TO_TENSOR),
    "MultiViewTransform": lambda cls: cls([TO_TENSOR]),
    "MultiViewTransformV2": lambda cls: cls([TO_TENSOR]),
    "RandomRotateDegrees": lambda cls: cls(0.5, 20),
    **{name: lambda cls, one=one: in_the_spectrum(one) for name, one in SPECTRAL.items()},
}
"""Of classes that no default serves: objects that hold one."""


def in_the_spectrum(change: object) -> v1.Compose:
    return v1.Compose([TO_TENSOR, RFFT2DTransform(), change, IRFFT2DTransform((64, 64))])


def classes() -> Iterator[type]:
    package = lightly.transforms
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        module = importlib.import_module(found.name)
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if cls.__module__ == found.name:
                yield cls


def images(count: int = 2, size: int = 64) -> Tensor:
    return oracle.to_tensor(oracle.photographs(size, count))


@pytest.mark.parametrize("cls", list(classes()), ids=lambda cls: cls.__name__)
def test_the_package_is_covered(cls: type) -> None:
    """A class of a new release fails here until it has a mirror, or a reason above."""
    if cls.__name__ in NO_IMAGES:
        return
    pipeline = ARGUMENTS.get(cls.__name__, lambda cls: cls())(cls)
    twin = mirror(pipeline)
    views = twin(images())
    assert len(views) == twin.views + len(twin.grids)
    theirs = pipeline(oracle.photographs(64, 1)[0])
    listed = theirs if isinstance(theirs, list) else [theirs]
    if cls is RandomResizedCropAndFlip:
        listed = [theirs[0]]
    for mine, other in zip(views, listed, strict=True):
        other = other if isinstance(other, Tensor) else F.to_tensor(other)
        assert mine.shape[1:] == other.shape


def test_reasons_are_needed() -> None:
    assert set(NO_IMAGES) <= {cls.__name__ for cls in classes()}


# -- the host's own pixels, with the parameters that a mirror drew --------------------------------


def spectrum_of(change: object, given: Tensor) -> tuple[Tensor, dict[str, Any], Mirror]:
    """Return what a mirror makes of a spectrum, the parameters it drew, and the mirror."""
    twin = mirror(in_the_spectrum(change))
    params = twin.sample(given, torch.Generator().manual_seed(3))
    return twin.apply(given, params)[0], params[0]["steps"][1], twin


def theirs_of(change: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    return IRFFT2DTransform((64, 64))(change(RFFT2DTransform()(image)))


class Fixed:
    """Draws what was drawn before."""

    def __init__(self, *values: Tensor) -> None:
        self.values = list(values)

    def __call__(self, *_: Any, **__: Any) -> Tensor:
        return self.values.pop(0)

    sample = __call__


def amplitude(p: dict[str, Any], i: int, patch: pytest.MonkeyPatch) -> Any:
    host = AmplitudeRescaleTransform()
    host.dist = Fixed(p["factor"][i].float())
    return host


def phase(p: dict[str, Any], i: int, patch: pytest.MonkeyPatch) -> Any:
    host = PhaseShiftTransform(include_negatives=True)
    angle = p["angle"][i].float()
    host.dist, host.sign_dist = Fixed(angle.abs()), Fixed((angle > 0).float())
    return host


def frequencies(p: dict[str, Any], i: int, patch: pytest.MonkeyPatch) -> Any:
    patch.setattr(torch, "rand", Fixed(p["kept"][i].float()))
    return RandomFrequencyMaskTransform(k=(0.5, 0.5))


def gaussians(p: dict[str, Any], i: int, patch: pytest.MonkeyPatch) -> Any:
    patch.setattr(torch, "randint", Fixed(*p["centre"][i].flatten().split(1)))
    patch.setattr(torch, "rand", Fixed(*((one.float() - 2) / 2 for one in p["deviation"][i])))
    return GaussianMixtureMask(3, (2, 4))


ORACLES = {
    "AmplitudeRescaleTransform": amplitude,
    "PhaseShiftTransform": phase,
    "RandomFrequencyMaskTransform": frequencies,
    "GaussianMixtureMask": gaussians,
}


@pytest.mark.parametrize("name", SPECTRAL)
def test_changes_of_the_spectrum(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = images(3)
    mine, drawn, _ = spectrum_of(SPECTRAL[name], given)
    assert (mine - given).abs().max() > 0.05
    for i, image in enumerate(given):
        with monkeypatch.context() as patch:
            expected = theirs_of(ORACLES[name](drawn, i, patch), image)
        torch.testing.assert_close(mine[i], expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", SPECTRAL)
def test_gradients_through_the_spectrum(name: str) -> None:
    """Declared exact; finite differences agree."""
    change = v1.RandomApply([SPECTRAL[name]], p=0.7)
    twin = mirror(v1.Compose([TO_TENSOR, RFFT2DTransform(), change, IRFFT2DTransform((6, 5))]))
    assert {part.gradient for view in twin.pipelines for part in view.walk()} == {"exact"}
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(2, 3, 6, 5, generator=generator, dtype=torch.float64).requires_grad_()
    params = twin.sample(x, torch.Generator().manual_seed(5))
    assert not torch.allclose(twin.apply(x, params)[0], x, atol=1e-3)
    assert torch.autograd.gradcheck(lambda pixels: twin.apply(pixels, params)[0], (x,), atol=1e-6)


def test_bytes_of_a_float_image_wrap_as_the_hosts() -> None:
    """`ToPILImage` cuts off and wraps around; declared straight through."""
    given = images(2)
    pipeline = v1.Compose([*in_the_spectrum(AmplitudeRescaleTransform((1.6999, 1.7))).transforms,
                           v1.ToPILImage(), TO_TENSOR])  # fmt: skip
    twin = mirror(pipeline)
    given.requires_grad_()
    (mine,) = twin(given)
    theirs = torch.stack([pipeline(v1.functional.to_pil_image(image)) for image in given.detach()])
    difference = (mine - theirs).abs() * 255
    assert (mine.detach() - 1.7 * given).abs().max() > 0.5  # there are pixels above 1
    assert (difference > 1.01).float().mean() < 0.02  # a level, or a wrap of what lies on the edge
    assert "straight_through" in {part.gradient for part in twin.pipelines[0].walk()}
    (grad,) = torch.autograd.grad(mine.sum(), given)
    torch.testing.assert_close(grad, torch.full_like(grad, 1.7), atol=1e-3, rtol=0)


def test_views_of_fourier_augmentation_look_like_the_hosts() -> None:
    pipeline = FDAView1Transform(input_size=16, normalize=None)
    (photograph,) = oracle.photographs(40, 1)
    torch.manual_seed(0)
    np.random.seed(0)
    theirs = torch.stack([pipeline(photograph) for _ in range(400)])
    given = F.to_tensor(photograph).expand(400, -1, -1, -1)
    (mine,) = mirror(pipeline)(given, torch.Generator().manual_seed(0))
    for measure in (lambda x: x.mean((1, 2, 3)), lambda x: x.std((1, 2, 3))):
        assert ks_2samp(measure(mine).numpy(), measure(theirs).numpy()).pvalue > 1e-3


def test_puzzles(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Jigsaw(n_grid=3, img_size=60, crop_size=16)
    pictures = oracle.photographs(64, 3)
    twin, given = mirror(host), oracle.to_tensor(pictures)
    params = twin.sample(given, torch.Generator().manual_seed(2))
    drawn = params[0]["steps"][0]
    (mine,) = twin.apply(given, params)
    assert mine.shape == (3, 9, 3, 16, 16)
    cells = torch.stack([torch.tensor(host.xx), torch.tensor(host.yy)], 1)
    assert drawn["corner"].sub(cells).unique().numel() > 2
    for i, picture in enumerate(pictures):
        offsets = (drawn["corner"][i] - cells).numpy()
        with monkeypatch.context() as patch:
            patch.setattr(np.random, "randint", Fixed(offsets[:, 0], offsets[:, 1]))
            patch.setattr(np.random, "permutation", Fixed(drawn["order"][i].numpy()))
            torch.testing.assert_close(mine[i], host(picture))
    x = images(2, 12).double().requires_grad_()
    small = mirror(Jigsaw(3, 12, 3, v1.Compose([v1.RandomHorizontalFlip(), v1.ToTensor()])))
    params = small.sample(x)
    assert {part.gradient for part in small.pipelines[0].walk()} == {"exact"}
    assert torch.autograd.gradcheck(lambda pixels: small.apply(pixels, params)[0], (x,))
    with pytest.raises(UserError, match="at least 60x60 pixels, got 32x32"):
        twin(images(2, 32))


def test_crops_with_their_grids() -> None:
    """VICRegL's loss compares where pixels were: the grids fit the mirror's own crops."""
    host = VICRegLTransform(global_crop_size=24, local_crop_size=16, vf_prob=0.5)
    pictures = oracle.photographs(64, 3)
    twin, given = mirror(host), oracle.to_tensor(pictures)
    params = twin.sample(given, torch.Generator().manual_seed(4))
    out = twin.apply(given, params)
    assert twin.views == 8
    assert len(out) == 16
    assert len(params) == 2  # views in a row that share a transform are drawn for at once
    for number, (crop, _) in enumerate(host.transforms):
        drawn = params[min(number, 2) // 2]["steps"][0]
        views, place_in_row = (2, number) if number < 2 else (6, number - 2)
        p = {key: value.chunk(views)[place_in_row] for key, value in drawn.items()}
        for i, picture in enumerate(pictures):
            top, left, height, width = (
                int(p[key][i]) for key in ("top", "left", "height", "width")
            )
            across, down = bool(p["flip_x"][i]), bool(p["flip_y"][i])
            place = Location(top, left, height, width, 64, 64, across, down)
            torch.testing.assert_close(out[8 + number][i], crop.location_to_NxN_grid(place))
            if number:
                continue
            view = F.resized_crop(picture, top, left, height, width, [24, 24])
            view = F.hflip(view) if across else view
            view = F.to_tensor(F.vflip(view) if down else view)
            mine = twin.pipelines[0].operations[0].apply(given[i : i + 1], {  # type: ignore[attr-defined]
                key: value[i : i + 1] for key, value in p.items()})[0]  # fmt: skip
            assert (mine - view).abs().max() * 255 < 1.6


def test_defences_of_views_leave_grids_alone() -> None:
    views = mirror(VICRegLTransform(global_crop_size=24, local_crop_size=16))(images(2))
    assert [view.shape for view in views_of((views, 0))] == [view.shape for view in views[:8]]


@pytest.mark.parametrize(
    ("pipeline", "text"),
    [
        (v1.Compose([TO_TENSOR, RFFT2DTransform()]), "ends in a spectrum: add IRFFT2D"),
        (RFFT2DTransform(), "expected a float tensor, got a Pillow image: put ToTensor before"),
        (v1.Compose([TO_TENSOR, PhaseShiftTransform()]), "expected a spectrum, got a float tensor"),
        (v1.Compose([TO_TENSOR, RFFT2DTransform(), v1.ColorJitter()]), "put IRFFT2DTransform"),
        (v1.Compose([TO_TENSOR, Jigsaw()]), "Jigsaw expected a Pillow image"),
    ],
)
def test_refused(pipeline: object, text: str) -> None:
    with pytest.raises(UserError, match=text):
        mirror(pipeline)


def test_masks_of_the_users_own_are_refused() -> None:
    if "mask_fn" not in signature(DetConSTransform).parameters:
        pytest.skip("this version of Lightly makes no masks of one's own")
    with pytest.raises(UserError, match="leave mask_fn out"):
        mirror(DetConSTransform(mask_fn=lambda image: image))


@pytest.mark.parametrize("host", [PIRLTransform(input_size=48), AddGridTransform(2, 2),
                                  ImageGridTransform([]), RandomRotateDegrees(0.5, 9),
                                  MultiViewTransformV2([TO_TENSOR]),
                                  MultiCropTranform((9,), (2,), (0.1,), (1.0,), TO_TENSOR),
                                  MultiViewTransform([TO_TENSOR])],
                         ids=lambda host: type(host).__name__)  # fmt: skip
def test_subclasses_of_containers_may_do_anything(host: Any) -> None:
    class Other(type(host)):  # type: ignore[misc]
        def __call__(self, *args: Any) -> Any:
            return super().__call__(*args), "more"

    other = Other.__new__(Other)
    vars(other).update(vars(host))
    with pytest.raises(UserError):
        mirror(other)
