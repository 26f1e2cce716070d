"""How much memory is left on the machine, or in the container that the process runs in."""

from __future__ import annotations

import os
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
UNLIMITED = 1 << 60


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
