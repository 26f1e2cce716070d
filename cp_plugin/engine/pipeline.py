"""solo-learn's augmentation nodes as torchvision pipelines, one a view."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lightly.transforms.gaussian_blur import GaussianBlur
from lightly.transforms.multi_view_transform import MultiViewTransform
from omegaconf import DictConfig, OmegaConf
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import transforms

from cp_plugin.config.settings import UserError

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
Node = dict[str, Any]

STATISTICS: dict[str, Statistics] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "stl10": ((0.4914, 0.4823, 0.4466), (0.247, 0.243, 0.261)),
    "imagenet": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "imagenet100": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
}
"""Mean and standard deviation of the channels, pixels in [0, 1], as solo-learn has them."""
BLUR_SIGMAS = (0.1, 2.0)
"""Range of Pillow's Gaussian radius, in pixels (SimCLR, appendix A)."""
SOLARIZE_FROM = 128
"""Eight-bit values from here on are inverted."""
SETTINGS = ("crop_size", "num_crops", "mean", "std", "statistics", "strength")
KNOWN: dict[str, tuple[str, ...]] = {
    "rrc": ("enabled", "crop_min_scale", "crop_max_scale", "interpolation"),
    "random_crop": ("padding",),
    "color_jitter": ("prob", "brightness", "contrast", "saturation", "hue"),
    "grayscale": ("prob",),
    "gaussian_blur": ("prob",),
    "solarization": ("prob",),
    "equalization": ("prob",),
    "horizontal_flip": ("prob",),
}
"""The transforms of a node, in the order in which they are applied, and their settings.

All but `random_crop` (zeros around the image, then a crop), `rrc.interpolation` (of crops and of
the resize that stands for a crop switched off; solo-learn's is bicubic) and a node's `strength`
(see `weakened`) are solo-learn's.
"""
FILTERS = {mode.value: mode for mode in transforms.InterpolationMode}


def build_pipeline(cfg: DictConfig) -> MultiViewTransform:
    """Build the augmentations of a configuration, as solo-learn would.

    Args:
        cfg: a configuration with `data.dataset` and `augmentations`, a list of nodes; a transform
            that a node leaves out is off.

    Returns:
        A transform from a Pillow image to a list of views, float (3, crop_size, crop_size),
        normalised.

    Raises:
        UserError: a node has an unknown transform or setting, or a value that torchvision refuses.
    """
    views: list[transforms.Compose] = []
    for item in cfg.augmentations:
        node = weakened(_checked(OmegaConf.to_container(item, resolve=True)))
        views += [_compose(cfg.data.dataset, node)] * node["num_crops"]
    return MultiViewTransform(views)


def normalisation(dataset: str, node: Node | DictConfig) -> Statistics:
    """Return the mean and standard deviation that images of a data set are normalised with.

    Args:
        dataset: `data.dataset`; its own statistics win over `mean` and `std` of the node.
        node: an augmentation node. Its `statistics`, a `mean` and a `std` by name of data set, win
            over all; its `mean` and `std` serve data sets without statistics of their own; else
            ImageNet's do.
    """
    given = (node.get("statistics") or {}).get(dataset)
    if given is not None:
        return tuple(given["mean"]), tuple(given["std"])
    mean, std = STATISTICS.get(
        dataset, (node.get("mean", IMAGENET_DEFAULT_MEAN), node.get("std", IMAGENET_DEFAULT_STD))
    )
    return tuple(mean), tuple(std)


def weakened(node: Node) -> Node:
    """Return a node at its `strength`, from 0, no augmentation but flips, to 1, as it is written.

    The least scale of a crop goes from 1 to `crop_min_scale`; the ranges of colour jitter and the
    probabilities of jitter and grey are multiplied by the strength. After the contrastive
    augmentations of Wang et al., NeurIPS 2024; the formula was not checked against their paper.

    Raises:
        UserError: the strength is not in [0, 1].
    """
    strength = node.get("strength", 1)
    if not isinstance(strength, (int, float)) or not 0 <= strength <= 1:
        raise UserError(f"augmentations.strength must be in [0, 1], got {strength!r}.")
    if strength == 1:
        return node
    weak = {**node}
    if "rrc" in node:
        least = 1 - strength * (1 - node["rrc"]["crop_min_scale"])
        weak["rrc"] = {**node["rrc"], "crop_min_scale": least}
    if "color_jitter" in node:
        weak["color_jitter"] = {key: strength * x for key, x in node["color_jitter"].items()}
    if "grayscale" in node:
        weak["grayscale"] = {**node["grayscale"], "prob": strength * node["grayscale"]["prob"]}
    return weak


def _checked(node: Any) -> Node:
    """Return the node if it has only what is known."""
    if not isinstance(node, dict):
        raise UserError(f"expected a node of transforms in augmentations, got {node!r}.")
    _check_keys(node, (*KNOWN, *SETTINGS), "augmentations")
    for name, known in KNOWN.items():
        if name in node:
            _check_keys(node[name] or {}, known, f"augmentations.{name}")
    for name, values in (node.get("statistics") or {}).items():
        if not isinstance(values, dict) or {*values} != {"mean", "std"}:
            raise UserError(
                f"augmentations.statistics.{name} must hold mean and std, got {values!r}; give one "
                "number a channel for each."
            )
    return node


def _check_keys(node: Iterable[str], known: Sequence[str], where: str) -> None:
    for key in node:
        if key not in known:
            raise UserError(f"{where}.{key} is not known; known are {', '.join(known)}.")


def _compose(dataset: str, node: Node) -> transforms.Compose:
    steps: list[Callable[[Any], Any]] = []
    for name in KNOWN:
        settings = node.get(name) or {}
        try:
            steps += _BUILDERS[name](settings, node["crop_size"])
        except KeyError as missing:
            raise UserError(f"augmentations.{name} needs {missing}; add it.") from None
        except (TypeError, ValueError) as error:
            raise UserError(f"augmentations.{name} has a bad value: {error}.") from error
    mean, std = normalisation(dataset, node)
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(mean, std)])


def _crop(settings: Node, size: int) -> list[Callable[[Any], Any]]:
    name = settings.get("interpolation", "bicubic")
    if name not in FILTERS:
        raise ValueError(f"interpolation must be one of {', '.join(FILTERS)}; got {name!r}")
    if not settings.get("enabled", False):
        return [transforms.Resize(size, interpolation=FILTERS[name])]
    scale = (settings["crop_min_scale"], settings["crop_max_scale"])
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"expected 0 < crop_min_scale <= crop_max_scale <= 1, got {scale}")
    return [transforms.RandomResizedCrop(size, scale=scale, interpolation=FILTERS[name])]


def _padded_crop(settings: Node, size: int) -> list[Callable[[Any], Any]]:
    padding = settings.get("padding", 0)
    return [transforms.RandomCrop(size, padding=padding)] if padding else []


def _jitter(settings: Node, _: int) -> list[Callable[[Any], Any]]:
    if not (prob := _probability(settings)):
        return []
    strengths = [settings[key] for key in ("brightness", "contrast", "saturation", "hue")]
    return [transforms.RandomApply([transforms.ColorJitter(*strengths)], p=prob)]


def _with_probability(
    make: Callable[[float], Callable[[Any], Any]],
) -> Callable[[Node, int], list[Callable[[Any], Any]]]:
    """Turn `make(prob)` into a builder that gives nothing at probability 0."""

    def build(settings: Node, _: int) -> list[Callable[[Any], Any]]:
        prob = _probability(settings)
        return [make(prob)] if prob else []

    return build


def _probability(settings: Node) -> float:
    prob = settings.get("prob", 0.0)
    if not isinstance(prob, (int, float)) or not 0 <= prob <= 1:
        raise ValueError(f"prob must be in [0, 1], got {prob!r}")
    return float(prob)


_BUILDERS: dict[str, Callable[[Node, int], list[Callable[[Any], Any]]]] = {
    "rrc": _crop,
    "random_crop": _padded_crop,
    "color_jitter": _jitter,
    "grayscale": _with_probability(lambda p: transforms.RandomGrayscale(p)),
    "gaussian_blur": _with_probability(lambda p: GaussianBlur(prob=p, sigmas=BLUR_SIGMAS)),
    "solarization": _with_probability(lambda p: transforms.RandomSolarize(SOLARIZE_FROM, p)),
    "equalization": _with_probability(lambda p: transforms.RandomEqualize(p)),
    "horizontal_flip": _with_probability(lambda p: transforms.RandomHorizontalFlip(p)),
}
