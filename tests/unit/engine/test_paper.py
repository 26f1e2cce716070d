"""`+paper=NAME` stands for the settings of He, Zha and Katabi (ICLR 2023)."""

from __future__ import annotations

import pytest
import timm
from torch import nn

from cp_plugin.apps.hydra_app import compose
from cp_plugin.engine import build_method, complete


@pytest.mark.parametrize(
    ("method", "lr", "decay"),  # the authors' settings and the factors of their losses
    [
        ("simclr", 0.5 * 0.5 / 0.07, 1e-4 / (0.5 / 0.07)),
        ("mocov2plus", 0.3 * 0.2 / 0.07, 1e-4 / (0.2 / 0.07)),
        ("byol", 1.0, 1e-4),
    ],
)
def test_the_papers_settings(method: str, lr: float, decay: float) -> None:
    cfg = complete(compose(method, [f"+paper={method}", "+poison=cp_class"]))
    assert cfg.data.dataset == "cifar10"
    assert (cfg.optimizer.batch_size, cfg.max_epochs) == (512, 1000)
    assert cfg.optimizer.lr == pytest.approx(lr, rel=0.01)
    assert cfg.optimizer.weight_decay == pytest.approx(decay, rel=0.01)
    backbone = build_method(cfg, 32).backbone
    whole = timm.create_model("resnet18", num_classes=0)
    # The stem for small images is 3 x 3 instead of 7 x 7.
    assert count(whole) - count(backbone) == 64 * 3 * (7 * 7 - 3 * 3)


def count(module: nn.Module) -> int:
    """Return the number of weights."""
    return sum(weight.numel() for weight in module.parameters())
