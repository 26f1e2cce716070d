"""The jitter for processors against the one for everything else, in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cp_plugin.mirror.base import ImageFormat, Params, moved
from cp_plugin.mirror.base import Shape as BatchShape
from cp_plugin.mirror.jitter import HUE, ColorJitter

fused = pytest.importorskip("cp_plugin.mirror.fused", reason="needs `pip install numba`")

BRIGHTNESS, CONTRAST, SATURATION = (0.6, 1.4), (0.5, 1.5), (0.2, 1.8)
HUES = (-0.3, 0.3)
SHAPE = BatchShape(64, 3, 17, 9)
JITTERS = {
    "all": ColorJitter(BRIGHTNESS, CONTRAST, SATURATION, HUES, p=0.8),
    "all, float": ColorJitter(BRIGHTNESS, CONTRAST, SATURATION, HUES, format=ImageFormat.FLOAT),
    "all, uint8": ColorJitter(BRIGHTNESS, CONTRAST, SATURATION, HUES, format=ImageFormat.BYTES),
    "no hue": ColorJitter(BRIGHTNESS, CONTRAST, SATURATION, None),
    "only hue": ColorJitter(None, None, None, HUES),
    "no contrast": ColorJitter(BRIGHTNESS, None, SATURATION, HUES),
}


def changed(jitter: ColorJitter, images: Tensor, params: Params, by: Tensor) -> tuple[Tensor, ...]:
    images = images.clone().requires_grad_()
    out = jitter.apply(images, moved(params, images.device, images.dtype))
    return out.detach(), torch.autograd.grad(out, images, by)[0]


@pytest.mark.parametrize("name", JITTERS)
def test_both_jitters_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    jitter = JITTERS[name]
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(SHAPE, generator=generator)
    by = torch.randn(SHAPE, generator=generator)
    params = jitter.sample(SHAPE, generator)
    calls: list[int] = []
    forward = fused.forward
    monkeypatch.setattr(fused, "forward", lambda *given: calls.append(1) or forward(*given))
    out, grad = changed(jitter, images, params, by)
    assert calls, "single precision on the processor goes through Numba"
    expected, expected_grad = changed(jitter, images.double(), params, by.double())
    assert len(calls) == 1, "double precision does not"
    # A pixel on the edge of two hue steps may fall on either side in single precision.
    assert ((out - expected).abs() > 1e-5).double().mean() < 1e-3
    assert ((grad - expected_grad).abs() > 1e-3).double().mean() < 1e-3
    assert not torch.equal(out, images)


def test_images_left_out_stay_as_they_are() -> None:
    jitter = JITTERS["all"]
    images = torch.rand(SHAPE)
    params = jitter.sample(SHAPE, torch.Generator().manual_seed(0))
    out, grad = changed(jitter, images, params, torch.ones(SHAPE))
    left = ~params["applied"]
    assert left.any()
    assert torch.equal(out[left], images[left])
    assert torch.equal(grad[left], torch.ones_like(grad[left]))


def test_grey_and_saturated_pixels_have_finite_gradients() -> None:
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 0.5, 1.0])] * 3)
    images = corners.T.reshape(1, 3, 27, 1).repeat(SHAPE.batch, 1, 1, 1)
    shape = BatchShape(*images.shape)
    params = JITTERS["all"].sample(shape, torch.Generator().manual_seed(1))
    out, grad = changed(JITTERS["all"], images, params, torch.ones(shape))
    assert out.isfinite().all()
    assert grad.isfinite().all()


def test_the_mean_of_contrast_is_of_each_image() -> None:
    jitter = ColorJitter(None, (0.5, 0.5), None, None, format=ImageFormat.FLOAT)
    images = torch.stack([torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 0.8)])
    params = jitter.sample(BatchShape(*images.shape))
    out = jitter.apply(images, moved(params, images.device, torch.float32))
    torch.testing.assert_close(out, images, rtol=1e-3, atol=1e-3)  # weights sum to 0.9999
    assert (params["steps"] == HUE).sum() == 0
