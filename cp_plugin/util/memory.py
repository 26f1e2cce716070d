"""How much memory is left for the process, and whether it keeps what it frees."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
UNLIMITED = 1 << 60
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's `mallopt`, by their numbers in malloc.h."""
KEPT_BYTES = 1 << 30
MMAP_MAX, TRIM_BYTES = 65536, 128 << 10
"""Values of both that glibc starts with."""


def available_bytes() -> int:
    """Return how many bytes a process can take without others being pushed out of memory.

    On Linux that is `MemAvailable`, or what the control group leaves where that is less; elsewhere
    a half of the machine's memory.
    """
    try:
        fields = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        found = 1024 * int(fields["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return min(found, _left_in_group())


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Let the allocator keep the memory of freed tensors for the next ones, up to 1 GiB.

    glibc gives blocks of a few megabytes back to the kernel as soon as they are freed, and every
    training step on a processor pays for having them mapped and zeroed anew: about a tenth of the
    time of a small network. All that is no longer used is given back at the end. Only for a
    process of one's own; other allocators are left alone.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not (hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")):
        yield
        return
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_MAX, MMAP_MAX)
        libc.mallopt(M_TRIM_THRESHOLD, TRIM_BYTES)
        gc.collect()  # a trainer and its module refer to each other
        libc.malloc_trim(0)


def _left_in_group() -> int:
    """Return what the control group leaves; file pages that can be dropped count as left."""
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        dropped = int(stat.get("inactive_file", 0))
    except (OSError, ValueError):
        return UNLIMITED
    return UNLIMITED if limit == "max" else max(0, int(limit) - used + dropped)
