"""Methods of stable-pretraining, small and smooth, as its users build them.

`FORWARDS` are those of its `forward` module, `METHODS` classes of its `methods/`. Nothing of it is
imported before a module is built, so that the tables of what is served can be made without it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from tests.support.lightly_modules import Style

SIDE, PATCH, WIDTH = 8, 2, 16
FORM = "dictionaries"
FORWARDS: list[Style] = []
METHODS: list[Style] = []
REFUSED = {"supervised": "its loss compares labels, so its poison would be a supervised one"}
"""Functions of `forward` that no poison is crafted with, and why."""
HEADS = ("backbone.teacher", "projector.teacher")


def listed(where: list[Style], **facts: Any) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    def register(build: Callable[[], Any]) -> Callable[[], Any]:
        style = Style(build.__name__, lambda _: smooth(build()), **{"batch": FORM, **facts})
        where.append(style)
        return build

    return register


def spt() -> Any:
    return importlib.import_module("stable_pretraining")


def smooth(module: Any) -> Any:
    """Exchange what has kinks, which make finite differences inexact."""
    for parent in module.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ReLU):
                setattr(parent, name, nn.GELU())
    return module


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.1),
    )


def vit(**settings: Any) -> nn.Module:
    """A transformer of timm's; registers, dropped paths and sizes of views as it is told."""
    transformer = importlib.import_module("timm.models.vision_transformer").VisionTransformer
    shape = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": WIDTH, "num_classes": 0}
    made: nn.Module = transformer(
        **{**shape, "depth": 2, "num_heads": 2, "drop_path_rate": 0.1, **settings}
    )
    return made


def twice(network: nn.Module) -> Any:
    return spt().TeacherStudentWrapper(network, base_ema_coefficient=0.9)


def composed(name: str, **parts: Any) -> Any:
    forward = getattr(importlib.import_module("stable_pretraining.forward"), name)
    return spt().Module(forward=forward, optim={"optimizer": {"type": "SGD", "lr": 0.1}}, **parts)


@listed(FORWARDS)
def simclr() -> Any:
    loss = spt().losses.NTXEntLoss(temperature=0.5)
    return composed("simclr", backbone=conv(), projector=nn.Linear(8, 8), simclr_loss=loss)


@listed(FORWARDS)
def vicreg() -> Any:
    loss = spt().losses.VICRegLoss()
    return composed("vicreg", backbone=conv(), projector=nn.Linear(8, 8), vicreg_loss=loss)


@listed(FORWARDS)
def barlow_twins() -> Any:
    loss = spt().losses.BarlowTwinsLoss(lambd=5e-3)
    return composed("barlow_twins", backbone=conv(), projector=nn.Linear(8, 8), barlow_loss=loss)


@listed(FORWARDS, momentum=HEADS)
def byol() -> Any:
    networks = {"backbone": twice(conv()), "projector": twice(nn.Linear(8, 8))}
    loss = spt().losses.BYOLLoss()
    return composed("byol", **networks, predictor=nn.Linear(8, 8), byol_loss=loss)


@listed(FORWARDS, holds=True)
def swav() -> Any:
    return composed(
        "swav",
        backbone=conv(),
        projector=nn.Linear(8, 8),
        prototypes=nn.Linear(8, 12, bias=False),
        swav_loss=spt().losses.SwAVLoss(temperature=0.5, epsilon=0.5),
    )


@listed(FORWARDS, momentum=HEADS, sizes=(8, 8, 6), batch="crops")
def dino() -> Any:
    """Two global crops and a smaller one."""

    class Sized(nn.Module):
        """Takes views of any size, as Hugging Face's transformers do when they are told."""

        def __init__(self) -> None:
            super().__init__()
            self.net = conv()

        def forward(self, images: Any, interpolate_pos_encoding: bool = False) -> Any:
            return self.net(images)

    loss = spt().losses.DINOv1Loss(temperature_student=0.5)
    networks = {"backbone": twice(Sized()), "projector": twice(nn.Linear(8, 12))}
    return composed("dino", **networks, dino_loss=loss, temperature_teacher=0.4)


@listed(FORWARDS)
def nnclr() -> Any:
    """Its queue is one of a trainer's callbacks, which fills it as training goes on."""
    queues = importlib.import_module("stable_pretraining.callbacks.queue")
    loss = spt().losses.NTXEntLoss(temperature=0.5)
    networks = {"projector": nn.Linear(8, 8), "predictor": nn.Linear(8, 8)}
    sizes = {"support_set_size": 32, "projection_dim": 8}
    module = composed("nnclr", backbone=conv(), **networks, nnclr_loss=loss, **sizes)
    trainer = importlib.import_module("lightning").Trainer(logger=False, accelerator="cpu")
    module.trainer = trainer
    queue = queues.find_or_create_queue_callback(trainer, "nnclr_support_set", 32, 8)
    queue.setup(trainer, module, "fit")
    queues.OnlineQueue._shared_queues[queue.key].append(torch.randn(16, 8))
    module._nnclr_queue_callback = queue  # where its first training step keeps it
    module.trainer = None
    return module


@listed(FORWARDS, momentum=(*HEADS, "patch_projector.teacher"), sizes=(8, 8, 6), batch="crops")
def dinov2() -> Any:
    """On a transformer of Hugging Face's, which hides patches by itself."""
    transformers = importlib.import_module("transformers")
    shape = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.ViTConfig(
        **shape, intermediate_size=WIDTH, image_size=SIDE, patch_size=PATCH
    )
    encoder = transformers.ViTModel(config, add_pooling_layer=False, use_mask_token=True)
    networks = {name: twice(nn.Linear(WIDTH, 12)) for name in ("projector", "patch_projector")}
    loss = spt().losses.DINOv2Loss()
    return composed(
        "dinov2", backbone=twice(encoder), **networks, dinov2_loss=loss, temperature_teacher=0.4
    )


def method(name: str, call: Callable[[Any, list[Any]], Any], *arguments: Any, **named: Any) -> Any:
    """Make a class of `methods/` a module that is trained by its own loss on the views."""
    cls = getattr(importlib.import_module("stable_pretraining.methods"), name)
    module = cls(*arguments, **named)

    def forward(self: Any, batch: Any, stage: str) -> Any:
        given = batch.get("views", [batch])
        return {"loss": call(MethodType(cls.forward, self), [v["image"] for v in given]).loss}

    module.forward = MethodType(forward, module)
    module.optim = {"optimizer": {"type": "SGD", "lr": 0.1}}
    return module


def one(forward: Any, views: list[Any]) -> Any:
    return forward(views[0])


def pair(forward: Any, views: list[Any]) -> Any:
    return forward(*views)


def crops(forward: Any, views: list[Any]) -> Any:
    return forward(global_views=views[:2], local_views=views[2:] or None)


PROTOTYPES = {"projector_hidden_dim": 16, "projector_bottleneck_dim": 8}


@listed(METHODS, sizes=(SIDE,))
def MAE() -> Any:
    small = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
    return method("MAE", one, vit(), mask_ratio=0.5, norm_pix_loss=False, **small)


@listed(METHODS, sizes=(SIDE,), momentum=("encoder.teacher",))
def IJEPA() -> Any:
    scales = {"target_scale": (0.2, 0.3), "num_targets": 2}
    small = {"predictor_embed_dim": 64, "predictor_depth": 1}
    return method("IJEPA", one, vit(class_token=False, global_pool="avg"), **small, **scales)


@listed(METHODS, sizes=(SIDE,))
def SimMIM() -> Any:
    return method("SimMIM", one, vit(), patch_size=PATCH, image_size=SIDE, mask_ratio=0.5)


@listed(METHODS, sizes=(SIDE,), momentum=("encoder.teacher",))
def Data2Vec() -> Any:
    return method("Data2Vec", one, vit(), top_k_blocks=2, mask_ratio=0.5, image_size=SIDE)


@listed(METHODS, sizes=(SIDE,))
def iGPT() -> Any:
    return method("iGPT", one, vit(), patch_size=PATCH, image_size=SIDE)


@listed(METHODS, sizes=(SIDE,))
def CrossMAE() -> Any:
    small = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
    ratios = {"mask_ratio": 0.5, "kept_mask_ratio": 0.5, "norm_pix_loss": False}
    return method("CrossMAE", one, vit(), image_size=SIDE, **small, **ratios)


@listed(METHODS)
def SimCLR() -> Any:
    return method("SimCLR", pair, conv(), projector_dims=(16, 8))


@listed(METHODS)
def VICReg() -> Any:
    return method("VICReg", pair, conv(), projector_dims=(16, 8))


@listed(METHODS)
def BarlowTwins() -> Any:
    return method("BarlowTwins", pair, conv(), projector_dims=(16, 8))


@listed(METHODS, momentum=HEADS)
def BYOL() -> Any:
    return method("BYOL", pair, conv(), projector_dims=(16, 8), predictor_dims=(16, 8))


@listed(METHODS, momentum=HEADS)
def MoCov3() -> Any:
    return method("MoCov3", pair, conv(), projector_dims=(16, 8), predictor_hidden_dim=16)


@listed(METHODS, holds=True)
def SimSiam() -> Any:
    return method("SimSiam", pair, conv(), projector_dim=8, predictor_hidden_dim=8)


@listed(METHODS, holds=True, sizes=(8, 8, 6))
def SwAV() -> Any:
    small = {"projector_dims": (16, 8), "n_prototypes": 12}
    return method("SwAV", crops, conv(), **small, temperature=0.5, epsilon=0.5)


@listed(METHODS, momentum=HEADS, sizes=(8, 8, 6))
def DINO() -> Any:
    """Crops of two sizes on a transformer with registers and dropped paths."""
    encoder = vit(dynamic_img_size=True, reg_tokens=2)
    return method("DINO", crops, encoder, n_prototypes=12, **PROTOTYPES)


def global_views(forward: Any, views: list[Any]) -> Any:
    return forward(global_views=views)


HIDING = {"n_cls_prototypes": 12, "n_patch_prototypes": 10, "image_size": SIDE, **PROTOTYPES}
TWO_HEADS = ("backbone.teacher", "cls_head.teacher", "patch_head.teacher")


@listed(METHODS, momentum=TWO_HEADS)
def iBOT() -> Any:
    return method("iBOT", global_views, vit(), **HIDING, temperature_teacher=0.4)


@listed(METHODS, momentum=TWO_HEADS, sizes=(8, 8, 4))
def DINOv2() -> Any:
    """Crops of two sizes."""
    encoder = vit(dynamic_img_size=True)
    return method("DINOv2", crops, encoder, **HIDING, temperature_teacher=0.4)
