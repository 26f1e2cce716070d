"""Runs of solo-learn read back from the folder of their checkpoints: network, pipeline, images.

solo-learn leaves `args.json`, the parsed configuration, beside its checkpoints; what it describes
is built by solo-learn itself, which has to be importable.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from cp_plugin.config.settings import UserError
from cp_plugin.data import load
from cp_plugin.engine.solo_backbones import PREFIX, add_timm_backbone
from cp_plugin.hosts.solo_learn import SoloHost
from cp_plugin.util.internals import backbones
from cp_plugin.util.run_files import SOLO_ARGS_FILE

ENCODER = "backbone."


class SoloRun:
    """A run of solo-learn, see `cp_plugin.apps.runs.Run`."""

    def __init__(self, folder: Path) -> None:
        """Remember the folder of the checkpoints."""
        self.folder = folder

    @staticmethod
    def left_in(folder: Path) -> bool:
        """Tell whether a folder is that of a run of solo-learn."""
        return (folder / SOLO_ARGS_FILE).is_file()

    def configuration(self) -> DictConfig:
        """Return the parsed configuration of the run.

        Raises:
            UserError: the file is damaged.
        """
        try:
            found = json.loads((self.folder / SOLO_ARGS_FILE).read_text(encoding="utf8"))
        except ValueError as error:
            raise UserError(f"{self.folder / SOLO_ARGS_FILE} is damaged ({error}).") from error
        cfg = OmegaConf.create(found)
        assert isinstance(cfg, DictConfig)
        return cfg

    def trained(self, checkpoint: Path) -> tuple[SoloHost, Any, DictConfig]:
        """Return the trained encoder behind the host's protocol, on the CPU, with its surroundings.

        Args:
            checkpoint: a `.ckpt` file of solo-learn beside its `args.json`, or their folder.

        Returns:
            The host, solo-learn's own augmentation pipeline, and the parsed configuration.

        Raises:
            UserError: a file is missing or damaged, or solo-learn cannot be imported.
        """
        path = _newest(checkpoint) if checkpoint.is_dir() else checkpoint
        if not path.is_file():
            raise UserError(f"there is no checkpoint at {path}.")
        cfg = self.configuration()
        solo = _solo_learn(path)
        try:
            weights = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
            module = _base_method(solo.methods.base.BaseMethod, cfg)
            own = {key: value for key, value in weights.items() if key.startswith(ENCODER)}
            module.backbone.load_state_dict({key[len(ENCODER) :]: own[key] for key in own})
        except Exception as error:  # torch.load has no error class of its own for damaged files
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"{path} is not the checkpoint of the configuration in {SOLO_ARGS_FILE} beside it, "
                f"or it is damaged ({reason})."
            ) from error
        return SoloHost(module.eval(), lambda sample, _: sample), _pipeline(solo, cfg), cfg

    def training_images(self, cfg: DictConfig) -> Any:
        """Return the training images of a run, those of its `data.fraction`.

        Args:
            cfg: its parsed configuration.

        Raises:
            UserError: they are not where they were.
        """
        data = cfg.data
        if data.format == "h5" or data.get("fraction", -1) > 0:
            solo = _solo_learn(SOLO_ARGS_FILE)
            return solo.data.pretrain_dataloader.prepare_datasets(
                data.dataset,
                None,
                train_data_path=data.train_path,
                data_format="h5" if data.format == "h5" else "image_folder",
                no_labels=data.no_labels,
                download=False,
                data_fraction=data.get("fraction", -1),
            )
        return load(data.dataset, data.train_path, None, data.no_labels)[0]


def _newest(folder: Path) -> Path:
    found = sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"there is no checkpoint (.ckpt) of solo-learn in {folder}.")
    return found[-1]


def _base_method(base: Any, cfg: DictConfig) -> Any:
    name = str(cfg.backbone.name)
    if not name.startswith(PREFIX):
        return base(cfg)
    size = max(int(node.crop_size) for node in cfg.augmentations)
    undo = add_timm_backbone(backbones(base), name, size)
    try:
        return base(cfg)
    finally:
        undo()


def _pipeline(solo: Any, cfg: DictConfig) -> Any:
    """Return the pipeline as solo-learn's main_pretrain.py makes it."""
    made = solo.data.pretrain_dataloader
    return made.FullTransformPipeline(
        [
            made.NCropAugmentation(
                made.build_transform_pipeline(cfg.data.dataset, node), node.num_crops
            )
            for node in cfg.augmentations
        ]
    )


def _solo_learn(path: object) -> Any:
    try:
        import solo
        import solo.data.pretrain_dataloader
        import solo.methods.base
    except ImportError as error:
        raise UserError(
            f"{path} belongs to a run of solo-learn, which cannot be imported here ({error}); put "
            "its checkout on PYTHONPATH (`cp-plugin doctor` says what else is missing)."
        ) from error
    return solo
