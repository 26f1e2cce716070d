"""Checkpoints of the embedded engine, whole or as they were."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from cp_plugin.config.settings import UserError
from cp_plugin.util.whole_files import written_whole


def check_checkpoint(path: str | Path) -> Path:
    """Return the path of a checkpoint that can be read without running code from it.

    Raises:
        UserError: there is none, it is damaged, or it holds more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint at {path}.")
    try:
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch.load has no error class of its own for damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} is no checkpoint of tensors and plain values, or it is damaged ({reason}); "
            "resume from another one, or start anew."
        ) from error
    return path


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place.

    Lightning's own writes it to the folder for temporary files: where that is another disk, a run
    that is killed meanwhile is left with half a checkpoint.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Save a checkpoint.

        Raises:
            NoRoom: the disk is full; the one before is intact.
        """
        content = io.BytesIO()  # torch's own writer says of a full disk that a write has failed
        torch.save(checkpoint, content)
        with written_whole(Path(path)) as partial:
            partial.write_bytes(content.getbuffer())
