"""solo-learn's `main_pretrain.py` and `main_linear.py` with a poison, defence or monitor selected.

Hydra gives `main` a configuration that no callback can reach, so what `main` calls first, its
`parse_cfg`, is wrapped for the time of the job, and so is `prepare_dataloader`, whose images are
looked at before anything is written; nothing else of solo-learn is exchanged.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cp_plugin.attack.poison_file import Poison
from cp_plugin.callbacks import CraftPoison
from cp_plugin.callbacks.base import Callback
from cp_plugin.callbacks.selected import selected_callbacks
from cp_plugin.config.baselines import SyntheticConfig, TueConfig
from cp_plugin.config.selection import Selection
from cp_plugin.config.settings import EPOCH, CraftConfig, InjectConfig, UserError
from cp_plugin.data.datasets import SIDES
from cp_plugin.engine.solo_backbones import PREFIX, add_timm_backbone
from cp_plugin.hosts.solo_learn import check_served
from cp_plugin.integrations.job import Job
from cp_plugin.integrations.solo_checks import checked
from cp_plugin.util.internals import backbones
from cp_plugin.util.patching import patches
from cp_plugin.util.run_files import POISON_FILE, SOLO_ARGS_FILE

log = logging.getLogger("cp_plugin")

PARSERS = {"solo.args.pretrain": "pretrain", "solo.args.linear": "linear"}
LOADER = "prepare_dataloader"
NOT_IN_NAME = (
    *("auto_resume", "checkpoint", "resume_from_checkpoint", "wandb", "debug_augmentations"),
    *("accelerator", "devices", "num_nodes", "strategy", "precision", "sync_batchnorm", "dali"),
)
"""Settings that do not make another run: where it is kept, what it is computed on."""
MIXTURES = ("mixup", "cutmix")
"""Defences that `main_linear.py` has of its own, by these names."""
DEFAULT_CROP = 224


def wrap_parser(main: Callable[..., Any], job: Job) -> bool:
    """Wrap the `parse_cfg` that an application of solo-learn calls first.

    Args:
        main: the application's task function.
        job: gets the callbacks once the configuration is read, and what undoes the wrapping.

    Returns:
        Whether the application is one of solo-learn's.
    """
    names = main.__globals__
    for name, value in list(names.items()):
        kind = PARSERS.get(getattr(value, "__module__", ""))
        if kind is not None and getattr(value, "__name__", "") == "parse_cfg":
            job.exchanged.entry(names, name, _wrapped(value, kind, job, names))
            return True
    return False


def _wrapped(
    parse: Callable[[Any], Any], kind: str, job: Job, names: dict[str, Any]
) -> Callable[[Any], Any]:
    @functools.wraps(parse)
    def parse_cfg(cfg: DictConfig) -> Any:
        OmegaConf.set_struct(cfg, False)
        selection = Selection.read(cfg)
        check = _check_pretrain if kind == "pretrain" else _check_linear
        check(cfg, selection)
        chosen = selection.poison
        poison = Poison.load(chosen.path) if isinstance(chosen, InjectConfig) else None
        _read_folders(cfg)
        _use_timm(cfg, kind, job)
        for patch in patches():
            if patch.is_needed():
                job.exchanged.callback(patch.apply())
        _end_with_rounds(cfg, selection)
        cfg.name = f"{cfg.name}-{selection.tag(_of_run(cfg))}"
        parsed = parse(cfg)
        folder = _own_folder(parsed)
        _check_folder(selection, folder)
        defended = selection if kind == "pretrain" else replace(selection, defence=None)
        job.callbacks = functools.partial(build_callbacks, parsed, defended, folder, poison)
        if LOADER in names:
            prepare = checked(names[LOADER], selection, poison)
            job.exchanged.entry(names, LOADER, prepare)
        return parsed

    return parse_cfg


def _check_pretrain(cfg: DictConfig, selection: Selection) -> None:
    """Refuse before anything is built what could not be carried out.

    Raises:
        UserError: method, data or poison do not fit.
    """
    data, poison = cfg.data, selection.poison
    unlabelled = bool(data.get("no_labels", False))
    if selection.needs_classifier:
        raise UserError(
            f"poison={selection.name} is made on a supervised surrogate, which solo-learn has not; "
            f"craft it with `cp-plugin pretrain --config-name supervised +poison={selection.name}` "
            "and use it here with +poison=inject."
        )
    selection.check_method(str(cfg.method))
    if selection.crafts:
        check_served(cfg.method)
    if unlabelled and isinstance(poison, (SyntheticConfig, TueConfig)):
        raise UserError(
            f"poison={selection.name} tells classes apart and data.no_labels=True leaves no "
            "labels; use labelled data, +poison=cp or +poison=random."
        )
    if unlabelled and getattr(poison, "granularity", None) == "class":
        raise UserError(
            f"poison={selection.name} has one delta a class and data.no_labels=True leaves no "
            "labels; use labelled data or poison.granularity=sample."
        )
    if selection.monitor is not None:
        without_tests = data.dataset not in SIDES and data.get("val_path") is None
        if unlabelled or without_tests:
            raise UserError(
                "monitor=knn needs labelled images to search among and to test on; set "
                "data.val_path=FOLDER and leave data.no_labels out, or leave the monitor out."
            )


def _check_linear(cfg: DictConfig, selection: Selection) -> None:
    """Let a linear probe have timm backbones, and fine-tuning the mixtures that solo-learn has.

    Raises:
        UserError: a poison, a monitor or another defence is selected.
    """
    if selection.defence is not None:
        if selection.defence_name not in MIXTURES or not cfg.get("finetune"):
            raise UserError(
                f"main_linear.py trains on clean images, where defence={selection.defence_name} "
                f"is not served; only {' and '.join(MIXTURES)} are, with finetune=True. Select "
                "defences in main_pretrain.py."
            )
        cfg[selection.defence_name] = selection.defence.alpha  # type: ignore[union-attr]
    if selection.name != "none" or selection.monitor is not None:
        raise UserError(
            "main_linear.py fits a probe on clean images, for which only +poison=none is of use "
            "(timm backbones); select poisons and the monitor in main_pretrain.py."
        )


def _read_folders(cfg: DictConfig) -> None:
    if cfg.data.get("format") == "dali":
        cfg.data.format = "image_folder"
        log.info("data.format=dali is read as image_folder: DALI's pipelines hide the images")


def _use_timm(cfg: DictConfig, kind: str, job: Job) -> None:
    name = str(cfg.backbone.name)
    if not name.startswith(PREFIX):
        return
    from solo.methods.base import BaseMethod

    size = _crop_size(cfg) if kind == "pretrain" else _crop_size_of_checkpoint(cfg)
    job.exchanged.callback(add_timm_backbone(backbones(BaseMethod), name, size))


def _crop_size(cfg: Mapping[str, Any]) -> int:
    return max(int(node["crop_size"]) for node in cfg["augmentations"])


def _crop_size_of_checkpoint(cfg: DictConfig) -> int:
    """Return the crop size that a backbone was pretrained with: its stem depends on it."""
    saved = Path(str(cfg.get("pretrained_feature_extractor"))).parent / SOLO_ARGS_FILE
    if saved.is_file():
        return _crop_size(json.loads(saved.read_text(encoding="utf8")))
    given = OmegaConf.select(cfg, "data.augmentations.crop_size")
    return int(given or SIDES.get(cfg.data.dataset, DEFAULT_CROP))


def _end_with_rounds(cfg: DictConfig, selection: Selection) -> None:
    """Let solo-learn's schedules end where crafting ends, where that is known in epochs."""
    poison = selection.poison
    if isinstance(poison, CraftConfig) and poison.model_steps == EPOCH:
        cfg.max_epochs = min(cfg.max_epochs, poison.rounds)


def _of_run(cfg: DictConfig) -> dict[str, Any]:
    """Return the settings that make a run another one."""
    settings = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(settings, dict)
    chosen = {str(key): value for key, value in settings.items() if key not in NOT_IN_NAME}
    chosen["data"] = {k: v for k, v in chosen["data"].items() if k not in ("num_workers", "cache")}
    return chosen


def _own_folder(cfg: DictConfig) -> Path | None:
    """Return a folder for the run where solo-learn's Checkpointer makes none."""
    if cfg.checkpoint.enabled:
        return None
    from hydra.core.hydra_config import HydraConfig

    output = Path(HydraConfig.get().runtime.output_dir)
    if output.resolve() != Path.cwd().resolve():
        return output
    return Path(cfg.checkpoint.dir) / str(cfg.method) / str(cfg.name)


def _check_folder(selection: Selection, folder: Path | None) -> None:
    chosen = getattr(selection.poison, "dir", None) or folder
    if selection.crafts and chosen and (Path(chosen) / POISON_FILE).exists():
        raise UserError(
            f"{Path(chosen) / POISON_FILE} exists and a poison is never overwritten; set "
            "poison.dir to another folder."
        )


def build_callbacks(
    cfg: DictConfig, selection: Selection, folder: Path | None, poison: Poison | None = None
) -> list[Callback]:
    """Return the callbacks of a run.

    Args:
        cfg: solo-learn's parsed configuration.
        selection: the poison, the monitor and the defence.
        folder: where the run leaves its files; None: beside its checkpoints.
        poison: what the file that is injected holds.
    """
    made = selected_callbacks(selection, folder, cfg.get("augment", "host"), poison)
    return [*made, First(made)]


class First(Callback):
    """Moves callbacks before solo-learn's own, so that they refuse before anything is written."""

    def __init__(self, callbacks: list[Callback]) -> None:
        """Take the callbacks to move."""
        super().__init__()
        self._callbacks = callbacks

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Move them; let the learning rate's schedule end with the last step of crafting."""
        others = [callback for callback in trainer.callbacks if callback not in self._callbacks]
        trainer.callbacks = [*self._callbacks, *others]
        limited = any(isinstance(callback, CraftPoison) for callback in self._callbacks)
        if stage == "fit" and limited and trainer.fit_loop.max_steps > 0:
            steps = trainer.estimated_stepping_batches
            batches = trainer.num_training_batches
            an_epoch = max(1, -(-int(batches) // trainer.accumulate_grad_batches))
            pl_module.max_epochs = max(1, -(-int(steps) // an_epoch))
