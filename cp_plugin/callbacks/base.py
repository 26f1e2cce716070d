"""A callback that both Lightning packages take for their own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as new_root

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


def run_folder(trainer: Any) -> Path:
    """Return where a run leaves its files: the logger's folder, else the trainer's root.

    In solo-learn it is the folder of its checkpoints, which is known once training has started.
    """
    for callback in trainer.callbacks:
        if type(callback).__module__ == "solo.utils.checkpointer":
            return Path(getattr(callback, "path", callback.logdir))
    return Path(trainer.log_dir or trainer.default_root_dir)


__all__ = ["Callback", "run_folder"]
