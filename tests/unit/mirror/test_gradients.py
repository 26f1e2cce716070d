"""Gradients of the mirror: finite differences in float64, and what is declared straight through."""

from __future__ import annotations

import lightly.transforms as lightly
import pytest
import torch
from torch import Tensor
from torchvision import transforms as v1
from torchvision.transforms import InterpolationMode as Mode

from cp_plugin.mirror import Mirror, mirror
from cp_plugin.mirror.blur import PillowBlur, box_matrix, box_radius

CROP = v1.RandomResizedCrop((7, 6), (0.3, 0.9), interpolation=Mode.BICUBIC)
EXACT = {
    "crop bicubic": CROP,
    "crop bilinear": v1.RandomResizedCrop((12, 11)),
    "crop nearest": v1.RandomResizedCrop((5, 12), interpolation=Mode.NEAREST),
    "crop and flips": v1.Compose([CROP, v1.RandomHorizontalFlip(), v1.RandomVerticalFlip()]),
    "resize": v1.Resize(6, Mode.BICUBIC),
    "centre crop": v1.CenterCrop(6),
    "random crop": v1.RandomCrop(8, 3, fill=50),
    "flip": v1.RandomHorizontalFlip(0.5),
    "brightness": v1.ColorJitter(brightness=0.8),
    "contrast": v1.ColorJitter(contrast=0.8),
    "saturation": v1.ColorJitter(saturation=0.8),
    "hue": v1.ColorJitter(hue=0.5),
    "jitter": v1.RandomApply([v1.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
    "jitter without hue": v1.ColorJitter(0.4, 0.4, 0.4),
    "jitter of tensors": v1.Compose([v1.ToTensor(), v1.ColorJitter(0.4, 0.4, 0.4, 0.3)]),
    "grey": v1.RandomGrayscale(0.5),
    "torchvision's blur": v1.GaussianBlur(5, (0.4, 2.0)),
    "solarise": v1.RandomSolarize(128, 0.7),
    "invert": v1.RandomInvert(0.7),
    "autocontrast": v1.RandomAutocontrast(0.7),
    "sharpness": v1.RandomAdjustSharpness(1.8, 0.7),
    "erasing": v1.RandomErasing(0.9, value=0.3),
    "rotation nearest": v1.RandomRotation((20, 70)),
    "rotation bicubic": v1.RandomRotation((20, 70), Mode.BICUBIC),
    "perspective": v1.RandomPerspective(0.5, 0.9),
    "affine": v1.RandomAffine(40, (0.2, 0.1), (0.7, 1.3), (-20, 20, -10, 10)),
    "affine of tensors": v1.Compose(
        [v1.ToTensor(), v1.RandomAffine(40, (0.2, 0.1), interpolation=Mode.BILINEAR, fill=0.3)]
    ),
    "rotation of tensors": v1.Compose([v1.ToTensor(), v1.RandomRotation((20, 70), Mode.BILINEAR)]),
    "normalise": v1.Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)),
    "choice": v1.RandomChoice([v1.RandomInvert(1.0), v1.GaussianBlur(3)]),
    "order": v1.RandomOrder([v1.RandomInvert(1.0), v1.ColorJitter(brightness=0.5)]),
    "SimCLR": v1.Compose(
        [
            CROP,
            v1.RandomHorizontalFlip(),
            v1.RandomApply([v1.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
            v1.RandomGrayscale(0.2),
            v1.GaussianBlur(3),
            v1.ToTensor(),
            v1.Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)),
        ]
    ),
}
STRAIGHT = {
    "equalise": v1.RandomEqualize(1.0),
    "posterise": v1.RandomPosterize(2, 1.0),
}


def images(seed: int) -> Tensor:
    """Pixels off the clamps and off each other."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(3, 3, 9, 8, generator=generator, dtype=torch.float64) * 0.9 + 0.05


def gradients_declared(twin: Mirror) -> set[str]:
    return {part.gradient for view in twin.pipelines for part in view.walk()}


@pytest.mark.parametrize("name", EXACT)
def test_exact(name: str) -> None:
    twin = mirror(EXACT[name])
    assert gradients_declared(twin) == {"exact"}
    x = images(3).requires_grad_()
    params = twin.sample(x, torch.Generator().manual_seed(5))

    def view(pixels: Tensor) -> Tensor:
        return twin.apply(pixels, params)[0]

    out = view(x)
    assert out.dtype == torch.float64
    assert out.shape != x.shape or not torch.equal(out, x)
    # Along random directions through all pixels at once, which takes a hundredth of the time.
    assert torch.autograd.gradcheck(view, (x,), eps=1e-7, atol=1e-5, fast_mode=True)


@pytest.mark.parametrize("name", STRAIGHT)
def test_straight_through(name: str) -> None:
    twin = mirror(STRAIGHT[name])
    assert "straight_through" in gradients_declared(twin)
    x = images(3).requires_grad_()
    (view,) = twin(x)
    assert not torch.equal(view, x)
    up = torch.randn_like(view)
    (grad,) = torch.autograd.grad(view, x, up)
    torch.testing.assert_close(grad, up)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_pillows_blur_has_the_gradient_of_its_passes_without_rounding(dtype: torch.dtype) -> None:
    assert "straight_through" in gradients_declared(mirror(lightly.GaussianBlur()))
    x = images(3).to(dtype).requires_grad_()
    sigma = torch.tensor([0.4, 1.1, 2.0], dtype=dtype)
    view = PillowBlur((0.4, 2.0)).apply(x, {"sigma": sigma})
    levels = view.detach() * 255
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    radius = box_radius(sigma.float()).to(dtype)
    boxes = (box_matrix(radius, size) for size in x.shape[-2:])
    rows, columns = (torch.matrix_power(box, 3)[:, None] for box in boxes)
    up = torch.randn_like(view)
    (grad,) = torch.autograd.grad(view, x, up)
    torch.testing.assert_close(grad, rows.mT @ up @ columns)


def test_grey_pixels_keep_a_finite_gradient() -> None:
    twin = mirror(v1.ColorJitter(hue=0.4))
    x = torch.full((2, 3, 4, 4), 0.5, requires_grad=True)
    (view,) = twin(x)
    (grad,) = torch.autograd.grad(view.sum(), x)
    torch.testing.assert_close(view, x)
    torch.testing.assert_close(grad.sum(1), torch.full((2, 4, 4), 3.0))


def test_views_of_one_batch_add_their_gradients() -> None:
    twin = mirror(lightly.SimCLRTransform(input_size=8))
    x = images(1).requires_grad_()
    params = twin.sample(x)
    views = twin.apply(x, params)
    apart = [torch.autograd.grad(v.sum(), x, retain_graph=True)[0] for v in views]
    (together,) = torch.autograd.grad(sum(v.sum() for v in views), x)
    torch.testing.assert_close(together, apart[0] + apart[1])
