"""Lines of a long noise phase."""

from __future__ import annotations

import logging
from typing import Any

from cp_plugin.attack import progress


def test_a_long_phase_tells_how_far_it_is_and_a_short_one_nothing(monkeypatch, caplog):
    clock = iter(range(0, 1_000, 50))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    batches: list[Any] = ["a", "b", "c", "d"]
    with caplog.at_level(logging.INFO, "cp_plugin"):
        assert list(progress.told(batches, 4)) == batches
    assert [record.getMessage() for record in caplog.records] == [
        "noise phase: batch 2 of 4, 100 s left",
        "noise phase: batch 4 of 4, 0 s left",
    ]
    caplog.clear()
    monkeypatch.setattr(progress.time, "monotonic", lambda: 0.0)
    with caplog.at_level(logging.INFO, "cp_plugin"):
        assert list(progress.told(batches, 4)) == batches
    assert not caplog.records
