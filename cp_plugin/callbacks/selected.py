"""The callbacks that a selection of a poison, a monitor and a defence stands for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from cp_plugin.attack.poison_file import Poison
from cp_plugin.callbacks.base import Callback
from cp_plugin.callbacks.clusters import CraftUnlearnableClusters
from cp_plugin.callbacks.craft import CraftPoison
from cp_plugin.callbacks.defend import Defence
from cp_plugin.callbacks.inject import CanonicalImages, InjectPoison, MirrorViews, NoisePoison
from cp_plugin.callbacks.monitor import Journal, KNNMonitor
from cp_plugin.callbacks.separable import CraftTue
from cp_plugin.callbacks.supervised import (
    CraftAap,
    CraftAue,
    CraftErrorMin,
    CraftPil,
    CraftSep,
    CraftTap,
)
from cp_plugin.config.baselines import (
    AapConfig,
    AueConfig,
    ErrorMinConfig,
    PilConfig,
    RandomConfig,
    SepConfig,
    SyntheticConfig,
    TapConfig,
    TueConfig,
    UnlearnableClustersConfig,
)
from cp_plugin.config.selection import CRAFTED, Selection
from cp_plugin.config.settings import CraftConfig, InjectConfig, UserError

AUGMENT = ("mirror", "host")
CRAFTERS: dict[type[Any], type[CraftPoison]] = {
    CraftConfig: CraftPoison,
    ErrorMinConfig: CraftErrorMin,
    AueConfig: CraftAue,
    TapConfig: CraftTap,
    AapConfig: CraftAap,
    PilConfig: CraftPil,
    SepConfig: CraftSep,
    TueConfig: CraftTue,
    UnlearnableClustersConfig: CraftUnlearnableClusters,
}


def selected_callbacks(
    selection: Selection,
    folder: Path | None,
    augment: str = "host",
    poison: Poison | None = None,
    bank: Any = None,
    query: Any = None,
) -> list[Callback]:
    """Return the callbacks of a run; the monitor sees what the others have done.

    Args:
        selection: the poison, the monitor and the defence.
        folder: where the run leaves its files; None: the folder that the trainer has by then.
        augment: who makes a victim's views: `host`, its own transform, or `mirror`, its mirror; a
            craft is always on the mirror's.
        poison: what the file of `poison=inject` holds, where it is loaded already.
        bank: the monitor's labelled training images; None: those of the trainer's loader.
        query: the monitor's labelled test images; None: the trainer's validation set.

    Raises:
        UserError: an unknown `augment`, or the poison file cannot be read.
    """
    if augment not in AUGMENT:
        raise UserError(f"augment must be one of {', '.join(AUGMENT)}; got {augment!r}.")
    made: list[Callback] = [_images(selection, folder, poison)]
    if selection.defence is not None:
        made.append(Defence(selection.defence_name, selection.defence))
    if augment == "mirror" and not selection.crafts:
        made.append(MirrorViews(selection.cache))
    if selection.monitor is not None:
        monitor = KNNMonitor(bank, query, config=selection.monitor)
        made += [monitor, Journal(monitor, folder)]
    return made


def _images(selection: Selection, folder: Path | None, loaded: Poison | None) -> Callback:
    """Return what makes the training images what the run trains on."""
    settings: Any = selection.poison
    if isinstance(settings, CRAFTED):
        if settings.dir is None and folder is not None:
            settings = replace(settings, dir=str(folder))
        return CRAFTERS[type(settings)](settings, selection.cache)
    if isinstance(settings, InjectConfig):
        return InjectPoison(loaded or settings.path, settings.fraction, folder)
    if isinstance(settings, (RandomConfig, SyntheticConfig)):
        return NoisePoison(settings, folder)
    return CanonicalImages(selection.clean.image_size, selection.clean.fit)
