"""What the embedded methods share: backbone, optimiser, EMA of the momentum branch."""

from __future__ import annotations

from typing import Any

import torch
from lightly.models.utils import update_momentum
from lightly.utils.scheduler import cosine_schedule
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from cp_plugin.defences.privacy import with_group_norm
from cp_plugin.engine.backbones import feature_width, surrogate
from cp_plugin.engine.optimisation import build_optimizer, build_scheduler
from cp_plugin.engine.settings import plain


class Method(LightningModule):
    """A self-supervised method on a timm backbone.

    Batches are `(views, target)` or `(views, target, filename)`, views float (B, C, H, W), as
    Lightly's data sets give them.
    """

    framework_name = "cp-plugin"
    """What poison files call the embedded engine."""

    def __init__(self, cfg: DictConfig | dict[str, Any], image_size: int) -> None:
        """Build the backbone.

        Args:
            cfg: a configuration from `complete`, or the plain dictionary that a checkpoint holds.
            image_size: side of the views in pixels, which decides about the stem.

        Raises:
            UserError: the backbone does not exist or cannot be built.
        """
        super().__init__()
        self.cfg = cfg if isinstance(cfg, DictConfig) else OmegaConf.create(cfg)
        self.save_hyperparameters({"cfg": plain(self.cfg), "image_size": image_size})
        settings = self.cfg.backbone
        arguments = {"whiten": settings.get("whiten"), **plain(settings.kwargs)}
        self.backbone = surrogate(settings.name, image_size, **arguments)
        if OmegaConf.select(self.cfg, "defence.name") == "dp_sgd":
            with_group_norm(self.backbone)  # gradients of single images have their own layout
        elif not self.cfg.performance.disable_channel_last:
            self.backbone.to(memory_format=torch.channels_last)
        self.features = feature_width(self.backbone)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimiser, and a schedule that ends where training ends."""
        optimizer = build_optimizer(self.parameters(), self.cfg)
        schedule = build_scheduler(optimizer, self.cfg, self.trainer)
        if schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the loss; `training_step` itself logs nothing, so that it can be called freely."""
        loss = outputs["loss"] * self.trainer.accumulate_grad_batches
        self.log("train_loss", loss, prog_bar=True, on_step=True, on_epoch=False)

    def contiguous(self, views: list[Tensor]) -> list[Tensor]:
        """Return the views in the memory format of the backbone."""
        if self.cfg.performance.disable_channel_last:
            return views
        return [view.contiguous(memory_format=torch.channels_last) for view in views]


class MomentumMethod(Method):
    """A method whose momentum branch is an exponential moving average of the trained one.

    tau rises from `momentum.base_tau` to `momentum.final_tau` on a cosine over all optimiser steps
    (Grill et al., NeurIPS 2020, section 3.2).
    """

    backbone_momentum: nn.Module
    projection_head: nn.Module
    projection_head_momentum: nn.Module
    schedule_steps: int | None = None
    """Optimiser steps after which the rise of tau begins anew; None: never."""
    _updates = 0
    """Optimiser steps whose result the momentum branch has seen."""

    def tau(self, step: int) -> float:
        """Return the part of the momentum branch that stays after optimiser step `step`."""
        settings = self.cfg.momentum
        steps = self.schedule_steps or int(self.trainer.estimated_stepping_batches)
        # One more than there are steps, so that the cosine is divided by their number.
        tau: float = cosine_schedule(
            (step - 1) % steps, steps + 1, settings.base_tau, settings.final_tau
        )
        return tau

    def on_train_start(self) -> None:
        """Go on from the step that training goes on from."""
        self._updates = self.trainer.global_step

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Update the momentum branch where the optimiser has made a step."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        if self.trainer.global_step == self._updates:
            return
        self._updates = self.trainer.global_step
        self.log("tau", self.move_momentum())

    def move_momentum(self) -> float:
        """Move the momentum branch with the tau of the last optimiser step, and return that."""
        tau = self.tau(max(1, self._updates))
        update_momentum(self.backbone, self.backbone_momentum, m=tau)
        update_momentum(self.projection_head, self.projection_head_momentum, m=tau)
        return tau
