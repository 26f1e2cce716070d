"""Defences of stock solo-learn victims, from its own YAML."""

from __future__ import annotations

import pytest

pytestmark = [
    # Stock solo-learn, timm and Lightning warn of their own uses of what is deprecated.
    pytest.mark.filterwarnings("ignore"),
]


@pytest.mark.parametrize(
    ("yaml", "name", "settings"),
    [
        ("cifar/simclr", "adversarial", ("defence.steps=1",)),
        ("cifar/byol", "matrix_completion", ("defence.iterations=5",)),
    ],
)
def test_a_stock_victim_is_defended_and_named_so(yaml, name, settings, stock, solo_data, tmp_path):
    ran = stock.pretrain(yaml, *solo_data, f"+defence={name}", *settings, "checkpoint.dir=runs")
    assert ran.code == 0, ran.err
    (checkpoint,) = (tmp_path / "runs").rglob("*.ckpt")
    assert f"-none-{name}-" in checkpoint.name


@pytest.mark.parametrize("name", ["mixup", "dp_sgd"])
def test_what_needs_labels_is_refused_before_training(name, stock, solo_data, tmp_path):
    ran = stock.pretrain("cifar/simclr", *solo_data, f"+defence={name}", "checkpoint.dir=runs")
    assert ran.code == 2
    assert f"defence={name}" in ran.err
    assert "the loss of simclr" in ran.err
    assert not (tmp_path / "runs").exists()
