"""One command in a process of its own: its time, memory, processor time, and the disk that it takes on the way."""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

_LOOK_EVERY_S = 0.1


@dataclass(frozen=True, slots=True)
class Measured:
    """What a command took.

    Attributes:
        seconds: from its start to its end.
        cpu_seconds: of all its threads.
        peak_bytes: resident at most.
        disk_bytes: of the folder at most, what was there before aside.
        output: what it printed.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    disk_bytes: int
    output: str


def measure(command: list[str], folder: Path, *, request: str | None = None) -> Measured:
    """Run a command that writes into a folder.

    Args:
        command: program and arguments.
        folder: watched while it runs.
        request: a line for its standard input, which then stays open.

    Raises:
        SystemExit: it failed.
    """
    before, most = size_of(folder), 0
    over = threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.wait(_LOOK_EVERY_S):
            most = max(most, size_of(folder))

    watcher = threading.Thread(target=watch, daemon=True)
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as said:
        begin = time.perf_counter()
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=printed, stderr=said, text=True)
        watcher.start()
        assert process.stdin is not None
        if request is not None:
            process.stdin.write(request + "\n")
            process.stdin.flush()
        _, status, usage = os.wait4(process.pid, 0)  # the usage of this child alone
        seconds = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        process.stdin.close()
        over.set()
        watcher.join()
        printed.seek(0)
        said.seek(0)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}: ended with {process.returncode}: {said.read()[-2000:]}")
        most = max(most, size_of(folder))
        return Measured(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, most - before, printed.read())


def size_of(folder: Path) -> int:
    """Blocks on the disk of all files below a folder, in bytes; files that go away meanwhile count as nothing."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(path) / name).lstat().st_blocks * 512
            except OSError:
                continue
    return total
