"""Lines of a long loop."""

from __future__ import annotations

import logging

from cp_plugin.util import timing


def test_a_long_loop_tells_how_far_it_is_and_a_short_one_nothing(monkeypatch, caplog):
    clock = iter(range(0, 1_000, 50))
    monkeypatch.setattr(timing.time, "monotonic", lambda: float(next(clock)))
    items = ["a", "b", "c", "d"]
    with caplog.at_level(logging.INFO, "cp_plugin"):
        assert list(timing.told("noise phase", items, 4, 60)) == items
    assert [record.getMessage() for record in caplog.records] == [
        "noise phase: 2 of 4, 100 s left",
        "noise phase: 4 of 4, 0 s left",
    ]
    caplog.clear()
    monkeypatch.setattr(timing.time, "monotonic", lambda: 0.0)
    with caplog.at_level(logging.INFO, "cp_plugin"):
        assert list(timing.told("noise phase", items, 4, 60)) == items
    assert not caplog.records
