"""YAML files from elsewhere: read as plain values, and only if they are what their size says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cp_plugin.config.settings import UserError

MOST_BYTES = 1 << 20
MOST_VALUES = 100_000
"""Values of a file with its aliases followed: a few lines of them may stand for billions."""


def load_yaml(path: Path) -> Any:
    """Return the configuration in a YAML file, of OmegaConf; no code is run, nothing is resolved.

    Raises:
        UserError: it cannot be read, is no YAML, or stands for more values than a configuration
            has.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path} is larger than a configuration, {MOST_BYTES >> 20} MB.")
        root = yaml.compose(path.read_text(encoding="utf8"), Loader=yaml.SafeLoader)
        if root is not None and _values(root, {}) > MOST_VALUES:
            raise UserError(f"{path} stands for more values than a configuration has; check it.")
        return OmegaConf.load(path)
    except UserError:
        raise
    except RecursionError:
        raise UserError(f"{path} is nested deeper than a configuration is; check it.") from None
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is no YAML file: {reason[:200]}") from None


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """Count a node and all below it, aliases as often as they stand there."""
    if id(node) in known:
        if not known[id(node)]:
            raise RecursionError  # it contains itself
        return known[id(node)]
    known[id(node)] = 0
    inside: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        inside = node.value
    elif isinstance(node, yaml.MappingNode):
        inside = [part for pair in node.value for part in pair]
    known[id(node)] = 1 + sum(_values(part, known) for part in inside)
    return known[id(node)]
