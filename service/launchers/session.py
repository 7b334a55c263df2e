"""One run in a session of its own: watched, stopped in steps, and cleaned up after.

mpirun starts each rank in a process group of its own, but in its own session: what a run has started is
found by session id, whoever its parent is by now.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from dlrm.errors import STOPPED, LaunchError

KNOWN_CODES = frozenset({0, 1, 2, 3, 4, 5, 6, 7, 8, STOPPED})
"""Exit codes that the engine chooses itself (dlrm/errors.py); any other one is a rank's death."""

MPI_FOLDER = "PRTE_MCA_prte_local_tmpdir_base"
"""Where mpirun of Open MPI 5 keeps its files; other starters do not know the variable.

By default it is a folder in /tmp of mpirun's process id. One that was killed leaves it there, and the next mpirun that
gets the same id ends at once with exit code 213 ("listener thread failed to start").
"""

_LOOK_SECONDS = 0.1
_LAST_WORDS_SECONDS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Grace:
    """How long each step of a stop waits, in seconds."""

    checkpoint: float = 60.0
    """From SIGUSR1 until SIGTERM."""
    terminate: float = 10.0
    """From SIGTERM until SIGKILL."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where the run's progress records appear, and the bytes that were there before it began."""

    path: Path
    start: int = 0

    @classmethod
    def of(cls, run_directory: Path) -> Progress:
        """The records that a run about to start will write."""
        path = run_directory / "progress.jsonl"
        return cls(path=path, start=path.stat().st_size if path.is_file() else 0)

    def begun(self) -> bool:
        """Whether the run has written a record."""
        try:
            return self.path.stat().st_size > self.start
        except OSError:
            return False


class Session:
    """A program in a session of its own.

    A stop goes in steps: SIGUSR1, which ranks answer with a checkpoint and exit code 75; SIGTERM; SIGKILL to
    every process of the session. Before the first progress record the ranks may still be importing and have
    no handler for SIGUSR1, so that the stop begins with SIGTERM. Once the program has ended, whatever it left
    behind is killed.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        progress: Progress,
        grace: Grace,
        cwd: Path | None = None,
        output: IO[bytes] | None = None,
        read_errors: bool = False,
    ) -> None:
        """Start it.

        Args:
            command: program and arguments.
            env: the whole environment.
            progress: tells whether the ranks listen for SIGUSR1.
            grace: the steps of a stop.
            cwd: folder to start in.
            output: takes both standard output and standard error; ``None``: inherited.
            read_errors: standard error is for the caller to read, from ``errors``.

        Raises:
            LaunchError: the program cannot be started.
        """
        self._progress = progress
        self._grace = grace
        self._asked = 0
        self._seen = 0
        self._next_step = 0.0
        self._sent: signal.Signals | None = None
        try:
            with contextlib.ExitStack() as folder:
                made = tempfile.TemporaryDirectory(prefix="crosslane-mpi-", ignore_cleanup_errors=True)
                self._process = subprocess.Popen(
                    list(command),
                    env={**env, MPI_FOLDER: folder.enter_context(made)},
                    cwd=cwd,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.PIPE if read_errors else subprocess.STDOUT if output else None,
                    start_new_session=True,
                )
                self._mpi_folder = folder.pop_all()
        except OSError as error:
            raise LaunchError(f"{command[0]}: cannot be started ({error.strerror or error})") from None
        self._ended = threading.Event()
        threading.Thread(target=self._reap, daemon=True, name="session").start()

    @property
    def id(self) -> int:
        """Session id, which is also the program's process id."""
        return self._process.pid

    @property
    def errors(self) -> IO[bytes]:
        """Standard error of the program and of all that it starts; it ends with the last of them."""
        assert self._process.stderr is not None, "made without read_errors"
        return self._process.stderr

    @property
    def stop_asked(self) -> bool:
        """Whether a stop was asked for."""
        return self._asked > 0

    def ask_to_stop(self, *, hasten: bool = False) -> None:
        """Begin the stop; with ``hasten`` every further call goes on to the next step at once.

        Only counts, so that signal handlers may call it.
        """
        self._asked = self._asked + 1 if hasten else max(self._asked, 1)

    def wait(self) -> int:
        """Wait for the end, carry out stops, end what is left; returns the exit code (128 + n for signal n)."""
        while not self._ended.wait(_LOOK_SECONDS):
            self._step(time.monotonic())
        end_session(self.id, patience=_LAST_WORDS_SECONDS)
        self._mpi_folder.close()
        code = self._process.returncode
        return 128 - code if code < 0 else code

    def _reap(self) -> None:
        self._process.wait()
        self._ended.set()

    def _step(self, now: float) -> None:
        if not self._asked or self._sent == signal.SIGKILL:
            return
        hurried = self._asked > self._seen
        if not hurried and now < self._next_step:
            return
        self._seen = self._asked
        if self._sent is None and self._progress.begun():
            self._send(signal.SIGUSR1, now + self._grace.checkpoint)
        elif self._sent in {None, signal.SIGUSR1}:
            self._send(signal.SIGTERM, now + self._grace.terminate)
        else:
            self._sent = signal.SIGKILL
            end_session(self.id, patience=0.0)

    def _send(self, number: signal.Signals, next_step: float) -> None:
        self._sent = number
        self._next_step = next_step
        self._process.send_signal(number)


def session_members(session: int) -> list[int]:
    """Process ids of a session that still run (a zombie does not)."""
    members = []
    for pid in psutil.pids():
        try:
            if os.getsid(pid) == session and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                members.append(pid)
        except (OSError, psutil.Error):  # ended in between, or not ours to look at
            continue
    return members


def end_session(session: int, *, patience: float, limit: float = 10.0) -> bool:
    """SIGKILL whatever is left of a session.

    Args:
        session: its id.
        patience: seconds in which it may end by itself.
        limit: seconds after which to give up.

    Returns:
        Whether nothing is left.
    """
    begun = time.monotonic()
    while members := session_members(session):
        waited = time.monotonic() - begun
        if waited > patience + limit:
            return False
        if waited >= patience:
            for pid in members:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return True


def exit_code_of(raw: int, *, stopped_by: signal.Signals | None = None) -> int:
    """What the end of a run means, as an exit code of ours.

    Args:
        raw: the program's (128 + n for signal n).
        stopped_by: the signal that asked for the stop, if one did.

    Returns:
        The engine's own code where it chose it; 128 + the signal for a stop that left no checkpoint; otherwise
        ``LaunchError``'s, since starters report a rank's death in their own ways (Open MPI 137, MPICH 9).
    """
    chosen = raw in KNOWN_CODES
    if stopped_by is not None and (not chosen or raw == 1):
        return 128 + stopped_by
    return raw if chosen else LaunchError.exit_code
