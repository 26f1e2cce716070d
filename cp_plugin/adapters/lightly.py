"""Any LightningModule that computes its SSL loss in `training_step`: Lightly's style, and our engine's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from cp_plugin.adapters.momentum import find_momentum_modules
from cp_plugin.config import UserError
from cp_plugin.host import Batch

ENCODER_NAMES = ("backbone", "encoder", "online_backbone", "student_backbone", "online_encoder")


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
            UserError: the module optimises by hand, or `momentum_modules` names no submodule.
        """
        if not module.automatic_optimization:
            raise UserError(
                f"{type(module).__name__} optimises by hand (automatic_optimization=False); its "
                "training_step would train in the noise phase. Return the loss instead, or use "
                "a module that returns it."
            )
        self.module: nn.Module = module
        self.method = type(module).__name__
        self._with_views = with_views
        self._precision = precision
        self._momentum = find_momentum_modules(module, momentum_modules)
        parameters = inspect.signature(module.training_step).parameters
        self._extra = (0,) if len(parameters) > 1 else ()

    @property
    def momentum_names(self) -> tuple[str, ...]:
        """Names of the momentum branch's modules."""
        return tuple(self._momentum)

    @property
    def device(self) -> torch.device:
        """Where the module is."""
        return next(self.module.parameters()).device

    def loss(self, views: Sequence[Tensor], batch: Batch) -> Tensor:
        """Return the loss of the module's own `training_step` on these views."""
        with self._precision():
            step: Any = self.module.training_step
            output = step(self._with_views(batch.sample, views), *self._extra)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise UserError(
                f"{self.method}.training_step must return the loss or a dict with `loss`, "
                f"got {type(output).__name__}."
            )
        return loss

    def momentum_modules(self) -> Sequence[nn.Module]:
        """Return the modules of the momentum branch."""
        return list(self._momentum.values())

    def encoder(self) -> nn.Module:
        """Return the module whose output is the representation.

        Raises:
            UserError: none of the usual names is there.
        """
        for name in ENCODER_NAMES:
            if isinstance(encoder := getattr(self.module, name, None), nn.Module):
                return encoder
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
