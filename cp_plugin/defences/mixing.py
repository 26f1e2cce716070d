"""Mixup and CutMix by torchvision, for any number of views of one batch of labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from cp_plugin.config.defences import CutmixConfig, MixupConfig
from cp_plugin.config.settings import UserError


class Mixing:
    """Mixes the images of a batch, and their labels alike.

    All views get the same partners and weights. In plain PyTorch `torchvision.transforms.v2.MixUp`
    and `CutMix` do the same to one view.

    Source: Zhang et al., "mixup", ICLR 2018; Yun et al., "CutMix", ICCV 2019.
    """

    def __init__(self, config: MixupConfig, classes: int) -> None:
        """Take the settings.

        Args:
            config: a `MixupConfig`; a `CutmixConfig` for CutMix.
            classes: how many classes there are.
        """
        kind = v2.CutMix if isinstance(config, CutmixConfig) else v2.MixUp
        self._mix = kind(alpha=config.alpha, num_classes=classes, labels_getter=_last)

    def __call__(self, views: Sequence[Tensor], labels_B: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return mixed views, and labels as float (B, K) whose rows sum to 1.

        Args:
            views: V views, each float (B, C, h, w).
            labels_B: int64 (B), none negative.

        Raises:
            UserError: an image has no label.
        """
        if bool((labels_B < 0).any()):
            raise UserError(
                "mixup and cutmix mix labels, but a batch has images without one (label -1); use "
                "labelled data, or another defence."
            )
        *mixed, labels = self._mix(*(tv_tensors.Image(view) for view in views), labels_B)
        return [view.as_subclass(torch.Tensor) for view in mixed], labels


def _last(inputs: Sequence[Tensor]) -> Tensor:
    return inputs[-1]
