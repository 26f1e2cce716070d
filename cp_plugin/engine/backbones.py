"""Surrogates: any timm backbone as an encoder, with a stem that fits small images."""

from __future__ import annotations

import difflib
import functools
import inspect
import logging
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg
from timm.models.resnet import ResNet
from torch import nn

from cp_plugin.config.settings import UserError
from cp_plugin.engine.whitening import PATCHES, Whitened, Whitening

SMALL_IMAGE = 64
"""Largest side in pixels for which the stem is changed."""
TOKENS_PER_SIDE = 8
"""Patches a side that a plain vision transformer gets on small images."""
STEM_POOLS = ("maxpool", "features.pool0", "stem.pool", "layer0.pool")
"""Where timm's convolutional networks keep the max pool of their stem."""

PIXELS = "pixels"
"""The backbone whose features are the pixels, so that a classifier on it is linear."""

_log = logging.getLogger(__name__)


class Pixels(nn.Flatten):
    """Images, float (B, 3, H, W), as features, float (B, 3 H W)."""

    def __init__(self, image_size: int) -> None:
        """Take the side of the images in pixels."""
        super().__init__()
        self.num_features = 3 * image_size**2


def surrogate(
    name: str, image_size: int, stem_stride: int = 1, whiten: int | None = None, **kwargs: Any
) -> nn.Module:
    """Build a timm model as an encoder: no classifier, features pooled over the image.

    Images of up to 64 pixels get a stem that keeps their resolution, as CIFAR ResNets have
    (He et al., CVPR 2016, section 4.2): a strided first convolution becomes 3x3 with stride 1 and
    the max pool after it goes; vision transformers get patches of an eighth of the image's side,
    hierarchical ones and ConvNeXts smaller patches than their own. Values in `kwargs` win.

    Args:
        name: a timm model, with or without the prefix `timm/`; or `pixels`.
        image_size: side of the images in pixels.
        stem_stride: of a convolutional stem for small images: 1, or 2 for a network that is four
            times cheaper and sees less detail.
        whiten: side in pixels, 2 or 3, of the patches that a fixed first layer whitens (see
            `Whitening`, which has to be fitted); that layer then has the stem's stride. None: no
            such layer.
        **kwargs: for `timm.create_model`, such as `channels=[16, 32, 64, 128]` for ResNets.

    Returns:
        A module that maps images, float (B, 3, H, W), to features, float (B, D);
        `feature_width` tells D.

    Raises:
        UserError: timm has no such model (the nearest names are given), does not accept these
            arguments, or the model cannot take images of this size.
    """
    architecture = name.removeprefix("timm/")
    if architecture == PIXELS:
        if kwargs or whiten is not None:
            raise UserError("backbone.name=pixels has no settings; add backbone.kwargs=null.")
        return Pixels(image_size)
    _check_name(architecture)
    if stem_stride not in (1, 2):
        raise UserError(f"backbone.kwargs.stem_stride must be 1 or 2, got {stem_stride}.")
    if whiten is not None:
        return _whitened(name, image_size, stem_stride, whiten, kwargs)
    model = _create(architecture, kwargs)
    _check_stem_width(model, architecture, kwargs)
    patches = _patch_arguments(model, architecture, image_size, kwargs)
    if patches:
        model = _create_patched(architecture, kwargs, patches, _reduction(model))
    if image_size <= SMALL_IMAGE and "patch_size" not in {**kwargs, **patches}:
        _keep_resolution(model, architecture, stem_stride)
    _check_output(model, architecture, image_size, kwargs.get("in_chans", 3))
    return model


def _whitened(
    name: str, image_size: int, stride: int, patch_size: int, kwargs: dict[str, Any]
) -> nn.Module:
    if patch_size not in PATCHES:
        raise UserError(f"backbone.whiten must be 2 or 3 (pixels), got {patch_size!r}.")
    if "in_chans" in kwargs:
        raise UserError("backbone.whiten decides about backbone.kwargs.in_chans; leave it out.")
    first = Whitening(patch_size, stride)
    model = surrogate(name, image_size // stride, in_chans=first.channels, **kwargs)
    return Whitened(first, model, feature_width(model))


def feature_width(model: nn.Module) -> int:
    """Return D, the width of the features that a surrogate computes.

    Raises:
        UserError: the model does not tell its width.
    """
    # In timm `num_features` is the width before a head's hidden layer, `head_hidden_size` after it.
    for attribute in ("head_hidden_size", "num_features"):
        width = getattr(model, attribute, None)
        if isinstance(width, int):
            return width
    raise UserError(
        f"expected a backbone with the attribute num_features, got {type(model).__name__}; "
        "use a timm model or set the attribute to the width of its features."
    )


def _check_name(architecture: str) -> None:
    if timm.is_model(architecture):
        return
    near = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists all names."
    raise UserError(f"timm has no model named {architecture!r}; {hint}")


def _create(architecture: str, kwargs: dict[str, Any]) -> nn.Module:
    try:
        model: nn.Module = timm.create_model(architecture, num_classes=0, **kwargs)
    except Exception as error:  # whatever a constructor among a thousand says of its arguments
        raise UserError(
            f"timm cannot build {architecture} with backbone.kwargs {kwargs}: {error}; leave out "
            "what it does not take (~backbone.kwargs leaves out all)."
        ) from error
    return model


def _create_patched(
    architecture: str, kwargs: dict[str, Any], patches: dict[str, int], before: int | None
) -> nn.Module:
    """Build it with patches of our size or, where its entry point fixes their size, its own."""
    try:
        model = _create(architecture, {**kwargs, **patches})
    except UserError:
        if "patch_size" not in patches:
            raise
        _say_no_small_stem(architecture)
        own = {key: value for key, value in patches.items() if key != "patch_size"}
        return _create(architecture, {**kwargs, **own})
    patch = patches.get("patch_size", 1)
    if patch > 1 and before is not None and _reduction(model) == before:
        # ConvNeXt makes up for patches of 2 with a stride in its first stage.
        smaller = {**patches, "patch_size": patch // 2}
        return _create_patched(architecture, kwargs, smaller, before)
    return model


def _check_stem_width(model: nn.Module, architecture: str, kwargs: dict[str, Any]) -> None:
    """Refuse what timm would ignore without a word."""
    given = kwargs.get("stem_width") is not None  # timm leaves out what is None
    if given and isinstance(model, ResNet) and isinstance(model.conv1, nn.Conv2d):
        raise UserError(
            f"stem_width has no effect on {architecture} as it is; add stem_type=deep "
            "(three 3x3 convolutions, the last one 2 * stem_width wide) or leave it out."
        )


def _patch_arguments(
    model: nn.Module, architecture: str, image_size: int, kwargs: dict[str, Any]
) -> dict[str, int]:
    """Return the image and patch size that a model made of patches has to be built with."""
    accepted = inspect.signature(type(model).__init__).parameters
    arguments: dict[str, int] = {}
    if "img_size" in accepted and _fixed_input_size(architecture):
        arguments["img_size"] = image_size
    patch = _patch_size(model, architecture)
    if patch is not None and "patch_size" in accepted and image_size <= SMALL_IMAGE:
        plain = _reduction(model) in (None, patch)
        arguments["patch_size"] = max(1, image_size // TOKENS_PER_SIDE if plain else patch // 2)
    return {key: value for key, value in arguments.items() if key not in kwargs}


def _reduction(model: nn.Module) -> int | None:
    """Return how many pixels a side become one position of the last feature map."""
    stages = getattr(model, "feature_info", None)
    return int(stages[-1]["reduction"]) if stages else None


def _patch_size(model: nn.Module, architecture: str) -> int | None:
    """Return the side of the patches that the first convolution cuts, if it cuts any."""
    for conv in _first_convs(model, architecture):
        if conv.stride[0] > 1 and conv.kernel_size == conv.stride:
            return conv.stride[0]
    return None


def _keep_resolution(model: nn.Module, architecture: str, stem_stride: int) -> None:
    """Take the strides out of a convolutional stem, all or all but one."""
    convs = _first_convs(model, architecture)
    strided = [conv for conv in convs if conv.stride[0] > 1]
    patches = any(conv.kernel_size == conv.stride for conv in strided)
    if not convs or patches or _fixed_input_size(architecture):
        _say_no_small_stem(architecture)
        return
    for conv in strided:
        conv.stride = (1, 1)
        if conv.kernel_size[0] > 3:
            _shrink_kernel(conv)
    for path in STEM_POOLS:
        _drop_pool(model, path)
    convs[0].stride = (stem_stride, stem_stride)


def _shrink_kernel(conv: nn.Conv2d) -> None:
    """Make it 3x3, with weights drawn as timm's ResNets draw theirs."""
    out_channels, in_channels = conv.weight.shape[:2]
    conv.kernel_size = (3, 3)
    if not isinstance(conv.padding, str) and conv.padding[0] > 0:
        conv.padding = (1, 1)
    weight = torch.empty(out_channels, in_channels, 3, 3, dtype=conv.weight.dtype)
    conv.weight = nn.Parameter(weight)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")


def _drop_pool(model: nn.Module, path: str) -> None:
    parent_path, _, attribute = path.rpartition(".")
    try:
        parent = model.get_submodule(parent_path)
    except AttributeError:
        return
    if isinstance(getattr(parent, attribute, None), nn.Module):
        setattr(parent, attribute, nn.Identity())


def _first_convs(model: nn.Module, architecture: str) -> list[nn.Conv2d]:
    """Return the convolutions that timm names as the first of this architecture."""
    config = get_pretrained_cfg(architecture)
    names = (config.first_conv if config else None) or ()
    paths = [names] if isinstance(names, str) else list(names)
    modules = dict(model.named_modules())
    # The name is that of the default variant: arguments such as stem_type=deep nest it deeper.
    found = [modules.get(f"{path}.0", modules.get(path)) for path in paths]
    return [module for module in found if isinstance(module, nn.Conv2d)]


def _fixed_input_size(architecture: str) -> bool:
    config = get_pretrained_cfg(architecture)
    return bool(config and config.fixed_input_size)


@functools.cache
def _say_no_small_stem(architecture: str) -> None:
    _log.warning("%s has no known stem for small images; its own stem is used.", architecture)


@torch.no_grad()
def _check_output(model: nn.Module, architecture: str, image_size: int, channels: int) -> None:
    """Run one black image through it: does it take this size, and give pooled features?"""
    model.eval()
    try:
        features = model(torch.zeros(1, channels, image_size, image_size))
    except Exception as error:  # whatever the thousand architectures say of a wrong size
        raise UserError(
            f"{architecture} cannot take images of {image_size} pixels with these "
            f"backbone.kwargs: {error}"
        ) from error
    finally:
        model.train()
    if features.ndim != 2:
        raise UserError(
            f"expected features of shape (B, D) from {architecture}, got "
            f"{tuple(features.shape)}; leave global_pool at its default."
        )
    if features.shape[1] != feature_width(model):
        model.head_hidden_size = features.shape[1]  # pools such as catavgmax widen the features
