"""How much memory can be taken, so that data that do not fit are refused before they are read."""

from __future__ import annotations

import os
from pathlib import Path

PROC = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def available_memory() -> int | None:
    """Bytes that this process can still take: the least of what the machine has free, what its control group allows and
    what its limits of memory (RLIMIT_AS, RLIMIT_DATA) allow. None where the system says none of them."""
    found = [value for value in (_machine(), _control_group(), *_limits()) if value is not None]
    return max(0, min(found)) if found else None


def size_text(count: int) -> str:
    """Bytes in the unit that suits: 512 bytes, 3.2 MB, 47.0 GB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def _machine() -> int | None:
    try:
        lines = PROC.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, ValueError, IndexError, StopIteration):
        return None


def _control_group() -> int | None:
    try:
        limit, used = ((CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        return None if limit == "max" else int(limit) - int(used)
    except (OSError, ValueError):
        return None


def _limits() -> list[int]:
    try:
        import resource

        pages = [int(count) for count in Path("/proc/self/statm").read_text().split()]
        pairs = [(resource.RLIMIT_AS, pages[0]), (resource.RLIMIT_DATA, pages[5])]  # total size; data and stack
        limits = [(resource.getrlimit(kind)[0], used * os.sysconf("SC_PAGE_SIZE")) for kind, used in pairs]
        return [limit - used for limit, used in limits if limit != resource.RLIM_INFINITY]
    except (ImportError, OSError, ValueError, IndexError):
        return []
