"""Work in threads: order, errors, and what is put back."""

from __future__ import annotations

import threading
import time
import warnings

import pytest
import torch

from cp_plugin.util.threads import in_threads


def test_results_come_in_the_order_of_the_items() -> None:
    def late(number: int) -> int:
        time.sleep(0.01 * (number % 3))
        return number

    assert list(in_threads(late, range(20))) == list(range(20))


def test_few_items_are_taken_ahead() -> None:
    taken: list[int] = []
    found = in_threads(taken.append, range(1000))
    next(found)
    assert len(taken) < 20
    found.close()
    assert len(taken) < 20


def test_an_error_is_the_callers() -> None:
    def fail(number: int) -> int:
        if number == 3:
            raise ValueError("three")
        return number

    with pytest.raises(ValueError, match="three"):
        list(in_threads(fail, range(100)))


def test_threads_of_torch_and_filters_of_warnings_are_put_back() -> None:
    def changed(_: int) -> tuple[int, bool]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            time.sleep(0.01)
        return torch.get_num_threads(), threading.current_thread() is threading.main_thread()

    before, filters = torch.get_num_threads(), list(warnings.filters)
    assert set(in_threads(changed, range(20))) == {(1, False)}
    assert torch.get_num_threads() == before
    assert list(warnings.filters) == filters
