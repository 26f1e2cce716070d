"""Surrogates against torchvision, against timm itself, and against bad names and arguments."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

from cp_plugin.config.settings import UserError
from cp_plugin.engine import backbones as surrogates
from cp_plugin.engine.backbones import feature_width, surrogate

NARROW = {"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32]}
SMALL_STEMS = [
    # name, arguments, side of the last feature map for 32 pixels
    ("timm/resnet18", NARROW, 4),
    ("resnet18", {**NARROW, "stem_type": "deep", "stem_width": 4}, 4),
    ("resnet10t", {}, 4),
    ("densenet121", {"growth_rate": 4, "block_config": [1, 1, 1, 1]}, 4),
    ("mobilenetv3_small_050", {}, 2),
    ("regnetx_002", {}, 2),
    ("convnext_atto", {"depths": [1, 1, 1, 1]}, 4),
    ("swin_tiny_patch4_window7_224", {"depths": [1, 1, 1, 1], "embed_dim": 24}, 2),
]


def _stages(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    features = model.eval().forward_features(images)
    # Swin keeps its channels last.
    return features if features.shape[1] != features.shape[2] else features.permute(0, 3, 1, 2)


@pytest.mark.parametrize(("name", "kwargs", "side"), SMALL_STEMS)
def test_small_images_keep_resolution(name: str, kwargs: dict[str, Any], side: int) -> None:
    model = surrogate(name, 32, **kwargs)
    images = torch.rand(2, 3, 32, 32)
    assert _stages(model, images).shape[-2:] == (side, side)
    preserve_state = timm.create_model(name.removeprefix("timm/"), num_classes=0, **kwargs)
    if "swin" not in name:  # which refuses 32 pixels as it comes
        assert _stages(preserve_state, images).shape[-1] < side
    assert model(images).shape == (2, feature_width(model))


def test_small_resnet_is_torchvisions_with_a_cifar_stem() -> None:
    model = surrogate("resnet18", 32).eval()
    reference = torchvision.models.resnet18()
    reference.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
    reference.maxpool = nn.Identity()
    reference.fc = nn.Identity()
    reference.load_state_dict(model.state_dict())
    images = torch.rand(3, 3, 32, 32)
    torch.testing.assert_close(model(images), reference.eval()(images))
    assert feature_width(model) == 512


def test_stem_is_drawn_like_every_other_convolution() -> None:
    torch.manual_seed(0)
    weight = surrogate("resnet18", 32).get_parameter("conv1.weight")
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)


def test_large_images_get_timms_own_model() -> None:
    torch.manual_seed(3)
    model = surrogate("resnet18", 65, **NARROW)
    torch.manual_seed(3)
    expected = timm.create_model("resnet18", num_classes=0, **NARROW)
    assert str(model) == str(expected)
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


@pytest.mark.parametrize(
    ("size", "kwargs", "patch"),
    [(32, {}, 4), (64, {}, 8), (32, {"patch_size": 16}, 16), (96, {}, 16)],
)
def test_vision_transformers_fit_the_image(size: int, kwargs: dict[str, int], patch: int) -> None:
    model = surrogate("vit_tiny_patch16_224", size, depth=1, **kwargs)
    assert model.patch_embed.proj.stride == (patch, patch)
    tokens = model.forward_features(torch.rand(1, 3, size, size))
    assert tokens.shape[1] == (size // patch) ** 2 + 1


def test_fixed_patches_are_left_alone() -> None:
    model = surrogate("mixer_s32_224", 32)
    assert model.stem.proj.stride == (32, 32)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, feature_width(model))


def test_no_known_small_stem_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    surrogates._say_no_small_stem.cache_clear()
    with caplog.at_level(logging.WARNING, logger="cp_plugin.engine.backbones"):
        for _ in range(2):
            surrogate("xcit_nano_12_p8_224", 32, depth=1)
    assert [record.getMessage() for record in caplog.records] == [
        "xcit_nano_12_p8_224 has no known stem for small images; its own stem is used."
    ]


def test_width_is_read_from_the_features() -> None:
    model = surrogate("resnet18", 32, global_pool="catavgmax", **NARROW)
    assert model(torch.rand(2, 3, 32, 32)).shape[1] == feature_width(model) == 64
    hidden = surrogate("mobilenetv3_small_050", 32)
    assert feature_width(hidden) == 1024  # its head's hidden layer; `num_features` says 288
    assert hidden.num_features == 288


def test_it_trains_in_float64_and_channels_last() -> None:
    model = surrogate("resnet18", 32, **NARROW).double().to(memory_format=torch.channels_last)
    assert model.training
    images = torch.rand(4, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    model(images.contiguous(memory_format=torch.channels_last)).square().sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "size", "kwargs", "message"),
    [
        ("timm/resnt18", 32, {}, r"no model named 'resnt18'; did you mean resnet18"),
        ("q" * 9, 32, {}, "timm.list_models"),
        ("resnet18", 32, {"widen": 2}, r"cannot build resnet18 .*'widen'"),
        ("resnet18", 32, {"num_classes": 10}, "cannot build resnet18"),
        ("resnet18", 32, {"stem_width": 8}, "stem_width has no effect .* stem_type=deep"),
        ("resnet18", 32, {"global_pool": ""}, r"features of shape \(B, D\)"),
        ("levit_128s", 32, {}, "cannot take images of 32 pixels"),
    ],
)
def test_bad_input(name: str, size: int, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        surrogate(name, size, **kwargs)


def test_a_module_without_a_width() -> None:
    with pytest.raises(UserError, match="num_features, got Linear"):
        feature_width(nn.Linear(3, 4))


@pytest.mark.parametrize("stem_type", ["", "deep"])
def test_a_stem_with_a_stride_of_two_halves_the_maps(stem_type):
    narrow = {"layers": [1, 1, 1, 1], "stem_type": stem_type}
    full = surrogate("timm/resnet18", 32, **narrow)
    half = surrogate("timm/resnet18", 32, stem_stride=2, **narrow)
    images = torch.zeros(1, 3, 32, 32)
    assert full.conv1(images).shape[-1] == 32
    assert half.conv1(images).shape[-1] == 16


def test_other_strides_of_the_stem_are_refused():
    with pytest.raises(UserError, match=r"stem_stride must be 1 or 2, got 4"):
        surrogate("timm/resnet18", 32, stem_stride=4)
