"""Fixtures of the tests on solo-learn's methods."""

from __future__ import annotations

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
