"""Any LightningModule with its SSL loss in `training_step`: Lightly's style, and our engine's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from cp_plugin.config.settings import UserError
from cp_plugin.data.batch import Batch
from cp_plugin.hosts.checks import check_module
from cp_plugin.hosts.module import ModuleHost

BATCH_HOOKS = ("on_before_batch_transfer", "on_after_batch_transfer")


class LightningHost(ModuleHost):
    """A LightningModule behind the protocol of `cp_plugin.hosts.protocol.Host`."""

    framework = "lightly"

    eval_passes_gradients = True
    """Whether every layer has a gradient in eval mode; else adversarial views are made without."""

    @staticmethod
    def run_folder(trainer: Any) -> Path:
        """Return where a run leaves its files: the logger's folder, else the trainer's root."""
        return Path(trainer.log_dir or trainer.default_root_dir)

    def __init__(
        self,
        module: Any,
        with_views: Callable[[Any, Sequence[Tensor]], Any],
        momentum_modules: str | Sequence[str] = "auto",
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Wrap a module.

        Args:
            module: a LightningModule of either import root; its `training_step` takes the batch of
                its own loader, views first, and returns the loss or a dict with `loss`.
            with_views: puts views into a collated sample, see `RawDataset.with_views`.
            momentum_modules: names of the momentum branch's modules, or `auto`.
            precision: makes the context that casts as the trainer does.

        Raises:
            UserError: `momentum_modules` names no network of the module.
        """
        super().__init__(module, type(module).__name__, momentum_modules, precision)
        self._with_views = with_views
        self._takes_index = _takes_index(module.training_step)

    def check(self, views: int) -> None:
        """Check that the module's loss can be minimised over a perturbation.

        Args:
            views: number of views of an image.

        Raises:
            UserError: it optimises by hand, reads its loader itself, or its method compares no two
                views (masked modelling, I-JEPA).
        """
        check_module(self.module, views)

    def detect_momentum(
        self, views: Sequence[Tensor], batch: Batch, labels: Tensor | None = None
    ) -> None:
        """Watch one step: it shows what the momentum branch is, and whether labels stay outside.

        To be called once, on the first batch. The module is left as it was.

        Args:
            views: V views, each float (B, C, h, w).
            batch: what they were made of.
            labels: int64 (B), the data set's labels of these images, if it has any.

        Raises:
            UserError: the gradient with respect to the views depends on the labels.
        """
        for request in self.branch.detecting(self.method, views, batch, labels):
            request.on_loss(self.loss(request.views, request.batch))

    def loss(self, views: Sequence[Tensor], batch: Batch) -> Tensor:
        """Return the loss of the module's own `training_step` on these views."""
        module: Any = self.module
        index = (_batch_index(module),) if self._takes_index else ()
        with self._precision(), self.branch.readers_detached():
            output = module.training_step(self._own_batch(views, batch), *index)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise UserError(
                f"{self.method}.training_step must return the loss or a dict with `loss`, "
                f"got {type(output).__name__}."
            )
        return loss

    def _own_batch(self, views: Sequence[Tensor], batch: Batch) -> Any:
        """Return the batch as the module gets it from its trainer, its own hooks included."""
        sample = self._with_views(batch.sample, views)
        for name in BATCH_HOOKS:
            own = getattr(type(self.module), name, None)
            if own is not None:
                sample = own(self.module, sample, 0)
        return sample


def _takes_index(training_step: Callable[..., Any]) -> bool:
    """Tell, as Lightning does, whether a step takes the number of the batch."""
    parameters = inspect.signature(training_step).parameters
    several = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters.values())
    return several or len(parameters) > 1


def _batch_index(module: Any) -> int:
    """Return the number of the batch that the trainer is at."""
    trainer = getattr(module, "_trainer", None)
    loop = getattr(trainer, "fit_loop", None)
    return max(0, int(getattr(loop, "batch_idx", 0)))
