"""The whitening first layer against a covariance, and what a backbone behind it looks like."""

import pytest
import torch
from torch.nn import functional

from cp_plugin.config.settings import UserError
from cp_plugin.engine.backbones import feature_width, surrogate
from cp_plugin.engine.whitening import Whitening

NARROW = {"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32]}


def views():
    """Return smooth images, whose pixels depend on each other, with some noise."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(64, 3, 8, 8, generator=generator)
    smooth = functional.interpolate(coarse, 32, mode="bicubic")
    return smooth + 0.2 * torch.randn(smooth.shape, generator=generator)


@pytest.mark.parametrize("patch_size", [2, 3])
def test_patches_are_white(patch_size):
    images = views()
    layer = Whitening(patch_size)
    layer.fit([images[:32], images[32:]])
    found = functional.conv2d(images, layer.weight).transpose(0, 1).flatten(1)
    half = layer.channels // 2
    covariance = torch.cov(found[:half])
    # A little below 1 where a component has little variance, for the epsilon in its place.
    torch.testing.assert_close(covariance, torch.eye(half), atol=0.02, rtol=0)
    assert torch.equal(layer.weight[:half], -layer.weight[half:])


@pytest.mark.parametrize(
    ("patch_size", "stride", "side"), [(2, 1, 32), (2, 2, 16), (3, 1, 32), (3, 2, 16)]
)
def test_a_map_has_the_images_side_over_the_stride(patch_size, stride, side):
    layer = Whitening(patch_size, stride)
    assert layer(views()[:2]).shape == (2, 6 * patch_size**2, side, side)


@pytest.mark.parametrize(
    ("name", "kwargs"), [("resnet18", NARROW), ("vit_tiny_patch16_224", {"depth": 1})]
)
def test_any_backbone_stands_behind_it(name, kwargs):
    plain = surrogate(name, 32, **kwargs)
    model = surrogate(name, 32, whiten=2, **kwargs)
    assert model(views()[:2]).shape == (2, feature_width(model)) == (2, feature_width(plain))
    assert "whitening.weight" in model.state_dict()
    assert not [key for key, _ in model.named_parameters() if "whitening" in key]


def test_it_takes_the_stride_of_the_stem():
    model = surrogate("resnet18", 32, stem_stride=2, whiten=2, **NARROW)
    assert model.whitening.stride == 2
    assert model.backbone.conv1.stride == (1, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"whiten": 4}, "backbone.whiten must be 2 or 3"),
        ({"whiten": 2, "in_chans": 3}, "backbone.kwargs.in_chans"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        surrogate("resnet18", 32, **arguments)
