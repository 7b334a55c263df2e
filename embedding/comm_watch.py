"""A thread that ends a run when a communicator of GPUs has failed while nobody was calling it.

A kernel that waits for a rank which has gone waits for ever, and so does the host behind it.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from dlrm.errors import CommError
from embedding.comm import Comm

WATCH_INTERVAL_S = 1.0
"""Between two looks at the communicators."""
_GRACE_S = 2.0
"""For the first words of other ranks, and for a rank that is ending in an orderly way."""


class Watch:
    """A thread that looks for errors of communicators while nobody calls them, and ends the run then.

    Args:
        host: all ranks; ``abort`` ends them.
        error_of: what went wrong with a communicator, or ``None``.
        interval_s: between two looks.
        end: what to do with the sentence that says what happened; ``None``: print it and end all ranks.
    """

    def __init__(
        self,
        host: Comm,
        error_of: Callable[[Any], str | None],
        interval_s: float = WATCH_INTERVAL_S,
        end: Callable[[str], None] | None = None,
    ) -> None:
        self._host, self._error_of, self._interval_s = host, error_of, interval_s
        self._end = self._end_run if end is None else end
        self._comms: list[Any] = []
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._look, name="nccl-watch", daemon=True)
        self._thread.start()

    def add(self, comm: Any) -> None:
        """Watch a communicator, too."""
        with self._lock:
            self._comms.append(comm)

    def drop(self, comm: Any) -> None:
        """Look at it no longer; it may be destroyed when this returns."""
        with self._lock:
            self._comms.remove(comm)

    def stop(self) -> None:
        """End the thread; harmless to call twice."""
        self._stopping.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stopping.wait(self._interval_s):
            with self._lock:
                errors = [found for comm in self._comms if (found := self._error_of(comm)) is not None]
            if errors:
                self._end(
                    f"NCCL: rank {self._host.rank} of {self._host.size}: {errors[0]}; a rank has ended or a link is "
                    "cut: look at the other ranks' messages, and resume from the last checkpoint"
                )
                return

    def _end_run(self, sentence: str) -> None:
        # With its line end in one piece: other threads and ranks write there, too.
        print(f"error: {sentence}\n", end="", file=sys.stderr, flush=True)
        self._stopping.wait(_GRACE_S)
        # The main thread may hang in a call of CUDA: nothing but the launcher ends it for certain.
        killer = threading.Timer(2 * _GRACE_S, os._exit, [CommError.exit_code])
        killer.daemon = True
        killer.start()
        with suppress(BaseException):
            self._host.abort(CommError.exit_code)
        os._exit(CommError.exit_code)
