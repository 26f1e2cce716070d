"""Fixtures of the tests on methods of solo-learn and stable-pretraining."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture
def double_precision() -> Iterator[None]:
    """New tensors are float64, as finite differences need it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def methods(solo_learn: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """solo-learn's methods by name; skips where its own requirements are not installed."""
    monkeypatch.syspath_prepend(solo_learn)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its old imports
        return pytest.importorskip("solo.methods", reason="solo-learn's own requirements").METHODS


@pytest.fixture
def spt_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of its own: stable-pretraining's default callbacks write there and into a cache."""
    spt = importlib.import_module("stable_pretraining")
    before = spt.get_config().cache_dir
    monkeypatch.chdir(tmp_path)
    spt.set(cache_dir=str(tmp_path / "cache"))
    yield
    spt.set(cache_dir=before)
