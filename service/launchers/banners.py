"""Open MPI's words about an end that the engine has explained already: held back, so that one sentence is left.

An abort, or an exit code other than 0, makes mpirun print up to three framed texts after the engine's own error.
What tells something new is not held back; which rank was killed is told in a sentence instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

_FRAME = re.compile(r"-{60,}")
_DEATH = re.compile(r"process rank (\d+) with PID (\d+) on node (\S+) exited on signal (\d+ \([^)]*\))")
_LONGEST_BLOCK = 30
_KNOWN = (
    "MPI_ABORT was invoked on rank",
    'calling "abort"',
    "exited with non-zero status",
    "returned a non-zero exit code",
    "sent help message help-mpi-api.txt / mpi-abort",
    "base_help_aggregate",
)


class BannerFilter:
    """Passes lines on, but keeps framed texts that only repeat how the run ended, or that ``death`` says shorter.

    Attributes:
        held: the texts that were kept, for an end that the engine did not explain after all.
        death: which rank died, and how, where mpirun has told; it tells of one.
    """

    def __init__(self, show: Callable[[str], object]) -> None:
        """Pass lines on to ``show``, each with its line end."""
        self.held: list[str] = []
        self.death: str | None = None
        self._show = show
        self._block: list[str] = []

    def feed(self, lines: Iterable[str]) -> None:
        """Sort the lines as they come; whatever is open at their end is decided then."""
        for line in lines:
            self._sort(line.replace("\0", ""))  # prterun ends its last words with one
        self._close()

    def _sort(self, line: str) -> None:
        frame = _FRAME.fullmatch(line.rstrip()) is not None
        # The ranks' lines may come in the middle of a text of mpirun's.
        if not line or (not frame and (not self._block or line.startswith("error:"))):
            self._decide(line)
            return
        self._block.append(line)
        if (frame and len(self._block) > 1) or len(self._block) > _LONGEST_BLOCK:
            self._close()

    def _close(self) -> None:
        block, self._block = "".join(self._block), []
        self._decide(block)

    def _decide(self, text: str) -> None:
        words = " ".join(text.split())  # it wraps its sentences
        if text.startswith("error:"):
            self._show(text)
        elif found := _DEATH.search(words):
            rank, pid, node, how = found.groups()
            self.death = f"rank {rank} (process {pid} on {node}) was ended by signal {how}"
            self.held.append(text)
        elif any(known in words for known in _KNOWN):
            self.held.append(text)
        elif text:
            self._show(text)
