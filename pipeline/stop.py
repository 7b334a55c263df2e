"""A graceful stop: a signal sets a flag, and the ranks agree on it at the next step (standard library only).

mpirun forwards SIGUSR1 to every rank and waits; its own SIGTERM leaves no time to save. A single process
takes SIGTERM too. Installed first of all, since an unhandled SIGUSR1 ends a process that is still importing.
"""

from __future__ import annotations

import signal
from types import FrameType

_requested = False


def install(*, single: bool) -> None:
    """Catch SIGUSR1, and for a single process SIGTERM and SIGINT; a second SIGINT interrupts at once."""
    signal.signal(signal.SIGUSR1, _request)
    if single:
        signal.signal(signal.SIGTERM, _request)
        signal.signal(signal.SIGINT, _request)


def requested() -> bool:
    """Whether a stop was asked for."""
    return _requested


def _request(number: int, _frame: FrameType | None) -> None:
    global _requested
    if _requested and number == signal.SIGINT:
        raise KeyboardInterrupt
    _requested = True
