"""stable-pretraining's modules: the loss of their `forward`, never the step that they make of it.

Nothing of stable-pretraining is imported: a module is recognised by the class it inherits from.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from cp_plugin.config.settings import UserError
from cp_plugin.hosts.lightning import LightningHost
from cp_plugin.util.internals import trainer_of

BASE_CLASS = ("stable_pretraining.module", "Module")
STAGE = "fit"
"""What `forward` is told where it trains."""


def is_spt(module: Any) -> bool:
    """Tell whether a module is one of stable-pretraining's methods."""
    return any((cls.__module__, cls.__qualname__) == BASE_CLASS for cls in type(module).__mro__)


class SptHost(LightningHost):
    """An `spt.Module` behind the protocol of `cp_plugin.hosts.protocol.Host`.

    Its `training_step` optimises by hand, by the one loss that `forward` returns; so that one is
    asked for, and nothing has to stand still.
    """

    framework = "stable-pretraining"

    def __init__(self, module: Any, *arguments: Any) -> None:
        """Wrap a module; the arguments are those of `LightningHost`."""
        super().__init__(module, *arguments)
        name = _name_of(module.forward)
        self.method = type(module).__name__ if name == "forward" else name

    def check(self, views: int) -> None:
        """Check that the module's loss can be minimised over a perturbation.

        Args:
            views: number of views of an image.

        Raises:
            UserError: as of `LightningHost`, or batches are augmented once more by a
                `gpu_transform`.
        """
        super().check(views)
        trainer: Any = trainer_of(self.module)
        where = [getattr(trainer, "datamodule", None), getattr(trainer, "train_dataloader", None)]
        while (inside := getattr(where[-1], "dataset", None)) is not None:
            where.append(inside)
        for owner in where:
            if getattr(owner, "gpu_transform", None) is not None:
                raise UserError(
                    f"{type(owner).__name__} has a gpu_transform, which augments batches behind "
                    "the views that the mirror makes; let its `transform` make the views, of "
                    "stable-pretraining's own transforms, and set gpu_transform=None."
                )

    def _hands_over(self) -> bool:
        return False

    def _training_step(self, batch: Any, *index: int) -> Any:
        if not isinstance(batch, dict):
            raise UserError(
                f"{self.method} expected its batches to be dictionaries, as the data sets of "
                f"stable-pretraining give them, got {type(batch).__name__}."
            )
        return self.module(batch | {"batch_idx": index[0]}, stage=STAGE)


def _name_of(forward: Any) -> str:
    """Return the name of a forward function; online probes wrap it and keep it as a default."""
    function = getattr(forward, "__func__", forward)
    wrapped = [
        v for v in getattr(function, "__defaults__", None) or () if isinstance(v, MethodType)
    ]
    return _name_of(wrapped[0]) if wrapped else str(getattr(function, "__name__", "forward"))
