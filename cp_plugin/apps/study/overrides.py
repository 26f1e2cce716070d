"""What the overrides of a study's file may say: a file from elsewhere is no reason to trust it.

They choose what is trained. They do not say where runs write, load no files of weights, name no
class to be built, run no command of a launcher, and read of the environment only folders of images.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from cp_plugin.config.settings import UserError

OWN = ("name", "checkpoint.dir", "poison.dir", "defence.save", "cell")
"""What a study sets itself."""
FILES = ("checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
"""Arguments of timm's models that name files or folders, or fetch weights."""
WEIGHTS = ("defence.path",)
"""Settings that name such a file or folder."""
DATA_PATHS = ("data.train_path", "data.val_path")
PLAIN = re.compile(r"\$\{[A-Za-z0-9_.]+\}")
"""Interpolation of another value of the configuration."""
VARIABLE = re.compile(r"\$\{oc\.env:([A-Za-z_][A-Za-z0-9_]*)\}")
LAUNCHER_KEYS = (
    *("n_jobs", "verbose", "prefer", "timeout", "pre_dispatch", "batch_size"),
    *("timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node", "mem_gb", "nodes"),
    *("partition", "qos", "account", "constraint", "gres", "cpus_per_gpu", "gpus_per_task"),
    *("mem_per_gpu", "mem_per_cpu", "array_parallelism", "max_num_timeout", "signal_delay_s"),
)
"""Of joblib and submitit: how many of what, and which part of a cluster."""
WORD = re.compile(r"[A-Za-z0-9_.,:+-]*")


def check_overrides(where: str, overrides: Sequence[str]) -> None:
    """Check the overrides of runs.

    Args:
        where: their place in the file, for errors.
        overrides: in Hydra's language; what is none of it, Hydra refuses later.

    Raises:
        UserError: one says what is not the file's to say.
    """
    for override in _parsed(overrides):
        text = str(override.input_line)
        names = [name for name, _ in _values(override.key_or_group, _plain(override))]
        for name in (override.key_or_group, *names):
            parts = re.split(r"[./]", name)
            if parts[0] == "hydra" or override.package is not None:
                raise UserError(
                    f"{where} says {text!r}, which is for Hydra itself and not for a run; leave it "
                    "out, or give a launcher on the command line."
                )
            if name in OWN:
                raise UserError(
                    f"{where} says {text!r}, but where runs write is the study's to say, below "
                    "--out; leave it out."
                )
            if "_target_" in parts or set(parts) & set(FILES) or name in WEIGHTS:
                raise UserError(
                    f"{where} says {text!r}, and a study's file names no classes and no files of "
                    "weights; leave it out."
                )
        _check_choice(where, override, text)
        _check_interpolations(where, override.key_or_group, text)


def check_launcher(overrides: Sequence[str]) -> None:
    """Check the overrides for Hydra that a file has; those of the command line are the user's own.

    Raises:
        UserError: one may run commands or write files.
    """
    for override in _parsed(overrides):
        key, value = override.key_or_group, override.value()
        chosen = key == "hydra/launcher"
        counted = key.startswith("hydra.launcher.") and key[15:] in LAUNCHER_KEYS
        plain = isinstance(value, (int, float)) or WORD.fullmatch(str(value)) is not None
        if key.lstrip("+~").startswith("hydra") and not ((chosen or counted) and plain):
            raise UserError(
                f"launcher says {override.input_line!r}, and a study's file says of a launcher "
                "only which one, and how many jobs of what size; give the rest on the command line."
            )


def _parsed(overrides: Sequence[str]) -> list[Override]:
    parser = OverridesParser.create()
    found = []
    for override in overrides:
        try:
            found += parser.parse_overrides([override])
        except HydraException:  # told when it is composed
            continue
    return found


def _plain(override: Override) -> Any:
    return None if override.is_delete() or override.is_sweep_override() else override.value()


def _values(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield all values in a value, with their full names."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield f"{name}.{key}", one
            yield from _values(f"{name}.{key}", one)
    elif isinstance(value, list):
        for one in value:
            yield from _values(name, one)


def _check_choice(where: str, override: Override, text: str) -> None:
    """Check that a configuration of a group is one of the package."""
    value = _plain(override)
    single = "." not in override.key_or_group and isinstance(value, str)
    if single and (value.startswith(("/", "~")) or ".." in re.split(r"[/\\]", value)):
        raise UserError(
            f"{where} says {text!r}, and a study's file takes no configurations from elsewhere; "
            "name one that comes with the package."
        )


def _check_interpolations(where: str, key: str, text: str) -> None:
    left = PLAIN.sub("", text)
    if key in DATA_PATHS:
        for name in VARIABLE.findall(left):
            value = os.environ.get(name)
            if value is not None and not Path(value).is_dir():
                raise UserError(
                    f"{where} says {text!r}, and the variable {name} holds no folder that is "
                    "there; set it to the folder of the images."
                )
        left = VARIABLE.sub("", left)
    if "${" in left:
        raise UserError(
            f"{where} says {text!r}; a study's file may read environment variables in "
            f"{' and '.join(DATA_PATHS)} alone, as ${{oc.env:NAME}}, so write the value itself."
        )
