"""solo-learn's YAML augmentation nodes: the same pipelines, without solo-learn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cp_plugin.config import UserError
from cp_plugin.mirror.blur import PillowBlur
from cp_plugin.mirror.colour import Normalize, RandomGrayscale
from cp_plugin.mirror.containers import RandomApply, Sequence
from cp_plugin.mirror.geometry import Flip, RandomResizedCrop, Resize
from cp_plugin.mirror.jitter import ColorJitter
from cp_plugin.mirror.operation import Operation
from cp_plugin.mirror.tones import Equalize, Solarize
from cp_plugin.mirror.translate import simplified

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
IMAGENET: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
STATISTICS: dict[str, Statistics] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "stl10": ((0.4914, 0.4823, 0.4466), (0.247, 0.243, 0.261)),
    "imagenet": IMAGENET,
    "imagenet100": IMAGENET,
}
"""Mean and standard deviation that solo-learn normalises each data set with."""
RATIO = (3 / 4, 4 / 3)
KEYS = (
    "crop_size",
    "rrc",
    "color_jitter",
    "grayscale",
    "gaussian_blur",
    "solarization",
    "equalization",
    "horizontal_flip",
)


def node_views(nodes: object, dataset: str | None) -> list[Operation] | None:
    """Translate augmentation nodes, one operation a view; None where `nodes` are none.

    Raises:
        UserError: a node lacks a key.
    """
    items = [nodes] if isinstance(nodes, Mapping) else nodes
    if isinstance(items, (str, bytes)) or not hasattr(items, "__iter__"):
        return None
    items = list(items)
    if not items or not all(isinstance(item, Mapping) for item in items):
        return None
    views: list[Operation] = []
    for node in items:
        views += [_translate(node, dataset)] * int(node.get("num_crops", 1))
    return views


def _translate(node: Mapping[str, Any], dataset: str | None) -> Operation:
    missing = [key for key in KEYS if key not in node]
    if missing:
        raise UserError(
            f"an augmentation node needs {', '.join(KEYS)}; {', '.join(missing)} is missing: add "
            "it, with prob: 0.0 where it is not wanted."
        )
    size = int(node["crop_size"])
    crop, jitter = node["rrc"], node["color_jitter"]
    steps: list[Operation] = [
        RandomResizedCrop(
            (size, size),
            (crop["crop_min_scale"], crop["crop_max_scale"]),
            RATIO,
            "bicubic",
            name="RandomResizedCrop",
        )
        if crop["enabled"]
        else Resize(size, filter_name="bicubic", name="Resize")
    ]
    if jitter["prob"]:
        steps.append(
            ColorJitter(
                _around_one(jitter["brightness"]),
                _around_one(jitter["contrast"]),
                _around_one(jitter["saturation"]),
                (-jitter["hue"], jitter["hue"]) if jitter["hue"] else None,
                p=jitter["prob"],
                name="ColorJitter",
            )
        )
    steps.append(RandomGrayscale(node["grayscale"]["prob"], name="RandomGrayscale"))
    optional = (
        ("gaussian_blur", PillowBlur((0.1, 2.0), "GaussianBlur")),
        ("solarization", Solarize(128, name="Solarization")),
        ("equalization", Equalize("Equalization")),
    )
    operation: Operation
    for key, operation in optional:
        if node[key]["prob"]:
            steps.append(RandomApply(operation, node[key]["prob"], operation.name))
    steps.append(Flip(-1, node["horizontal_flip"]["prob"], "RandomHorizontalFlip"))
    mean, std = STATISTICS.get(
        dataset or "", (node.get("mean", IMAGENET[0]), node.get("std", IMAGENET[1]))
    )
    steps.append(Normalize(mean, std, "Normalize"))
    return Sequence(simplified(steps), "augmentation node")


def _around_one(strength: float) -> tuple[float, float] | None:
    return (max(0.0, 1 - strength), 1 + strength) if strength else None
