"""What a poison cost: images through a surrogate, and time, of all crafts that shaped it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from cp_plugin.apps.study.state import read
from cp_plugin.attack.poison_file import Poison
from cp_plugin.config.yaml_files import load_yaml
from cp_plugin.util.run_files import CONFIG_FILE, POISON_FILE, RESULT_FILE

COST = ("image_passes", "craft_minutes")
"""What a row calls the figures of a poison; a run itself says nothing by these names."""


@dataclass(frozen=True)
class Cost:
    """Of a poison, with the poisons that it started from."""

    image_passes: int
    """Images that went forward and backward through a network, each view by itself."""
    seconds: float
    """Of the runs that crafted it."""

    def facts(self) -> dict[str, Any]:
        """Return the figures by the names that reports give them."""
        return dict(zip(COST, (self.image_passes, round(self.seconds / 60, 2)), strict=True))


def cost(crafts: Iterable[Path], known: dict[Path, Cost | None] | None = None) -> Cost | None:
    """Return the cost of a poison; None where a file of one of the runs is gone, or there is none.

    Args:
        crafts: folders of the runs that crafted it and what it started from.
        known: what single runs cost, which is added to, so that no file is read twice.
    """
    known = {} if known is None else known
    passes, seconds, count = 0, 0.0, 0
    for folder in crafts:
        if folder not in known:
            known[folder] = _of_craft(folder)
        own = known[folder]
        if own is None:
            return None
        passes, seconds, count = passes + own.image_passes, seconds + own.seconds, count + 1
    return Cost(passes, seconds) if count else None


def _of_craft(folder: Path) -> Cost | None:
    result = read(folder / RESULT_FILE)
    files = (folder / CONFIG_FILE, folder / POISON_FILE)
    if result is None or not all(file.is_file() for file in files):
        return None
    cfg = load_yaml(folder / CONFIG_FILE)
    assert isinstance(cfg, DictConfig)
    return Cost(image_passes(Poison.load(folder / POISON_FILE), cfg), float(result["seconds"]))


def image_passes(poison: Poison, cfg: DictConfig) -> int:
    """Return how many images went forward and backward through the surrogate of one craft.

    Args:
        poison: what it made.
        cfg: its configuration, completed.
    """
    made = json.loads(poison.info.get("schedule", "{}"))
    noise_steps = made.get("noise_steps_done")
    if noise_steps is None:  # of files of version 0.1
        rounds = made["surrogate_steps_done"] // made["model_steps"]
        noise_steps = rounds * made["noise_steps"] * made["pgd_steps"]
    if made["noise_steps"] == 0:  # a step of the model moved delta too
        noise_steps = 0
    networks = cfg.poison.get("checkpoints", 1)
    views = sum(int(node.num_crops) for node in cfg.augmentations)
    steps = made["surrogate_steps_done"] + noise_steps * networks
    return int(steps * cfg.optimizer.batch_size * views)


def crafts_before(folder: Path) -> Iterable[Path]:
    """Yield the folder of a craft and, one by one, those of the crafts that it started from."""
    seen: set[Path] = set()
    while folder not in seen and (folder / CONFIG_FILE).is_file():
        seen.add(folder)
        yield folder
        poison = load_yaml(folder / CONFIG_FILE).get("poison") or {}
        init = Path(str(poison.get("init", "")))
        if init.name != POISON_FILE:
            return
        folder = init.parent
