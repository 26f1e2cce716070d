"""`cp-plugin pretrain`: the embedded engine as a Hydra application."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cp_plugin.config.settings import UserError
from cp_plugin.integrations.activation import own_application
from cp_plugin.util.memory import freed_memory_kept
from cp_plugin.util.paths import shipped

FOLDER_FLAGS = ("--config-path", "-cp", "--config-dir", "-cd")


def pretrain(cfg: DictConfig, watching: Sequence[Any] = ()) -> Any:
    """Run one job of the application, see `engine.run.run`."""
    # Heavy: only a job that runs needs torch, not `--help` or a faulty configuration.
    from cp_plugin.engine.run import run

    # `hydra/job_logging: disabled`, the choice of solo-learn, silences every logger.
    for name in logging.root.manager.loggerDict:
        if name.partition(".")[0] == "cp_plugin":
            logging.getLogger(name).disabled = False
    with freed_memory_kept(), own_application():
        return run(cfg, watching)


def main(arguments: Sequence[str]) -> None:
    """Compose the configuration and run its jobs.

    Args:
        arguments: Hydra's command line; a relative `--config-path` is taken from the working
            directory, and without one the configurations of this package are used.

    Raises:
        UserError: Hydra cannot find or compose the configuration, or a job refuses it.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise, instead of printing and exiting with code 1
    sys.argv = [sys.argv[0], *_absolute(arguments)]
    configs = str(shipped("configs") / "pretrain")
    application = hydra.main(version_base="1.3", config_path=configs, config_name=None)
    try:
        application(pretrain)()
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_sentence(error)) from error


def compose(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """Return one of this package's configurations with overrides, without an application.

    Raises:
        UserError: Hydra cannot find or compose the configuration.
    """
    configs = str(shipped("configs") / "pretrain")
    # A job of an application may compose another configuration.
    application = GlobalHydra.instance()
    around, application.hydra = application.hydra, None
    try:
        with hydra.initialize_config_dir(configs, version_base="1.3"):
            cfg = hydra.compose(config_name, list(overrides))
            OmegaConf.to_container(cfg, resolve=True)  # an unknown variable is told here
            return cfg
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_sentence(error)) from error
    finally:
        application.hydra = around


def _absolute(arguments: Sequence[str]) -> list[str]:
    """Make the folder of configurations absolute; Hydra would look beside this module."""
    result, after_flag = [], False
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if after_flag:
            argument = str(_folder(argument))
        elif flag in FOLDER_FLAGS and equals:
            argument = f"{flag}={_folder(value)}"
        after_flag = argument in FOLDER_FLAGS
        result.append(argument)
    return result


def _folder(text: str) -> Path:
    folder = Path(text).resolve()
    if not folder.is_dir():
        raise UserError(f"--config-path names {text}, which is no folder here.")
    return folder


def _sentence(error: BaseException) -> str:
    """Return Hydra's message in one line, the most telling part of a chain of errors."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    unwanted = ("full_key:", "object_type=", "Set the environment variable")
    text = " ".join(line for line in lines if not line.startswith(unwanted))
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException) and str(cause).splitlines()[0] not in text:
        text = f"{text} {str(cause).splitlines()[0]}"
    return text
