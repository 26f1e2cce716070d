"""What every host that is a torch module has in common: its momentum branch and its encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from cp_plugin.config.settings import UserError
from cp_plugin.data.batch import Batch
from cp_plugin.hosts.branch import Branch
from cp_plugin.hosts.momentum import find_momentum_modules, inside
from cp_plugin.hosts.observe import named_networks
from cp_plugin.hosts.protocol import Host, LossRequests

ENCODER_NAMES = (
    (
        *("backbone", "encoder", "online_backbone", "student_backbone", "online_encoder"),
        *("student_encoder", "query_backbone", "encoder_q", "backbone_q"),
    ),
    ("online", "student", "model", "network", "net", "resnet", "vit"),
)
"""What encoders are called: names that mean it first, wherever they stand, then names that may."""


class ModuleHost(Host):
    """A module that owns a method, but for the way to its loss."""

    framework = "pytorch"

    def __init__(
        self,
        module: nn.Module,
        method: str,
        momentum_modules: str | Sequence[str] = "auto",
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Wrap a module.

        Args:
            module: it owns every parameter and buffer of the method.
            method: its name.
            momentum_modules: names of the momentum branch's modules, or `auto`.
            precision: makes the context that casts as training does.

        Raises:
            UserError: `momentum_modules` names no network of the module.
        """
        self.module = module
        self.method = method
        self.branch = Branch(module, momentum_modules)
        self.encoder_name: str | None = None
        """Dotted name of the encoder; None: the first under the usual names."""
        self._precision = precision

    def loss(self, views: Sequence[Tensor], batch: Batch) -> Tensor | None:
        """Return the loss of the views; each kind of host has its own way to it."""
        raise NotImplementedError

    def checking_labels(
        self, views: Sequence[Tensor], batch: Batch, labels: Tensor | None
    ) -> LossRequests:
        """Check, on one batch, that the gradient of the views is the same whatever labels are.

        Args:
            views: V views, each float (B, C, h, w).
            batch: what they were made of.
            labels: int64 (B), the data set's labels of these images, if it has any.

        Raises:
            UserError: it is not.
        """
        return self.branch.checking_labels(self.method, views, batch, labels)

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

    def momentum_modules(self) -> Sequence[nn.Module]:
        """Return the momentum branch as it is now; a step may have replaced its modules."""
        return self.branch.modules()

    def move_momentum(self) -> bool:
        """Move the momentum branch as after an optimiser step; return whether that is possible.

        The module's own `move_momentum()` does it. A module without one may move its branch in
        `training_step`.
        """
        move = getattr(self.module, "move_momentum", None)
        if not callable(move):
            return False
        move()
        return True

    def encoder(self) -> nn.Module:
        """Return the module whose output is the representation.

        Raises:
            UserError: there is no network of the name given, or none of the usual names.
        """
        networks = named_networks(self.module)
        if self.encoder_name is not None:
            if self.encoder_name not in networks:
                raise UserError(
                    f"{self.method} has no network called {self.encoder_name!r}; known: "
                    f"{', '.join(name for name in networks if '.' not in name)}."
                )
            return networks[self.encoder_name]
        momentum = {**find_momentum_modules(self.module), **self.branch.found}
        online = {name: net for name, net in networks.items() if not inside(name, momentum)}
        for known in (online, networks):
            for names in ENCODER_NAMES:
                for wanted in names:
                    for name, network in known.items():
                        if name.rpartition(".")[2] == wanted and not _is_container(network):
                            return network
        raise UserError(
            f"{self.method} has no encoder under the usual names "
            f"({', '.join(ENCODER_NAMES[0])}); name it with KNNMonitor(encoder=…)."
        )

    @torch.no_grad()
    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Return features (B, D) of normalised images, wherever these are, in eval mode.

        Raises:
            UserError: what the encoder returns holds no features.
        """
        encoder = self.encoder()
        modes = {child: child.training for child in encoder.modules()}
        encoder.eval()
        try:
            return self.features(images_BCHW)
        finally:
            for child, training in modes.items():
                child.training = training

    def features(self, images_BCHW: Tensor) -> Tensor:
        """Return what `encode` does, with its gradient, in the mode that the encoder is in."""
        encoder = self.encoder()
        with self._precision():
            returned = encoder(_of_weights(images_BCHW, encoder))
        return _features(returned, encoder).flatten(1).float()


def _features(returned: Any, encoder: nn.Module) -> Tensor:
    """Return the features in what an encoder returns, (B, …).

    A model of Hugging Face's returns its last hidden state: that of the class token of a
    transformer, the mean over places of a convolutional network.
    """
    if isinstance(returned, Tensor):
        return returned
    hidden = getattr(returned, "last_hidden_state", None)
    if isinstance(hidden, Tensor):
        return hidden.flatten(2).mean(2) if hidden.ndim == 4 else hidden[:, 0]
    raise UserError(
        f"the encoder {type(encoder).__name__} returns {type(returned).__name__}, and features are "
        "read from a tensor or from last_hidden_state; name another network with "
        "KNNMonitor(encoder=…)."
    )


def _of_weights(images: Tensor, encoder: nn.Module) -> Tensor:
    """Return images where an encoder's weights are and in their type, half or double too."""
    weights = (weight for weight in encoder.parameters() if weight.is_floating_point())
    first = next(weights, None)
    return images if first is None else images.to(first.device, first.dtype)


def _is_container(network: nn.Module) -> bool:
    """Tell a module without a forward of its own from one that can be called."""
    return type(network).forward is nn.Module.forward
