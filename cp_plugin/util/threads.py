"""Many files read and written in threads, since that leaves Python's lock most of the time."""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

MOST = 4
"""Threads at most: each holds a whole picture."""
T = TypeVar("T")
R = TypeVar("R")


def in_threads(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Apply a function to items in as many threads as there are processors, four at most.

    Args:
        function: may warn and may use torch, each of whose calls then has one thread.
        items: few of them are taken before their results are asked for.

    Yields:
        The results, in the order of the items.
    """
    threads = min(MOST, _processors())
    waiting: deque[Future[R]] = deque()
    with _one_thread_a_call(), _warnings_kept(), ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _processors() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def _one_thread_a_call() -> Iterator[None]:
    """Let each call of torch use one thread, so that threads of ours do not wait for its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _warnings_kept() -> Iterator[None]:
    """Keep the filters of warnings: threads that change them for a while restore each other's."""
    with warnings.catch_warnings():
        yield
