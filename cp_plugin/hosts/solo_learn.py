"""solo-learn's methods: their own `training_step`, without the classifiers that it trains beside.

Nothing of solo-learn is imported: a module is recognised by the class it inherits from.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cp_plugin.config.settings import UserError
from cp_plugin.data.batch import Batch
from cp_plugin.hosts.checks import tell_uncompared
from cp_plugin.hosts.lightning import LightningHost
from cp_plugin.hosts.protocol import answer
from cp_plugin.util.undo import Exchanges

log = logging.getLogger("cp_plugin")

BASE_CLASS = ("solo.methods.base", "BaseMethod")
NOT_SERVED = {
    "supcon": "its loss compares labels, so its poison would be a supervised one",
    "base": "it has no self-supervised loss",
    "linear": "it has no self-supervised loss",
}
"""Methods of solo-learn that no poison can be crafted with, and why."""
UNCOMPARED = ("mae",)
"""Methods whose loss is a sum over views, none of which is compared to another."""
NEIGHBOURS_ONLY = ("nnbyol",)
"""Methods whose momentum branch only picks keys from a queue: no gradient goes through a choice."""
CHECKPOINTER = "solo.utils.checkpointer"
NO_BACKWARD_IN_EVAL = ("solo.utils.whitening", "IterNorm")
"""A layer of solo-learn that passes gradients on in training mode alone."""
CLASSIFIER_STEPS = ("base_training_step", "_shared_step_momentum")
"""Methods of a module that return the loss of an online classifier as `loss`, beside features."""


def is_solo(module: Any) -> bool:
    """Tell whether a module is one of solo-learn's methods."""
    return any((cls.__module__, cls.__qualname__) == BASE_CLASS for cls in type(module).__mro__)


def check_served(method: str) -> None:
    """Check that a poison can be crafted with a method of solo-learn.

    Raises:
        UserError: it cannot; the reason is given.
    """
    if method in NOT_SERVED:
        raise UserError(
            f"no poison can be crafted with method={method}: {NOT_SERVED[method]}; craft with "
            "another method (simclr, mocov2plus, byol, …) and inject the poison into this one."
        )


class SoloHost(LightningHost):
    """A method of solo-learn behind the protocol of `cp_plugin.hosts.protocol.Host`.

    The momentum branch is what the method itself names in `momentum_pairs`. Its online classifiers
    and its own kNN take no part in `loss`, so neither labels nor their bookkeeping reach delta.
    """

    framework = "solo-learn"
    eval_passes_gradients = False

    @staticmethod
    def run_folder(trainer: Any) -> Path:
        """Return the folder of the run's checkpoints, which is known once training has started."""
        for callback in trainer.callbacks:
            if type(callback).__module__ == CHECKPOINTER:
                return Path(getattr(callback, "path", callback.logdir))
        return LightningHost.run_folder(trainer)

    def __init__(
        self,
        module: Any,
        with_views: Callable[[Any, Sequence[Tensor]], Any],
        momentum_modules: str | Sequence[str] = "auto",
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
        trainer: Any = None,
    ) -> None:
        """Wrap a method; the arguments are those of `LightningHost`.

        Raises:
            UserError: `momentum_modules` names no submodule.
        """
        auto = momentum_modules == "auto"
        super().__init__(module, with_views, () if auto else momentum_modules, precision, trainer)
        self.method = str(module.cfg.method)
        self.backbone_name = str(module.backbone_name)
        if auto:
            self._momentum = {} if self.method in NEIGHBOURS_ONLY else _momentum_branch(module)
        self._always_training = [
            child
            for child in module.modules()
            if (type(child).__module__, type(child).__qualname__) == NO_BACKWARD_IN_EVAL
        ]

    def check(self, views: int) -> None:
        """Check that a poison can be crafted with this method.

        Args:
            views: number of views that the mirror makes of an image.

        Raises:
            UserError: it cannot, or it was built for another number of views.
        """
        check_served(self.method)
        wanted = getattr(self.module, "num_crops", views)
        if views != wanted:
            raise UserError(
                f"{self.method} was built for {wanted} views of an image, the pipeline makes "
                f"{views}; set num_crops in augmentations."
            )
        if not self.compares(views):
            tell_uncompared(self.method)

    def compares(self, views: int) -> bool:
        """Whether the loss compares views of an image."""
        return self.method not in UNCOMPARED

    def detect_momentum(
        self, views: Sequence[Tensor], batch: Batch, labels: Tensor | None = None
    ) -> bool:
        """Say what the momentum branch is, as the method names it; check that labels stay outside.

        Raises:
            UserError: the gradient with respect to the views depends on the labels, or a path of
                the momentum branch to the loss cannot be followed.
        """
        log.info("momentum branch of %s: %s", self.method, ", ".join(self._momentum) or "none")
        answer(self.branch.checking_paths(self.method, views, batch), self)
        answer(self.checking_labels(views, batch, labels), self)
        return True

    def momentum_modules(self) -> Sequence[nn.Module]:
        """Return the modules of the momentum branch."""
        return list(self._momentum.values())

    def move_momentum(self) -> bool:
        """Move the momentum branch with the method's own updater; tau stays where it is."""
        pairs = getattr(self.module, "momentum_pairs", ())
        for online, momentum in pairs:
            self.module.momentum_updater.update(online, momentum)  # type: ignore[operator,union-attr]
        return bool(pairs)

    def loss(self, views: Sequence[Tensor], batch: Batch) -> Tensor | None:
        """Return the self-supervised loss of the method's own `training_step` on these views.

        Raises:
            UserError: no poison can be crafted with this method.
        """
        check_served(self.method)
        with _without_classifiers(self.module), _training(self._always_training):
            return super().loss(views, batch)

    def encoder(self) -> nn.Module:
        """Return the online backbone."""
        backbone: nn.Module = self.module.backbone  # type: ignore[assignment]
        return backbone


def _momentum_branch(module: Any) -> dict[str, nn.Module]:
    """Return what the method moves by EMA, by name."""
    branch = [momentum for _, momentum in getattr(module, "momentum_pairs", ())]
    names = {id(child): name for name, child in module.named_modules()}
    return {names[id(momentum)]: momentum for momentum in branch if id(momentum) in names}


@contextmanager
def _without_classifiers(module: Any) -> Iterator[None]:
    """Let the classifiers' losses count nothing, and the method's own kNN remember nothing."""
    with Exchanges() as exchanged:
        for name in CLASSIFIER_STEPS:
            if hasattr(module, name):
                exchanged.entry(vars(module), name, _losing_nothing(getattr(module, name)))
        exchanged.entry(vars(module), "knn_eval", False)
        yield


@contextmanager
def _training(modules: Sequence[nn.Module]) -> Iterator[None]:
    before = [child.training for child in modules]
    for child in modules:
        child.train()
    try:
        yield
    finally:
        for child, training in zip(modules, before, strict=True):
            child.train(training)


def _losing_nothing(step: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    def call(*args: Any, **kwargs: Any) -> dict[str, Any]:
        outputs = step(*args, **kwargs)
        if "loss" in outputs:  # NaN where no image of the batch has a label
            outputs["loss"] = outputs["loss"].new_zeros(())
        return outputs

    return call
