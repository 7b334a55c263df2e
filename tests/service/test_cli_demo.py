"""``crosslane demo`` when it is interrupted: the job and the service end with it."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from service.launchers.mpi import engine_environment

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.ranks, pytest.mark.slow]


def processes_of(home: Path) -> list[int]:
    """Processes that name the demonstration's folder in their arguments or work in it."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(home) in " ".join(process.cmdline()) or process.cwd().startswith(str(home)):
                found.append(process.pid)
        except psutil.Error:
            continue
    return [pid for pid in found if pid != os.getpid()]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_demo_ends_its_job_and_its_service(number: signal.Signals, code: int, tmp_path: Path) -> None:
    home = tmp_path / "home"
    command = [sys.executable, "-m", "service.cli", "demo", "--home", str(home)]
    with subprocess.Popen(
        command, cwd=ROOT, env=engine_environment(os.environ), stderr=subprocess.PIPE, text=True
    ) as demo:
        watchdog = threading.Timer(600, demo.kill)
        watchdog.start()
        assert demo.stderr is not None
        lines = []
        for line in demo.stderr:
            lines.append(line)
            if "steps, ranks 2" in line:  # the ranks are there
                break
        assert lines
        assert "steps, ranks 2" in lines[-1], "".join(lines)
        assert len(processes_of(home)) >= 4  # the demo, the service, the job's launcher and mpirun with its ranks
        demo.send_signal(number)
        lines += demo.stderr.readlines()
        assert demo.wait() == code, "".join(lines)
        watchdog.cancel()
    assert "Traceback" not in "".join(lines)
    deadline = time.monotonic() + 60
    while (left := processes_of(home)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []
