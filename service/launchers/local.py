"""Runs on this machine: jobs of the service, and ``crosslane train --ranks N`` in the foreground."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any

import psutil

from dlrm.errors import LaunchError
from service.launchers.banners import BannerFilter
from service.launchers.base import Exit, Process, Running, Task, Vanished
from service.launchers.mpi import ENGINE, Mpirun, engine_command, engine_environment, find_mpirun
from service.launchers.session import KNOWN_CODES, Grace, Progress, Session, end_session, exit_code_of, session_members
from service.launchers.wrapper import EXIT, OUTPUT, READY
from service.settings import inherited_environment

__all__ = ["ENGINE", "Grace", "LocalLauncher", "Mpirun", "engine_command", "find_mpirun", "run_and_wait"]

JOB_VARIABLE = "CROSSLANE_JOB"
"""Names the job's folder in the environment of all its processes, so that strays are known as its own."""

_LAST_WORDS_SECONDS = 5.0

_CLOCK_SECONDS = 0.05  # two readings of one process's start differ by less


def run_and_wait(
    config: Path,
    ranks: int,
    run_directory: Path,
    *,
    debug: bool = False,
    threads: int | None = None,
    grace: Grace | None = None,
    engine: Sequence[str] = ENGINE,
    mpirun: Mpirun | None = None,
) -> int:
    """Run the engine in the foreground; its output goes where ours goes, without what mpirun adds to errors.

    SIGINT, SIGTERM and SIGHUP ask it to write a checkpoint and end; each further one goes on to the next step
    (SIGTERM, SIGKILL) without waiting.

    Args:
        config: the JSON config that the ranks read.
        ranks: number of ranks; 1 needs no mpirun.
        run_directory: the config's ``run.directory``, where progress records appear.
        debug: show tracebacks.
        threads: cores of one rank; ``None``: what there is, divided by the ranks.
        grace: the steps of a stop.
        engine: the interpreter's arguments that start the engine.
        mpirun: the starter; ``None``: the installed one.

    Returns:
        0 (done), 75 (stopped after a checkpoint), 128 + n (stopped by signal n without one), or that of the error
        (dlrm/errors.py); 7 if a rank died.

    Raises:
        LaunchError: the engine cannot be started.
    """
    session: Session | None = None
    received: list[signal.Signals] = []

    def relay(number: int, _frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        if session is not None:
            session.ask_to_stop(hasten=True)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    # Only the main thread may set handlers; elsewhere the caller stops the run by other means.
    main_thread = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, relay) for number in numbers} if main_thread else {}
    try:
        session = Session(
            engine_command(config.absolute(), ranks, debug=debug, engine=engine, mpirun=mpirun),
            env=engine_environment(inherited_environment(), threads=threads),
            progress=Progress.of(run_directory),
            grace=grace or Grace(),
            read_errors=True,
        )
        relayed = _Relay(session.errors)
        if received:
            session.ask_to_stop()
        raw = session.wait()
        relayed.end()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    code = exit_code_of(raw, stopped_by=received[0] if received else None)
    if debug or (raw not in KNOWN_CODES and relayed.death is None):
        sys.stderr.write("".join(relayed.held))
    if code == LaunchError.exit_code and raw != code:
        what = relayed.death or f"a rank died ({_describe(raw)}), named above"
        sentence = f"error: {what}; all ranks have ended, and the same command goes on from the last checkpoint"
        print(sentence, file=sys.stderr)
    return code


class _Relay:
    """Writes what a program says on standard error to our own, from a thread."""

    def __init__(self, source: IO[bytes]) -> None:
        self._source = source
        self._filter = BannerFilter(self._show)
        self._thread = threading.Thread(target=self._run, name="errors", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Wait for the last words."""
        self._thread.join(_LAST_WORDS_SECONDS)

    @property
    def held(self) -> list[str]:
        """What was held back."""
        return self._filter.held

    @property
    def death(self) -> str | None:
        """Which rank died, if mpirun has told."""
        return self._filter.death

    def _run(self) -> None:
        with self._source:
            self._filter.feed(line.decode("utf-8", "replace") for line in self._source)

    @staticmethod
    def _show(text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()


def _describe(raw: int) -> str:
    if raw > 128:
        with contextlib.suppress(ValueError):
            return f"exit code {raw}, {signal.Signals(raw - 128).name}"
    return f"exit code {raw}"


class LocalLauncher:
    """Starts each job under a wrapper process (service/launchers/wrapper.py) in a session of its own."""

    def __init__(self, *, grace: Grace, engine: Sequence[str] = ENGINE) -> None:
        """Remember how jobs are stopped and what is started.

        Args:
            grace: the steps of a stop.
            engine: the interpreter's arguments that start the engine.
        """
        self._grace = grace
        self._engine = tuple(engine)
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, task: Task) -> tuple[Process, int]:
        """Start a job; see ``Launcher``."""
        progress = Progress.of(task.run_directory)
        command = [
            *(sys.executable, "-m", "service.launchers.wrapper"),
            *("--directory", str(task.directory)),
            *("--progress", str(progress.path), "--progress-start", str(progress.start)),
            *("--stop-seconds", str(self._grace.checkpoint), "--kill-seconds", str(self._grace.terminate)),
            "--",
            *engine_command(task.config, task.ranks, engine=self._engine),
        ]
        environment = engine_environment(inherited_environment(), threads=task.threads, gpus=task.gpus)
        environment[JOB_VARIABLE] = str(task.directory)
        try:
            with (task.directory / OUTPUT).open("ab") as output:
                child = subprocess.Popen(
                    command,
                    env=environment,
                    cwd=task.directory,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            raise LaunchError(f"job {task.id}: its process cannot be started ({error.strerror or error})") from None
        self._children[task.id] = child
        # Not reaped yet, so that the id is still its own even if it has ended.
        return Process(child.pid, psutil.Process(child.pid).create_time()), progress.start

    def find(self, task: Task) -> Process | None:
        """The process of a job that was started but whose process was not noted."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                line = process.cmdline()
                if "service.launchers.wrapper" in line and str(task.directory) in line:
                    return Process(process.pid, process.create_time())
        return None

    def poll(self, task: Task, process: Process) -> Running | Exit | Vanished:
        """How a job is doing; a wrapper that is gone without an exit code takes its engine with it."""
        if self._alive(task.id, process):
            return Running()
        self._children.pop(task.id, None)
        ended = read_exit(task.directory)  # only now: the wrapper writes it last of all
        if ended is not None:
            return ended
        if psutil.boot_time() > process.created:
            return Vanished("the machine was restarted while the job ran")
        left = self._end_engine(task)
        return Vanished(
            f"its launcher process {process.pid} is gone and left no exit code (killed from outside?)"
            + (f"; {left} of its processes were still running and have been killed" if left else "")
        )

    def stop(self, task: Task, process: Process) -> bool:
        """Ask a job to write a checkpoint and end; False: it is not ready to be asked, ask again."""
        if read_json(task.directory / READY) is None:  # it may not catch the signal yet
            return False
        with contextlib.suppress(psutil.NoSuchProcess):
            found = psutil.Process(process.pid)
            if _same(found, process):
                found.terminate()
        return True

    def kill(self, task: Task, process: Process) -> None:
        """End every process of a job at once."""
        with contextlib.suppress(psutil.NoSuchProcess):
            found = psutil.Process(process.pid)
            if _same(found, process):
                found.kill()
        self._end_engine(task)

    def _alive(self, job: str, process: Process) -> bool:
        child = self._children.get(job)
        if child is not None:
            return child.poll() is None
        try:
            found = psutil.Process(process.pid)
            return _same(found, process) and found.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    @staticmethod
    def _end_engine(task: Task) -> int:
        """Kill what is left of the engine; returns how many processes that were."""
        ready = read_json(task.directory / READY)
        session = ready.get("session") if ready else None
        if not isinstance(session, int):
            return 0
        # The session's id may belong to strangers by now; a job's own processes carry its folder's name.
        own = [pid for pid in session_members(session) if _belongs(pid, task.directory)]
        if own:
            end_session(session, patience=0.0)
        return len(own)


def read_exit(directory: Path) -> Exit | None:
    """How the job of this folder ended; ``None``: it has not, or nobody wrote it down."""
    values = read_json(directory / EXIT)
    if values is None or not isinstance(values.get("exit_code"), int):
        return None
    return Exit(
        exit_code=values["exit_code"],
        raw_code=values.get("raw_code"),
        stopped=bool(values.get("stopped", False)),
        time=float(values.get("time", time.time())),
        error=values.get("error"),
    )


def read_json(path: Path) -> dict[str, Any] | None:
    """The mapping in a file; ``None`` where there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def _same(found: psutil.Process, process: Process) -> bool:
    return abs(found.create_time() - process.created) < _CLOCK_SECONDS


def _belongs(pid: int, directory: Path) -> bool:
    try:
        environment: Mapping[str, str] = psutil.Process(pid).environ()
    except psutil.Error:
        return False
    return environment.get(JOB_VARIABLE) == str(directory)
