"""What the operations share that is compiled: by Numba for a processor, by Triton for a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

PARTS = 8
"""Of a batch, for each thread."""


@cache
def compiled(name: str) -> Any:
    """Return a module of this package that needs Numba or Triton and takes a moment to import."""
    return import_module(f"cp_plugin.mirror.{name}")


@cache
def _installed(compiler: str) -> bool:
    return find_spec(compiler) is not None


def serves(images: Tensor) -> bool:
    """Tell whether compiled functions take these images."""
    return images.device.type == "cpu" and images.dtype == torch.float32 and _installed("numba")


def serves_device(images: Tensor) -> bool:
    """Tell whether functions compiled for a GPU take these images; torch's compiler has its own."""
    single = images.is_cuda and images.dtype == torch.float32
    return single and not torch.compiler.is_compiling() and _installed("triton")


def in_threads(run: Callable[[slice], None], length: int) -> None:
    """Call a function that leaves Python's lock alone on parts of a batch, in torch's threads.

    Numba's own threads spin while they wait, and take the processor from torch's. Torch's spin too,
    for a while: a helper that gets no processor meanwhile takes no part, and nobody waits for it.

    Args:
        run: takes the part of the batch that it works on.
        length: of the batch.
    """
    threads = torch.get_num_threads()
    each = max(1, length if threads == 1 else -(-length // (PARTS * threads)))
    parts = [slice(start, start + each) for start in range(0, length, each)]

    def work() -> None:
        while parts:
            try:
                part = parts.pop()
            except IndexError:  # another thread was faster
                return
            run(part)

    helpers = [_pool(threads).submit(work) for _ in range(min(threads, len(parts)) - 1)]
    work()
    for helper in helpers:
        if not helper.cancel():
            helper.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "cp_plugin")


# The threads of a pool do not come along into a forked process, such as a loader's worker.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)
