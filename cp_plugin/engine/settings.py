"""solo-learn's configuration schema: its defaults, its checks, its scaled learning rate."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from cp_plugin.config.settings import UserError

MOMENTUM_METHODS = ("mocov2plus", "byol", "dino")
LABELLED_METHODS = ("supervised", "supcon")
"""Their loss reads labels, by design: victims, never surrogates of contrastive poisoning."""
METHOD_KEYS = {
    "simclr": ("proj_hidden_dim", "proj_output_dim", "temperature"),
    "mocov2plus": ("proj_hidden_dim", "proj_output_dim", "temperature"),
    "byol": ("proj_hidden_dim", "proj_output_dim", "pred_hidden_dim"),
    "simsiam": ("proj_hidden_dim", "proj_output_dim", "pred_hidden_dim"),
    "barlow_twins": ("proj_hidden_dim", "proj_output_dim"),
    "vicreg": ("proj_hidden_dim", "proj_output_dim"),
    "dino": ("proj_hidden_dim", "proj_output_dim", "num_prototypes"),
    "supervised": (),
    "supcon": ("proj_hidden_dim", "proj_output_dim", "temperature"),
}
"""The `method_kwargs` that a method cannot do without."""
REQUIRED = (
    "method",
    "backbone.name",
    "data.dataset",
    "optimizer.name",
    "optimizer.batch_size",
    "optimizer.lr",
    "optimizer.weight_decay",
    "scheduler.name",
    "augmentations",
    "max_epochs",
)
SCHEDULERS = ("warmup_cosine", "step", "none")
INTERVALS = ("step", "epoch")
OPTIMIZER_DEFAULTS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9},
    "lars": {"momentum": 0.9, "eta": 1e-3, "clip_lr": False, "exclude_bias_n_norm": False},
    "adam": {},
    "adamw": {"betas": [0.9, 0.999]},
}
DEFAULTS: dict[str, Any] = {
    "seed": 5,
    "devices": 1,
    "num_nodes": 1,
    "accelerator": "auto",
    "strategy": "auto",
    "precision": "32-true",
    "sync_batchnorm": False,
    "accumulate_grad_batches": 1,
    "resume_from_checkpoint": None,
    "backbone": {"kwargs": {}, "whiten": None},
    "method_kwargs": {},
    "data": {
        "train_path": None,
        "val_path": None,
        "format": "image_folder",
        "no_labels": False,
        "fraction": -1,
        "num_workers": 4,
        "cache": "auto",
    },
    "optimizer": {"kwargs": {}, "exclude_bias_n_norm_wd": False, "lr_is_scaled": False},
    "scheduler": {
        "lr_decay_steps": None,
        "min_lr": 0.0,
        "warmup_start_lr": 3e-5,
        "warmup_epochs": 10,
        "interval": "step",
    },
    "checkpoint": {"enabled": False, "dir": "trained_models", "frequency": 1, "keep_prev": False},
    "auto_resume": {"enabled": False, "max_hours": 36},
    "performance": {"disable_channel_last": False},
}
MOMENTUM_DEFAULTS = {"base_tau": 0.99, "final_tau": 1.0}
QUEUE_SIZE = 65536
"""Keys that MoCo remembers unless `method_kwargs.queue_size` says otherwise."""


def complete(cfg: DictConfig) -> DictConfig:
    """Fill in solo-learn's defaults, check, and scale the learning rate to the batch.

    The learning rate is given for 256 images a step: it is multiplied by the images that all
    devices take a step, over 256, and by the batches that gradients are accumulated over. That
    `optimizer.lr_is_scaled` is then true keeps a completed configuration from being scaled again.
    Keys that are not of training (`wandb`, `logger`), and those that the engine has no use for
    (`classifier_lr`, `knn_eval`, `dali`, …), stay.

    Args:
        cfg: a configuration in solo-learn's schema; it is not changed.

    Returns:
        A completed copy, not in struct mode.

    Raises:
        UserError: a required key is missing, or a value is unknown or out of range.
    """
    given = copy.deepcopy(cfg)
    OmegaConf.set_struct(given, False)
    for key in REQUIRED:
        _require(given, key)
    _one_of("method", given.method, METHOD_KEYS)
    for key in METHOD_KEYS[given.method]:
        _require(given, f"method_kwargs.{key}")
    _one_of("optimizer.name", given.optimizer.name, OPTIMIZER_DEFAULTS)
    _one_of("scheduler.name", given.scheduler.name, SCHEDULERS)
    defaults = _defaults(given.method, given.optimizer.name)
    done = OmegaConf.merge(defaults, _without_empty(given, defaults))
    assert isinstance(done, DictConfig)
    done.setdefault("name", f"{done.method}-{done.data.dataset}")
    _check_values(done)
    _check_views(done)
    _scale_learning_rate(done)
    return done


def for_surrogate(cfg: DictConfig) -> DictConfig:
    """Return a completed configuration with the surrogate's own warm-up, where it names one.

    `scheduler.surrogate_warmup_epochs` stands for `scheduler.warmup_epochs` where a poison is
    crafted, so that one configuration serves a surrogate and its victims.

    Raises:
        UserError: it is no number of epochs.
    """
    epochs = cfg.scheduler.get("surrogate_warmup_epochs")
    if epochs is None:
        return cfg
    if not isinstance(epochs, (int, float)) or epochs < 0:
        raise UserError(
            f"scheduler.surrogate_warmup_epochs must be a number of epochs, got {epochs!r}; give 0 "
            "or more, or null for scheduler.warmup_epochs."
        )
    changed = cfg.copy()
    changed.scheduler.warmup_epochs = epochs
    return changed


def device_count(devices: Any, accelerator: str = "auto") -> int:
    """Return how many devices Lightning will train on.

    Args:
        devices: a number, a list of indices, or text as Lightning takes it (`"2"`, `"0,1"`,
            `"auto"`, -1 for all).
        accelerator: `cpu`, `gpu`, `auto`, …

    Raises:
        UserError: it is none of these.
    """
    if isinstance(devices, str) and "," in devices:
        return len([part for part in devices.split(",") if part.strip()])
    if not isinstance(devices, (str, int)):
        return len(devices)
    if devices in ("auto", "-1", -1):
        return 1 if accelerator == "cpu" else max(1, torch.cuda.device_count())
    try:
        number = int(devices)
    except ValueError:
        number = 0
    if number < 1:
        raise UserError(
            f"devices must be a number, a list of indices or auto, got {devices!r}; use devices=1."
        )
    return number


def _defaults(method: str, optimizer: str) -> DictConfig:
    defaults = copy.deepcopy(DEFAULTS)
    defaults["optimizer"]["kwargs"] = OPTIMIZER_DEFAULTS[optimizer]
    if method in MOMENTUM_METHODS:
        defaults["momentum"] = MOMENTUM_DEFAULTS
    if method == "mocov2plus":
        defaults["method_kwargs"] = {"queue_size": QUEUE_SIZE}
    return OmegaConf.create(defaults)


def _without_empty(cfg: DictConfig, defaults: DictConfig) -> DictConfig:
    """Drop keys that are null, or solo-learn's text "None", where there is a default for them."""
    for key, default in defaults.items():
        value = OmegaConf.select(cfg, str(key))
        if value is None or value == "None":
            cfg.pop(key, None)
        elif isinstance(default, DictConfig) and isinstance(value, DictConfig):
            _without_empty(value, default)
    return cfg


def _require(cfg: DictConfig, key: str) -> None:
    if OmegaConf.select(cfg, key, default=None) is None:
        raise UserError(f"the configuration has no {key}; add {key}=…")


def _one_of(key: str, value: Any, known: Iterable[str]) -> None:
    names = list(known)
    if value in names:
        return
    near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}."
    raise UserError(f"{key}={value} is unknown to the embedded engine; {hint}")


def _check_values(cfg: DictConfig) -> None:
    _one_of("scheduler.interval", cfg.scheduler.interval, INTERVALS)
    for key in ("optimizer.batch_size", "accumulate_grad_batches", "max_epochs"):
        value = OmegaConf.select(cfg, key)
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{key} must be a whole number of at least 1, got {value!r}.")
    for key in ("optimizer.lr", "method_kwargs.temperature"):
        value = OmegaConf.select(cfg, key, default=1)
        if not isinstance(value, (int, float)) or value <= 0:
            raise UserError(f"{key} must be a positive number, got {value!r}.")
    if cfg.scheduler.name == "step" and not cfg.scheduler.lr_decay_steps:
        raise UserError("scheduler.name=step needs scheduler.lr_decay_steps, a list of epochs.")
    if cfg.method in MOMENTUM_METHODS and not (
        0 <= cfg.momentum.base_tau <= cfg.momentum.final_tau <= 1
    ):
        raise UserError(
            "expected 0 <= momentum.base_tau <= momentum.final_tau <= 1, got "
            f"{cfg.momentum.base_tau} and {cfg.momentum.final_tau}."
        )


def _check_views(cfg: DictConfig) -> None:
    """Views are of one size, and there are two but for `supervised`, which compares none."""
    views = [
        (node.get("num_crops"), node.get("crop_size"))
        for node in cfg.augmentations
        if isinstance(node, DictConfig)
    ]
    for crops, size in views:
        if not isinstance(crops, int) or not isinstance(size, int) or crops < 1 or size < 1:
            raise UserError(
                "every node of augmentations needs num_crops and crop_size, whole numbers of at "
                f"least 1; got num_crops={crops}, crop_size={size}."
            )
    sizes = {size for _, size in views}
    total = sum(crops for crops, _ in views)
    compares = cfg.method != "supervised"
    if (compares and total != 2) or len(sizes) != 1:
        wanted = "two views" if compares else "views"
        raise UserError(
            f"{cfg.method} needs {wanted} of one size, but augmentations ask for {total} of "
            f"{sorted(sizes)} pixels; set num_crops and crop_size."
        )


def _scale_learning_rate(cfg: DictConfig) -> None:
    if cfg.optimizer.lr_is_scaled:
        return
    devices = device_count(cfg.devices, cfg.accelerator) * cfg.num_nodes
    scale = cfg.optimizer.batch_size * devices / 256
    cfg.optimizer.lr *= scale * cfg.accumulate_grad_batches
    for key in ("min_lr", "warmup_start_lr"):
        cfg.scheduler[key] *= cfg.accumulate_grad_batches
    if isinstance(cfg.optimizer.get("classifier_lr"), (int, float)):
        cfg.optimizer.classifier_lr *= scale * cfg.accumulate_grad_batches
    cfg.optimizer.lr_is_scaled = True


def plain(node: DictConfig) -> dict[str, Any]:
    """Return a node as an ordinary dictionary, references resolved."""
    container = OmegaConf.to_container(node, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}
