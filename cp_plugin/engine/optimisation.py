"""solo-learn's optimisers and learning-rate schedules, from the parts that libraries have."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any

import torch
from lightly.utils.scheduler import CosineWarmupScheduler
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.types import LRSchedulerConfigType
from omegaconf import DictConfig
from timm.optim.lars import Lars
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import MultiStepLR

from cp_plugin.config.settings import UserError
from cp_plugin.engine.settings import plain

_TORCH_OPTIMIZERS: dict[str, type[Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
_log = logging.getLogger(__name__)


def build_optimizer(parameters: Iterable[nn.Parameter], cfg: DictConfig) -> Optimizer:
    """Build `optimizer.name` with `optimizer.kwargs`.

    `optimizer.exclude_bias_n_norm_wd` spares biases and norm layers weight decay; LARS'
    `exclude_bias_n_norm` spares them its layer-wise rate as well (You et al., 2017).

    Args:
        parameters: what to train.
        cfg: a completed configuration.

    Raises:
        UserError: the optimiser does not take these arguments.
    """
    settings = cfg.optimizer
    kwargs = plain(settings.kwargs)
    optimizer: type[Optimizer] = _TORCH_OPTIMIZERS.get(settings.name, Lars)
    spared: dict[str, Any] = {"weight_decay": 0.0} if settings.exclude_bias_n_norm_wd else {}
    if optimizer is Lars:
        kwargs, spared = _lars_arguments(kwargs, spared)
    shared = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    try:
        return optimizer(_groups(parameters, spared), **shared, **kwargs)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"optimizer {settings.name} cannot be built with optimizer.kwargs {kwargs}: {error}"
        ) from error


def build_scheduler(
    optimizer: Optimizer, cfg: DictConfig, trainer: Trainer
) -> LRSchedulerConfigType | None:
    """Build `scheduler.name`; a cosine ends at `scheduler.min_lr` with the trainer's last step.

    Args:
        optimizer: whose rate is scheduled.
        cfg: a completed configuration.
        trainer: its steps and epochs count, whatever the configuration says.

    Returns:
        The schedule as Lightning takes it, or None for `none`.
    """
    settings = cfg.scheduler
    if settings.name == "none":
        return None
    if settings.name == "step":
        return {"scheduler": MultiStepLR(optimizer, list(settings.lr_decay_steps))}
    steps = trainer.estimated_stepping_batches
    if not 0 < steps < math.inf:
        raise UserError(
            "scheduler.name=warmup_cosine has to know where training ends, but the trainer has no "
            "end; set max_epochs, or scheduler.name=none."
        )
    epoch = max(1, math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches))
    by_step = settings.interval == "step"
    length = int(steps) if by_step else math.ceil(steps / epoch)
    warmup = round(settings.warmup_epochs * epoch) if by_step else round(settings.warmup_epochs)
    if warmup > length:
        _log.info(
            "scheduler.warmup_epochs=%s is longer than training: the full learning rate is never "
            "reached.",
            settings.warmup_epochs,
        )
    rate = cfg.optimizer.lr
    cosine = CosineWarmupScheduler(
        optimizer,
        warmup_epochs=warmup,
        max_epochs=max(warmup, length),
        warmup_start_value=settings.warmup_start_lr / rate,
        end_value=settings.min_lr / rate,
    )
    return {"scheduler": cosine, "interval": settings.interval}


def _lars_arguments(
    kwargs: dict[str, Any], spared: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Translate solo-learn's words for LARS into timm's."""
    arguments = dict(kwargs)
    if arguments.pop("exclude_bias_n_norm"):
        spared = {"weight_decay": 0.0, "always_adapt": False}
    arguments["trust_coeff"] = arguments.pop("eta")
    arguments["trust_clip"] = arguments.pop("clip_lr")
    return {"always_adapt": True, **arguments}, spared


def _groups(parameters: Iterable[nn.Parameter], spared: dict[str, Any]) -> list[dict[str, Any]]:
    """Put biases and norm layers, which have one dimension, into a group of their own."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not spared:
        return [{"params": trained}]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1]},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], **spared},
    ]
    return [group for group in groups if group["params"]]
