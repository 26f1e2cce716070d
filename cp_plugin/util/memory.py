"""How much memory is left for the process, and whether it keeps what it frees."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
UNLIMITED = 1 << 60
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's `mallopt`, by their numbers in malloc.h."""
KEPT_BYTES = 1 << 30


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


def keep_freed_memory() -> None:
    """Let the allocator keep the memory of freed tensors for the next ones, up to 1 GiB.

    glibc gives blocks of a few megabytes back to the kernel as soon as they are freed, and every
    training step on a processor pays for having them mapped and zeroed anew: about a tenth of the
    time of a small network. Only for a process of one's own; other allocators are left alone.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


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
