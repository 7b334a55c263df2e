"""How much memory the machine has left."""

from __future__ import annotations

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")


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
