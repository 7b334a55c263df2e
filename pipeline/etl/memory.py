"""How much memory a preparation may take, and what of it is left for tables."""

from __future__ import annotations

import re

from dlrm.errors import ConfigError
from pipeline.host_memory import default_memory_limit, held_memory

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_BINARY = {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", re.IGNORECASE)
_PIECE_BYTES = 6
"""A byte of text on its way takes itself, its numbers and its rows."""
_RESERVE = 96 << 20
"""Writing Parquet, sorting marks, and what the allocator keeps."""
LEAST_FOR_TABLES = 64 << 20


def parse_size(option: str, text: str | None) -> int | None:
    """Bytes of ``2GiB``, ``500M`` and the like; ``None`` stays.

    Raises:
        ConfigError: it is no size.
    """
    if text is None:
        return None
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{option}: {text!r} must be a number with B, MB, MiB, GB or GiB behind it, such as 2GiB")
    unit = (match[2] or "").lower()
    return int(float(match[1]) * (_UNITS | _BINARY)[unit])


def table_budget(limit_bytes: int | None, *, local_ranks: int, pieces: int, piece_bytes: int) -> int:
    """What this process may put into tables.

    Args:
        limit_bytes: of all ranks on this machine; ``None``: what they hold already and half of what is free.
        local_ranks: ranks on this machine.
        pieces: of text that are under way at once.
        piece_bytes: of one.

    Raises:
        ConfigError: the limit leaves too little.
    """
    if limit_bytes is None:
        limit_bytes = default_memory_limit(local_ranks)
    fixed = held_memory() + pieces * piece_bytes * _PIECE_BYTES + _RESERVE
    left: int = limit_bytes // local_ranks - fixed
    if left < LEAST_FOR_TABLES:
        least = (fixed + LEAST_FOR_TABLES) * local_ranks
        raise ConfigError(
            f"memory limit: {limit_bytes / 2**20:.0f} MiB, but {local_ranks} rank(s) need at least "
            f"{least / 2**20 + 1:.0f} MiB"
        )
    return left
