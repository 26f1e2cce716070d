"""Callbacks that both Lightning packages take for their own, and the order in which ours run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as new_root

from cp_plugin.callbacks.loader_hooks import note_start
from cp_plugin.config.settings import UserError
from cp_plugin.hosts import host_class

if TYPE_CHECKING:
    Callback = new_root.Callback
else:
    try:
        import pytorch_lightning as old_root
    except ImportError:
        Callback = new_root.Callback
    else:
        # `lightning.pytorch` and `pytorch_lightning` hold equal but different classes, and a
        # trainer runs only its own.
        class Callback(new_root.Callback, old_root.Callback):
            """A callback of `lightning.pytorch` and of `pytorch_lightning` at once."""


CANONICAL, POISON, DEFENCE, VIEWS = "canonical", "poison", "defence", "views"
ORDER = (CANONICAL, POISON, DEFENCE, VIEWS)
"""What is done to a training image, first to last."""


def prepare_fit(trainer: Any) -> None:
    """Prepare a trainer for callbacks that act on training images; they call this in `setup`.

    Raises:
        UserError: two of them bring a poison, or two make the views.
    """
    put_in_order(trainer)
    note_start(trainer)


def put_in_order(trainer: Any) -> None:
    """Let callbacks that act on training images run in the order in which an image meets them.

    They say what they do in `acts_on_images`. They exchange places among themselves; all others
    keep theirs.

    Raises:
        UserError: two of them bring a poison, or two make the views.
    """
    acting = [one for one in trainer.callbacks if getattr(one, "acts_on_images", ())]
    for kind, what in ((POISON, "bring a poison"), (VIEWS, "make the views")):
        same = [type(one).__name__ for one in acting if kind in one.acts_on_images]
        if len(same) > 1:
            raise UserError(
                f"the callbacks {' and '.join(same)} both {what} of the training images, which "
                "only one can do; leave one of them out."
            )
    ordered = iter(sorted(acting, key=lambda one: ORDER.index(one.acts_on_images[0])))
    # A new list: the trainer is going through the old one.
    trainer.callbacks = [next(ordered) if one in acting else one for one in trainer.callbacks]


def run_folder(trainer: Any) -> Path:
    """Return where a run leaves its files; what it is, is the host's to say.

    Processes that train together all ask for it: the first one tells the others.
    """
    return host_class(trainer.lightning_module).run_folder(trainer)


__all__ = ["Callback", "prepare_fit", "run_folder"]
