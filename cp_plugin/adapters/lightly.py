"""Any LightningModule with its SSL loss in `training_step`: Lightly's style, and our engine's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from cp_plugin.adapters.branch import Branch
from cp_plugin.adapters.fitting import check_module
from cp_plugin.adapters.observation import named_networks
from cp_plugin.config import UserError
from cp_plugin.host import Batch

ENCODER_NAMES = (
    *("backbone", "encoder", "online_backbone", "student_backbone", "online_encoder"),
    *("student_encoder", "encoder_q", "backbone_q", "query_backbone", "online", "student"),
    *("model", "network", "net", "resnet", "vit"),
)
BATCH_HOOKS = ("on_before_batch_transfer", "on_after_batch_transfer")


class LightningHost:
    """A LightningModule behind the protocol of `cp_plugin.host.Host`."""

    framework = "lightly"

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
            with_views: puts views into a collated sample, see `cp_plugin.data.Opened.with_views`.
            momentum_modules: names of the momentum branch's modules, or `auto`.
            precision: makes the context that casts as the trainer does.

        Raises:
            UserError: `momentum_modules` names no network of the module.
        """
        self.module: nn.Module = module
        self.method = type(module).__name__
        self._with_views = with_views
        self._precision = precision
        self.branch = Branch(module, momentum_modules)
        self._takes_index = _takes_index(module.training_step)

    @property
    def _momentum(self) -> dict[str, nn.Module]:
        """The momentum branch by name, for hosts that know theirs and set it."""
        return self.branch.found

    @_momentum.setter
    def _momentum(self, found: dict[str, nn.Module]) -> None:
        self.branch.found = found

    @property
    def momentum_names(self) -> tuple[str, ...]:
        """Names of the momentum branch's modules."""
        return tuple(self.branch.found)

    @property
    def device(self) -> torch.device:
        """Where the module is."""
        return next(self.module.parameters()).device

    def check(self, views: int) -> None:
        """Check that the module's loss can be minimised over a perturbation.

        Args:
            views: number of views of an image.

        Raises:
            UserError: it optimises by hand, reads its loader itself, or its method compares no two
                views (masked modelling, I-JEPA).
        """
        check_module(self.module, views)

    def settle(self, views: Sequence[Tensor], batch: Batch, labels: Tensor | None = None) -> None:
        """Watch one step: it shows what the momentum branch is, and whether labels stay outside.

        To be called once, on the first batch. The module is left as it was.

        Args:
            views: V views, each float (B, C, h, w).
            batch: what they were made of.
            labels: int64 (B), the data set's labels of these images, if it has any.

        Raises:
            UserError: the gradient with respect to the views depends on the labels.
        """
        for ask in self.branch.settling(self.method, views, batch, labels):
            ask.look(self.loss(ask.views, ask.batch))

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

    def momentum_modules(self) -> Sequence[nn.Module]:
        """Return the momentum branch as it is now; a step may have replaced its modules."""
        return self.branch.modules()

    def encoder(self) -> nn.Module:
        """Return the module whose output is the representation.

        Raises:
            UserError: none of the usual names is there.
        """
        networks = named_networks(self.module)
        for depth in range(3):
            for wanted in ENCODER_NAMES:
                for name, network in networks.items():
                    path = name.split(".")
                    if path[depth:] == [wanted] and not _is_container(network):
                        return network
        raise UserError(
            f"{self.method} has no encoder under the usual names ({', '.join(ENCODER_NAMES)}); "
            "pass encoder=… to KNNMonitor."
        )

    @torch.no_grad()
    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Return features (B, D) of normalised images in eval mode."""
        encoder = self.encoder()
        modes = {child: child.training for child in encoder.modules()}
        encoder.eval()
        try:
            with self._precision():
                features: Tensor = encoder(images_BCHW)
        finally:
            for child, training in modes.items():
                child.training = training
        return features.flatten(1).float()

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


def _is_container(network: nn.Module) -> bool:
    """Tell a module without a forward of its own from one that can be called."""
    return type(network).forward is nn.Module.forward
