"""Differentially private SGD by Opacus, for a module whose loss is a mean over single images."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cp_plugin.config.defences import DpSgdConfig
from cp_plugin.config.settings import UserError
from cp_plugin.util.internals import BatchNormBase

FEWEST = 16
"""Images a batch on average; with fewer, Poisson sampling may draw none."""
GROUPS = 32
"""Of group normalisation, where the channels can be divided so (Wu, He, ECCV 2018)."""
ACCOUNTANT = "rdp"
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Copied(nn.Module):
    """Returns a copy: what follows may write in place, which Opacus' hooks do not bear."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the copy."""
        return x.clone()


def with_group_norm(module: nn.Module) -> nn.Module:
    """Exchange batch normalisation for group normalisation, in place, and return the module.

    The gradient of an image may depend on no other image of its batch. Weights and biases of the
    layers are taken over; activations stop writing in place.

    Args:
        module: with or without such layers.

    Raises:
        UserError: a batch normalisation that does more than normalise.
    """
    if type(module) in BATCH_NORMS:
        return _group_norm(module)
    if isinstance(module, BatchNormBase):
        raise UserError(
            f"defence=dp_sgd cannot exchange {type(module).__name__} for group normalisation; use "
            "a backbone with plain BatchNorm (timm/resnet18) or without any (a timm ViT)."
        )
    if hasattr(module, "inplace"):
        setattr(module, "inplace", False)  # noqa: B010
    for name, child in module.named_children():
        setattr(module, name, with_group_norm(child))
    return module


def _group_norm(layer: Any) -> nn.Module:
    channels = layer.num_features
    norm = nn.GroupNorm(math.gcd(GROUPS, channels), channels, eps=layer.eps, affine=layer.affine)
    if layer.affine:
        norm.weight, norm.bias = layer.weight, layer.bias
    return nn.Sequential(norm, Copied())


class Private:
    """What makes the training of a module private; undone by `stop`."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        config: DpSgdConfig,
        images: int,
        batch_size: int,
        steps: int,
    ) -> None:
        """Hook the module for gradients of single images; choose the noise that spends the budget.

        Args:
            module: without batch normalisation, see `with_group_norm`.
            optimizer: of the module's parameters.
            config: the budget.
            images: in the data set.
            batch_size: images a batch on average.
            steps: of the whole training.

        Raises:
            UserError: Opacus is missing or refuses, or the batch is too small.
        """
        require_opacus()
        from opacus import GradSampleModule
        from opacus.accountants import create_accountant
        from opacus.accountants.utils import get_noise_multiplier
        from opacus.optimizers import DPOptimizer

        if batch_size < FEWEST or batch_size >= images:
            raise UserError(
                f"defence=dp_sgd draws each image by chance, which needs batches of at least "
                f"{FEWEST} images and fewer than the data set has; got {batch_size} of {images}."
            )
        self.config, self.sample_rate = config, batch_size / images
        self.steps, self.images = steps, images
        try:
            with warnings.catch_warnings():  # the search passes noises that it does not choose
                warnings.filterwarnings("ignore", message="Optimal order is the")
                self.noise_multiplier = float(
                    get_noise_multiplier(
                        target_epsilon=config.epsilon,
                        target_delta=config.delta,
                        sample_rate=self.sample_rate,
                        steps=steps,
                        accountant=ACCOUNTANT,
                    )
                )
            self._hooked = GradSampleModule(module)
        except (ValueError, NotImplementedError) as error:
            raise UserError(f"defence=dp_sgd is refused by Opacus: {error}") from error
        self.accountant = create_accountant(ACCOUNTANT)
        self.optimizer = DPOptimizer(
            optimizer,
            noise_multiplier=self.noise_multiplier,
            max_grad_norm=config.max_grad_norm,
            expected_batch_size=batch_size,
        )
        hook = self.accountant.get_optimizer_hook_fn(sample_rate=self.sample_rate)
        self.optimizer.attach_step_hook(hook)

    def sampler(self, steps: int, seed: int) -> Any:
        """Return a batch sampler that draws each image by chance, for an epoch of some steps."""
        from opacus.utils.uniform_sampler import UniformWithReplacementSampler

        return UniformWithReplacementSampler(
            num_samples=self.images,
            sample_rate=self.sample_rate,
            generator=torch.Generator().manual_seed(seed),
            steps=steps,
        )

    def facts(self) -> dict[str, float]:
        """Return what has been spent: `epsilon_spent` at `delta`, and the noise."""
        spent = self.accountant.get_epsilon(self.config.delta) if len(self.accountant) else 0.0
        return {"epsilon_spent": float(spent), "noise_multiplier": self.noise_multiplier}

    def stop(self) -> None:
        """Take the hooks off the module."""
        self._hooked.to_standard_module()


def require_opacus() -> None:
    """Check that Opacus is there.

    Raises:
        UserError: it is not.
    """
    try:
        import opacus  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            'defence=dp_sgd needs Opacus; install it with `pip install "cp-plugin[dp]"`.'
        ) from error
