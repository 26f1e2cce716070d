"""stable-pretraining's modules: the loss of their `forward`, never the step that they make of it.

Nothing of stable-pretraining is imported: a module is recognised by the class it inherits from.
"""

from __future__ import annotations

import logging
from types import MethodType
from typing import Any

from torch import nn

from cp_plugin.config.settings import UserError
from cp_plugin.data.pipelines import KORNIA_WITHOUT_GRADIENT
from cp_plugin.hosts.lightning import LightningHost
from cp_plugin.util.internals import trainer_of

BASE_CLASS = ("stable_pretraining.module", "Module")
STAGE = "fit"
"""What `forward` is told where it trains."""
POLICIES = ("AutoAugment", "RandAugment", "TrivialAugment")
"""kornia's classes that apply one of many augmentations, some of them without a gradient."""

log = logging.getLogger("cp_plugin")


def batch_transform(trainer: Any) -> Any:
    """Return the `gpu_transform` that training batches pass on the device, None where none does.

    It is looked for where stable-pretraining does: on the training set and what that wraps, then on
    the DataModule. A module applies it itself, in the noise phase too: no mirror stands for it.
    """
    where = getattr(getattr(trainer, "train_dataloader", None), "dataset", None)
    while where is not None:
        found = getattr(where, "gpu_transform", None)
        if found is not None:
            return found
        inside = getattr(where, "dataset", None) or getattr(where, "datasets", None)
        where = inside[0] if isinstance(inside, (list, tuple)) else inside
    found = getattr(getattr(trainer, "datamodule", None), "gpu_transform", None)
    return found.get("train") if isinstance(found, dict) else found


def log_opaque(transform: Any) -> None:
    """Name what no gradient passes in a transform of batches: delta is shaped past it."""
    steps = transform.modules() if isinstance(transform, nn.Module) else ()
    names = dict.fromkeys(type(step).__name__ for step in steps)
    opaque = [name for name in names if name in KORNIA_WITHOUT_GRADIENT + POLICIES]
    if opaque:
        log.warning(
            "gpu_transform has %s, which passes no useful gradient on images that it changes; the "
            "perturbation is shaped by the others alone",
            ", ".join(opaque),
        )


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
            views: number of views of an image before a `gpu_transform`.

        Raises:
            UserError: as of `LightningHost`.
        """
        super().check(views)
        log_opaque(self._of_batches())

    def compares(self, views: int) -> bool:
        """Whether the loss compares views of an image; a `gpu_transform` may make them of one."""
        return views > 1 or self._of_batches() is not None

    def _of_batches(self) -> Any:
        return batch_transform(trainer_of(self.module))

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
