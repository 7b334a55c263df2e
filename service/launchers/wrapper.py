"""A job's own process: it starts the engine, outlives the service, and writes down how the job ended.

``python -m service.launchers.wrapper --directory DIR --progress FILE [...] -- COMMAND...``

``wrapper.json`` in the job's folder says that it is there and ready for signals: its process id and the
session of the engine. ``exit.json`` says how the engine ended. Each is written whole or not at all.
SIGTERM asks for a stop, whose steps it then times itself, so that they go on without a service.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from dlrm.errors import LaunchError
from service.launchers.session import Grace, Progress, Session, exit_code_of

READY = "wrapper.json"
EXIT = "exit.json"
OUTPUT = "output.log"


def main(arguments: list[str] | None = None) -> int:
    """Run one job to its end; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m service.launchers.wrapper", description=__doc__)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--progress", type=Path, required=True)
    parser.add_argument("--progress-start", type=int, default=0)
    parser.add_argument("--stop-seconds", type=float, default=60.0)
    parser.add_argument("--kill-seconds", type=float, default=10.0)
    parser.add_argument("command", nargs="+")
    options = parser.parse_args(arguments)

    early: list[int] = []
    session: Session | None = None

    def stop(number: int, _frame: FrameType | None) -> None:
        if session is None:
            early.append(number)
        else:
            session.ask_to_stop()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, stop)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    directory: Path = options.directory
    try:
        with (directory / OUTPUT).open("ab") as output:
            session = Session(
                options.command,
                env=os.environ,
                cwd=directory,
                output=output,
                progress=Progress(path=options.progress, start=options.progress_start),
                grace=Grace(checkpoint=options.stop_seconds, terminate=options.kill_seconds),
            )
    except LaunchError as error:
        _end(directory, exit_code=error.exit_code, error=str(error))
        return error.exit_code
    if early:  # between the handlers and the session
        session.ask_to_stop()
    write_whole(directory / READY, {"pid": os.getpid(), "session": session.id, "time": time.time()})
    raw = session.wait()
    code = exit_code_of(raw, stopped_by=signal.SIGTERM if session.stop_asked else None)
    _end(directory, exit_code=code, raw_code=raw, stopped=session.stop_asked)
    return code


def write_whole(path: Path, values: dict[str, Any]) -> None:
    """Write JSON so that a reader, even after a crash, finds all of it or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(values, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _end(directory: Path, **values: Any) -> None:
    write_whole(directory / EXIT, {**values, "time": time.time()})


if __name__ == "__main__":
    sys.exit(main())
