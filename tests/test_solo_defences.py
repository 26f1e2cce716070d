"""Defences of stock solo-learn victims, from its own YAML."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from solo_stock import Stock, custom

pytestmark = [
    # Stock solo-learn, timm and Lightning warn of their own uses of what is deprecated.
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture
def stock(
    solo_learn: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> Stock:
    for requirement in ("wandb", "einops", "sklearn"):
        pytest.importorskip(requirement, reason=f"solo-learn needs {requirement}")
    monkeypatch.syspath_prepend(solo_learn)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Stock(solo_learn, monkeypatch, capsys)


@pytest.fixture
def data(image_folder: Callable[..., Path]) -> tuple[str, ...]:
    return custom(image_folder("train", 3, 8), image_folder("val", 3, 4))


@pytest.mark.parametrize(
    ("yaml", "name", "settings"),
    [
        ("cifar/simclr", "adversarial", ("defence.steps=1",)),
        ("cifar/byol", "matrix_completion", ("defence.iterations=5",)),
    ],
)
def test_a_stock_victim_is_defended_and_named_so(yaml, name, settings, stock, data, tmp_path):
    ran = stock.pretrain(yaml, *data, f"+defence={name}", *settings, "checkpoint.dir=runs")
    assert ran.code == 0, ran.err
    (checkpoint,) = (tmp_path / "runs").rglob("*.ckpt")
    assert f"-none-{name}-" in checkpoint.name


@pytest.mark.parametrize("name", ["mixup", "dp_sgd"])
def test_what_needs_labels_is_refused_before_training(name, stock, data, tmp_path):
    ran = stock.pretrain("cifar/simclr", *data, f"+defence={name}", "checkpoint.dir=runs")
    assert ran.code == 2
    assert f"defence={name}" in ran.err
    assert "the loss of simclr" in ran.err
    assert not (tmp_path / "runs").exists()
