"""Any LightningModule with its SSL loss in `training_step`: Lightly's style, and our engine's."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from cp_plugin.config.settings import UserError
from cp_plugin.data.batch import Batch
from cp_plugin.hosts.by_hand import by_hand, handing_over
from cp_plugin.hosts.checks import check_module, tell_uncompared
from cp_plugin.hosts.module import ModuleHost
from cp_plugin.hosts.protocol import LossRequest, answer
from cp_plugin.util.internals import trainer_of

BATCH_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
"""In the order in which Lightning calls them, on the module or its DataModule."""
LIGHTNING = ("lightning", "pytorch_lightning")


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
        trainer: Any = None,
    ) -> None:
        """Wrap a module.

        Args:
            module: a LightningModule of either import root; its `training_step` takes the batch of
                its own loader, views first, and returns the loss or a dict with `loss`, or hands
                its losses to `manual_backward`.
            with_views: puts views into a collated sample, see `RawDataset.with_views`.
            momentum_modules: names of the momentum branch's modules, or `auto`.
            precision: makes the context that casts as the trainer does.
            trainer: the Lightning trainer, whose DataModule may have hooks for batches and whose
                precision may be truly half or double.

        Raises:
            UserError: `momentum_modules` names no network of the module.
        """
        super().__init__(module, type(module).__name__, momentum_modules, precision)
        self._with_views = with_views
        self._images: Tensor | None = None
        self._number = -1
        """How many batches were asked for, after the first one."""
        self._hooks = batch_hooks(trainer, module)
        self._convert = converter(trainer)
        self._takes_index = _takes_index(module.training_step)

    def check(self, views: int) -> None:
        """Check that the module's loss can be minimised over a perturbation.

        Args:
            views: number of views of an image.

        Raises:
            UserError: it reads its loader itself.
        """
        check_module(self.module)
        if not self.compares(views):
            tell_uncompared(self.method)

    def compares(self, views: int) -> bool:
        """Whether the loss compares views of an image; of one view it cannot."""
        return views > 1

    def detect_momentum(
        self, views: Sequence[Tensor], batch: Batch, labels: Tensor | None = None
    ) -> bool:
        """Watch one step: it shows what the momentum branch is, and whether labels stay outside.

        To be called once, on the first batch. The module is left as it was.

        Args:
            views: V views, each float (B, C, h, w).
            batch: what they were made of.
            labels: int64 (B), the data set's labels of these images, if it has any.

        Returns:
            Whether the step had a loss; if not, another batch has to show.

        Raises:
            UserError: the gradient with respect to the views depends on the labels, or the step
                fails on the one view that the transform makes.
        """
        try:
            answer(self.branch.detecting(self.method, views, batch, labels), self)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            if len(views) > 1 or isinstance(error, UserError):
                raise
            raise UserError(
                f"the data set's transform makes one view of an image, and {self.method}."
                f"training_step fails on it ({type(error).__name__}: {error}); let "
                "`self.transform` make as many as it compares, as Lightly's "
                "MultiViewTransform([first, second]) does."
            ) from error
        return self.branch.known

    def show(self, request: LossRequest) -> None:
        """Show the losses of the module's own `training_step`, each as it is handed over."""
        if not self._hands_over():
            super().show(request)
            return
        with handing_over(self.module, request.on_loss):
            self._step(request.views, request.batch)

    def loss(self, views: Sequence[Tensor], batch: Batch) -> Tensor | None:
        """Return the loss that the module's own `training_step` returns on these views.

        None: it returned none, so that this batch is left out. A module that optimises by hand
        hands its losses over instead, see `show`.
        """
        output = self._step(views, batch)
        if output is None:
            return None
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise UserError(
                f"{self.method}.training_step must return the loss or a dict with `loss`, "
                f"got {type(output).__name__}."
            )
        return loss

    def _step(self, views: Sequence[Tensor], batch: Batch) -> Any:
        """Run the module's own `training_step` on views and return what it returns."""
        if batch.images is not self._images:
            self._images, self._number = batch.images, self._number + 1
        # The trainer stands still meanwhile; a step that treats batches by number must see others.
        index = (_batch_index(self.module, self._number),) if self._takes_index else ()
        with self._precision(), self.branch.readers_detached():
            return self._training_step(self._own_batch(views, batch), *index)

    def _training_step(self, batch: Any, *index: int) -> Any:
        module: Any = self.module
        return module.training_step(batch, *index)

    def _hands_over(self) -> bool:
        """Whether the module hands its losses over, and returns none."""
        return by_hand(self.module)

    def _own_batch(self, views: Sequence[Tensor], batch: Batch) -> Any:
        """Return the batch as the module gets it from its trainer, its own hooks included."""
        sample = self._with_views(batch.sample, [self._convert(view) for view in views])
        for hook in self._hooks.values():
            sample = hook(sample)
        return sample


def hook_owner(trainer: Any, module: Any, name: str) -> Any:
    """Return whose hook for batches Lightning calls: the DataModule's where it has its own.

    Where nobody has, it is the DataModule's too, so that one exchanged on it is found.
    """
    datamodule = getattr(trainer, "datamodule", None)
    if datamodule is not None and (_has_own(datamodule, name) or not _has_own(module, name)):
        return datamodule
    return module


def batch_hooks(trainer: Any, module: Any) -> dict[str, Callable[[Any], Any]]:
    """Return the hooks that a batch on its way to a module passes, by name, as they were written.

    Args:
        trainer: a Lightning trainer, or None.
        module: its module.
    """
    hooks: dict[str, Callable[[Any], Any]] = {}
    for name in BATCH_HOOKS:
        owner = hook_owner(trainer, module, name)
        if _has_own(owner, name):
            own = getattr(type(owner), name)  # not the instance's, which may be exchanged
            between = (module.device,) if name == "transfer_batch_to_device" else ()
            hooks[name] = functools.partial(_call, own, owner, between)
    return hooks


def converter(trainer: Any) -> Callable[[Any], Any]:
    """Return what casts a batch as a trainer does whose precision is truly half or double."""
    return _same if trainer is None else trainer.precision_plugin.convert_input


def _call(own: Callable[..., Any], owner: Any, between: tuple[Any, ...], sample: Any) -> Any:
    return own(owner, sample, *between, 0)


def _has_own(owner: Any, name: str) -> bool:
    hook = getattr(type(owner), name, None)
    return hook is not None and hook.__module__.partition(".")[0] not in LIGHTNING


def _same(value: Any) -> Any:
    return value


def _takes_index(training_step: Callable[..., Any]) -> bool:
    """Tell, as Lightning does, whether a step takes the number of the batch."""
    parameters = inspect.signature(training_step).parameters
    several = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters.values())
    return several or len(parameters) > 1


def _batch_index(module: Any, number: int) -> int:
    """Return a number that a batch of an epoch has: that of the trainer's batch, and `number` on.

    Never one that no epoch reaches: methods keep tables with a place for each batch (DeepCluster).
    """
    trainer = trainer_of(module)
    index = max(0, int(getattr(getattr(trainer, "fit_loop", None), "batch_idx", 0)))
    batches = getattr(trainer, "num_training_batches", 0)
    if not isinstance(batches, int):  # of a loader without a length it is infinite
        return index + number
    return (index + number) % batches if batches else index
