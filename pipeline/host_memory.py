"""How much memory the machine has left, and how much of it a process takes unless it is told."""

from __future__ import annotations

import os
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_STATM = Path("/proc/self/statm")


def available_memory() -> int:
    """Bytes that programs can still get without swapping.

    Read where Linux tells it; elsewhere psutil is asked, which training needs for nothing else on one machine.
    """
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return 1024 * int(rest.split()[0])
    import psutil

    return int(psutil.virtual_memory().available)


def held_memory() -> int:
    """Bytes of memory that this process holds (its resident set)."""
    try:
        return int(_STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import psutil

        return int(psutil.Process().memory_info().rss)


def default_memory_limit(processes: int = 1) -> int:
    """Bytes that a command may take unless it is told: what it holds already, and half of what is free.

    Without the first part a process that holds much would be refused for what it can no longer give back.

    Args:
        processes: of the command on this machine; each is taken to hold as much as this one.
    """
    return held_memory() * processes + available_memory() // 2
