"""Where a run of the embedded engine logs: as Lightning does, wherever the configuration says."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from omegaconf import DictConfig, OmegaConf

from cp_plugin.config.settings import UserError

log = logging.getLogger("cp_plugin")


def run_loggers(folder: Path, cfg: DictConfig) -> Iterator[Logger]:
    """Yield the loggers of a run.

    Always CSV, in the run's folder, and TensorBoard where it is installed; beside them what
    `logger` holds, one `_target_` or several, as users of Lightning write it for Hydra.

    Args:
        folder: the run's.
        cfg: the completed configuration.

    Raises:
        UserError: `logger` holds something else, or one of its loggers cannot be made.
    """
    yield CSVLogger(folder, name="", version="logs")
    if find_spec("tensorboard") is not None:
        yield TensorBoardLogger(folder, name="", version="logs")
    if OmegaConf.select(cfg, "wandb.enabled", default=False):
        log.warning(
            "wandb.enabled is solo-learn's own and is passed over; for Weights & Biases add "
            "+logger={_target_: lightning.pytorch.loggers.WandbLogger, project: …, save_dir: …}"
        )
    for one in _listed(cfg.get("logger")):
        yield _made(one)


def _listed(own: Any) -> list[Any]:
    if not own:
        return []
    if OmegaConf.is_list(own):
        return list(own)
    if "_target_" in own:
        return [own]
    return list(own.values())  # by name, so that a single one can be overridden


def _made(one: Any) -> Logger:
    found: Any = None
    if OmegaConf.is_dict(one) and "_target_" in one:
        try:
            found = instantiate(one)
        except Exception as error:  # a logger may raise anything
            reason = str(error.__cause__ or error).splitlines()[0]
            raise UserError(
                f"logger: {one['_target_']} cannot be made ({reason}); correct its settings or "
                "leave it out."
            ) from error
    if not isinstance(found, Logger):
        raise UserError(
            f"logger: expected a Lightning logger's _target_ with its settings, got {one!r}; "
            "for instance logger={_target_: lightning.pytorch.loggers.CSVLogger, save_dir: logs}."
        )
    return found
