"""stable-pretraining's `spt` command with a poison, defence or monitor selected.

Its `main` gives the configuration to `instantiate_from_config`, which makes trainer, module and
data of it; that one is wrapped for the time of the job, so that the groups are read and taken out
before. Nothing else of stable-pretraining is exchanged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from cp_plugin.attack.poison_file import Poison
from cp_plugin.callbacks.selected import selected_callbacks
from cp_plugin.config.selection import GROUPS, Selection
from cp_plugin.config.settings import InjectConfig, UserError
from cp_plugin.integrations.job import Job
from cp_plugin.util.patching import patches
from cp_plugin.util.run_files import POISON_FILE

MAKER = ("stable_pretraining.config", "instantiate_from_config")


def wrap_maker(main: Callable[..., Any], job: Job) -> bool:
    """Wrap the `instantiate_from_config` that an application of stable-pretraining calls first.

    Args:
        main: the application's task function.
        job: gets the callbacks once the configuration is read, and what undoes the wrapping.

    Returns:
        Whether the application is stable-pretraining's.
    """
    names = main.__globals__
    for name, value in list(names.items()):
        if (getattr(value, "__module__", ""), getattr(value, "__name__", "")) == MAKER:
            job.exchanged.entry(names, name, _wrapped(value, job))
            return True
    return False


def _wrapped(make: Callable[[Any], Any], job: Job) -> Callable[[Any], Any]:
    @functools.wraps(make)
    def instantiate_from_config(cfg: DictConfig) -> Any:
        selection = Selection.read(cfg)
        folder = _run_folder()
        _check(cfg, selection, folder)
        chosen = selection.poison
        # Errors of what it instantiates are warnings to it, so the file is read before.
        poison = Poison.load(chosen.path) if isinstance(chosen, InjectConfig) else None
        augment = str(cfg.get("augment", "host"))
        callbacks = functools.partial(selected_callbacks, selection, folder, augment, poison)
        callbacks()
        for patch in patches():
            if patch.is_needed():
                job.exchanged.callback(patch.apply())
        job.callbacks = callbacks
        with open_dict(cfg):
            for group in (*GROUPS, "augment"):
                cfg.pop(group, None)
        return make(cfg)

    return instantiate_from_config


def _check(cfg: DictConfig, selection: Selection, folder: Path) -> None:
    """Refuse before anything is built what could not be carried out.

    Raises:
        UserError: poison or defence do not fit, or there is a poison already.
    """
    if selection.needs_classifier:
        raise UserError(
            f"poison={selection.name} is made on a supervised surrogate; craft it with "
            f"`cp-plugin pretrain --config-name supervised +poison={selection.name}` and use it "
            "here with +poison=inject."
        )
    forward = str(OmegaConf.select(cfg, "module.forward", default=""))
    selection.check_method(forward.rpartition(".")[2])
    made = Path(getattr(selection.poison, "dir", None) or folder) / POISON_FILE
    if selection.crafts and made.exists():
        raise UserError(
            f"{made} exists and a poison is never overwritten; set poison.dir to another folder."
        )


def _run_folder() -> Path:
    """Return Hydra's folder of the job: stable-pretraining's own is known in training alone."""
    from hydra.core.hydra_config import HydraConfig

    return Path(HydraConfig.get().runtime.output_dir)
