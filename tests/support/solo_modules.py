"""Methods of solo-learn, small and smooth, with batches and views for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cp_plugin.data.batch import Batch
from cp_plugin.engine.solo_backbones import add_timm_backbone
from cp_plugin.hosts import adapt
from cp_plugin.hosts.modes import hold_still
from cp_plugin.hosts.solo_learn import SoloHost
from tests.support.solo_served import HEADS, ONE_VIEW, SERVED

BATCH, SIDE = 8, 12
RESNET = {
    "name": "timm/resnet18",
    "kwargs": {"layers": [1, 1, 1, 1], "channels": [4, 8, 8, 16]},
}
VIT = {"name": "vit_tiny", "kwargs": {"patch_size": 4, "img_size": SIDE}}


def configuration(name: str, small_crops: int = 0) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.create(
        {
            "name": "test",
            "method": name,
            "backbone": VIT if name in ONE_VIEW else RESNET,
            "data": {
                "dataset": "custom",
                "num_large_crops": 1 if name in ONE_VIEW else 2,
                "num_small_crops": small_crops,
                "num_classes": 10,
            },
            "optimizer": {
                "name": "sgd",
                "batch_size": BATCH,
                "lr": 0.1,
                "classifier_lr": 0.1,
                "weight_decay": 0.0,
                "kwargs": {},
            },
            "scheduler": {"name": "none", "interval": "epoch"},
            "max_epochs": 5,
            "momentum": {"base_tau": 0.99, "final_tau": 1.0, "classifier": True},
            "method_kwargs": SERVED.get(name, {**HEADS, "temperature": 0.2}),
        }
    )


def make(methods: Any, name: str, small_crops: int = 0) -> SoloHost:
    """A method with smooth activations, a momentum branch of its own, and its training state."""
    torch.manual_seed(0)
    base = methods["base"]
    undo = add_timm_backbone(base._BACKBONES, "timm/resnet18", SIDE)
    try:
        module = methods[name](configuration(name, small_crops))
    finally:
        undo()
    for parent in module.modules():  # kinks make finite differences inexact
        for child_name, child in parent.named_children():
            if isinstance(child, nn.ReLU):
                setattr(parent, child_name, nn.GELU())
    for _, momentum in getattr(module, "momentum_pairs", []):
        for parameter in momentum.parameters():
            parameter.data += 0.1 * parameter.std().nan_to_num(0) * torch.randn_like(parameter)
    as_in_training(module, name)
    for child in module.modules():
        if type(child).__name__ == "IterNorm":  # has a backward pass of its own: nothing is stopped
            child.forward = unseen_by_modes(child.forward)
    hold_still(module)
    host = adapt(module, with_views)
    assert isinstance(host, SoloHost)
    return host


def as_in_training(module: Any, name: str) -> None:
    """What two methods set up in `on_train_start`, for which they need a trainer."""
    if name == "swav":
        from solo.utils.sinkhorn_knopp import SinkhornKnopp

        module.sk = SinkhornKnopp(3, 0.05, 1)
        module.register_buffer("queue", nn.functional.normalize(torch.randn(2, 16, 8), dim=-1))
    if name == "deepclusterv2":
        module.assignments = torch.randint(0, 12, (2, BATCH))
        module.register_buffer("local_memory_index", torch.zeros(BATCH).long())
        module.register_buffer("local_memory_embeddings", torch.randn(2, BATCH, 8))


def unseen_by_modes(forward: Any) -> Any:
    def call(*args: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return forward(*args)

    return call


def with_views(sample: Any, views: Any) -> Any:
    return [sample[0], list(views), sample[2]]


def batch(label: int = 0) -> Batch:
    images = torch.zeros(BATCH, 3, SIDE, SIDE, dtype=torch.uint8)
    rows = torch.arange(BATCH)
    return Batch(rows, rows, images, [rows, None, torch.full((BATCH,), label)])


def views_of(host: SoloHost, images: Tensor, small_crops: int = 0) -> list[Tensor]:
    """As many views as a method was built for."""
    small = [images[..., 2:10, 2:10] * (1 + crop) for crop in range(small_crops)]
    large = [images * 2 - 1, images.flip(-1) * 1.5]
    return [*large[: host.module.num_large_crops], *small]
