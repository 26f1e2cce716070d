"""JPEG and rescaling that a perturbation is crafted through."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cp_plugin.config.settings import CraftConfig, UserError, build
from cp_plugin.mirror.base import Shape
from cp_plugin.mirror.survival import Compressed, Rescaled, survived


@pytest.fixture
def images() -> Tensor:
    small = torch.rand(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    large = torch.nn.functional.interpolate(small, (40, 32), mode="bilinear")
    return (large * 255).round() / 255


def test_jpeg_is_pillow_s_and_gradients_pass_straight_through(images: Tensor) -> None:
    operation = Compressed()
    params = operation.sample(Shape(*images.shape), torch.Generator().manual_seed(1))
    assert 0 < int(params["used"].sum()) < len(images)
    given = images.clone().requires_grad_()
    found = operation.apply(given, params)
    for row in range(len(images)):
        if not params["used"][row]:
            assert torch.equal(found[row], images[row])
            continue
        file = io.BytesIO()
        pixels = (images[row] * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(file, "JPEG", quality=int(params["quality"][row]))
        expected = np.asarray(Image.open(file)).transpose(2, 0, 1)
        assert np.allclose(found[row].detach().numpy() * 255, expected, atol=1e-3)
        assert not torch.equal(found[row], images[row])
    weights = torch.rand(images.shape, generator=torch.Generator().manual_seed(2))
    (found * weights).sum().backward()
    assert torch.equal(given.grad, weights)


def test_rescaling_is_differentiable() -> None:
    images = torch.rand(2, 3, 7, 9, dtype=torch.float64, requires_grad=True)
    operation = Rescaled()
    shape = Shape(*images.shape)
    params = operation.sample(shape, torch.Generator().manual_seed(4))
    params["used"] = torch.tensor([True, False])
    assert not torch.equal(operation.apply(images, params)[0], images[0])
    assert torch.equal(operation.apply(images, params)[1], images[1])
    assert torch.autograd.gradcheck(lambda x: operation.apply(x, params), images)


def test_nothing_is_drawn_where_nothing_was_asked_for(images: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert survived(images, (), generator) is images
    assert torch.equal(generator.get_state(), before)
    assert not torch.equal(survived(images, ("jpeg", "resize"), generator), images)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match=r"poison\.survive must be one of jpeg, resize"):
        build(CraftConfig, {"survive": ["blur"]})
    assert build(CraftConfig, {"survive": ["jpeg"]}).survive == ("jpeg",)
