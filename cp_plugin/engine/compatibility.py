"""Which poisons and methods of the embedded engine go together, where labels decide."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from cp_plugin.config.baselines import SyntheticConfig, TueConfig
from cp_plugin.config.selection import Selection
from cp_plugin.config.settings import CraftConfig, UserError
from cp_plugin.data import class_names, labels
from cp_plugin.engine.settings import LABELLED_METHODS

SURROGATE = "supervised"
"""The method that supervised poisons are made on."""


def check_method(selection: Selection, cfg: DictConfig) -> None:
    """Refuse, before anything is read or trained, what labels make impossible.

    Args:
        selection: what is selected.
        cfg: a completed configuration of the embedded engine.

    Raises:
        UserError: a contrastive poison on a method that reads labels, a supervised poison on one
            that does not, or labels are needed and switched off.
    """
    poison, method = selection.poison, cfg.method
    reads_labels = method in LABELLED_METHODS
    if isinstance(poison, CraftConfig) and reads_labels:
        raise UserError(
            f"no contrastive poison can be crafted with method={method}: its loss reads labels by "
            "design, so its poison would be a supervised one; craft on an SSL method (simclr, …) "
            f"and train {method} as a victim (+poison=inject)."
        )
    if selection.needs_classifier and method != SURROGATE:
        raise UserError(
            f"poison={selection.name} is made on a supervised surrogate, got method={method}; use "
            f"--config-name {SURROGATE}, then train any victim with +poison=inject."
        )
    if not cfg.data.no_labels:
        return
    wants = f"method={method}" if reads_labels else f"poison={selection.name}"
    if reads_labels or isinstance(poison, (SyntheticConfig, TueConfig)):
        raise UserError(
            f"{wants} needs labelled images and data.no_labels=True leaves no labels; use labelled "
            "data, an SSL method, or a poison without labels (cp, random)."
        )


def name_classes(cfg: DictConfig, train: Any) -> None:
    """Write the number of classes into a configuration whose method needs it.

    Raises:
        UserError: the data set has fewer than two classes.
    """
    if cfg.method not in LABELLED_METHODS:
        return
    known = labels(train)
    count = 0 if known is None else max(int(known.max()) + 1, len(class_names(train) or ()))
    if count < 2:
        raise UserError(
            f"method={cfg.method} needs images of two classes or more, got {count}; use labelled "
            "data or an SSL method."
        )
    cfg.data.num_classes = count
