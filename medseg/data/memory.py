"""How much memory this process may still take, containers' limits respected."""

from __future__ import annotations

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
"""Where Linux tells the limits of a container: files of version 2 here, of version 1 in its folder `memory`."""
_LIMITS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
"""Limit, usage, and where the usage tells how much of it are files that were read and can be dropped."""


def available_bytes() -> int:
    """Main memory that is free or can be freed at once: the machine's, or the container's where that is less."""
    free = [_of_machine()]
    for limit, used, details, cached in _LIMITS:
        try:
            stat = dict(line.split() for line in (CGROUP / details).read_text().splitlines())
            room = int((CGROUP / limit).read_text()) - int((CGROUP / used).read_text()) + int(stat.get(cached, 0))
        except (OSError, ValueError):  # no such file; "max": no limit
            continue
        free.append(max(room, 0))
    return min(free)


def _of_machine() -> int:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:  # not Linux
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
