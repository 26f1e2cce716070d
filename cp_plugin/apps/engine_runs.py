"""Runs of the embedded engine read back: network, pipeline, images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from cp_plugin.config.settings import UserError
from cp_plugin.config.yaml_files import load_yaml
from cp_plugin.data import load
from cp_plugin.engine.methods import METHODS
from cp_plugin.engine.pipeline import build_pipeline
from cp_plugin.hosts.lightning import LightningHost
from cp_plugin.util.run_files import CHECKPOINT, CONFIG_FILE


class EngineRun:
    """A run of the embedded engine, see `cp_plugin.apps.runs.Run`."""

    def __init__(self, folder: Path) -> None:
        """Remember the run's folder."""
        self.folder = folder

    def configuration(self) -> DictConfig | None:
        """Return what lies in the run's `config.yaml`, if there is one."""
        path = self.folder / CONFIG_FILE
        if not path.is_file():
            return None
        cfg = load_yaml(path)
        assert isinstance(cfg, DictConfig)
        return cfg

    def trained(self, checkpoint: Path) -> tuple[LightningHost, Any, DictConfig]:
        """Return encoder, augmentation pipeline and configuration of a checkpoint."""
        module, cfg = load_run(checkpoint)
        return LightningHost(module, lambda sample, _: sample, ()), build_pipeline(cfg), cfg

    def training_images(self, cfg: DictConfig) -> Any:
        """Return the training images of a configuration."""
        return load(cfg.data.dataset, cfg.data.train_path, None, cfg.data.no_labels)[0]


def load_run(checkpoint: Path) -> tuple[Any, DictConfig]:
    """Return the trained module, on the CPU, and its configuration.

    Args:
        checkpoint: a `.ckpt` file of the embedded engine, or the folder of a run.

    Raises:
        UserError: it is missing, damaged, or was not made by the embedded engine.
    """
    path = checkpoint / f"{CHECKPOINT}.ckpt" if checkpoint.is_dir() else checkpoint
    if not path.is_file():
        raise UserError(f"there is no checkpoint at {path}.")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        cfg = OmegaConf.create(saved["hyper_parameters"]["cfg"])
        module = METHODS[cfg.method](cfg, saved["hyper_parameters"]["image_size"])
        module.load_state_dict(saved["state_dict"])
    except Exception as error:  # torch.load has no error class of its own for damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} is no checkpoint of the embedded engine, or it is damaged ({reason})."
        ) from error
    assert isinstance(cfg, DictConfig)
    return module.eval(), cfg
