"""Real ranks under mpirun: started, stopped with a checkpoint, killed, and never left behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from dlrm.errors import LaunchError
from service.launchers.mpi import Mpirun, engine_command, engine_environment, find_mpirun, parse_version
from service.launchers.session import MPI_FOLDER, end_session, exit_code_of, session_members

PROGRAM = str(Path(__file__).with_name("ranked_program.py"))
RANKS = max(2, int(os.environ.get("CROSSLANE_TEST_RANKS") or 2))
FOREGROUND = """
import sys
from pathlib import Path
from service.launchers.local import Grace, run_and_wait
config, ranks = Path(sys.argv[1]), int(sys.argv[2])
grace = Grace(checkpoint=100.0, terminate=1.0)
sys.exit(run_and_wait(config, ranks, config.parent, engine=(sys.argv[3],), grace=grace))
"""


def wait_until_true(condition, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.02)


class Run:
    """``run_and_wait`` in a process of its own, as ``crosslane train --ranks`` calls it."""

    def __init__(self, directory, ranks, name="hold"):
        self.directory = directory
        self.ranks = ranks
        config = directory / "config.json"
        config.write_text(json.dumps({"name": name, "run": {"directory": str(directory)}}))
        self.errors = (directory / "errors.txt").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-c", FOREGROUND, str(config), str(ranks), PROGRAM],
            stderr=self.errors,
            start_new_session=True,
        )

    def pids(self):
        return [int((self.directory / f"rank{rank}.pid").read_text()) for rank in range(self.ranks)]

    def begun(self):
        files = [self.directory / "progress.jsonl", *(self.directory / f"rank{r}.pid" for r in range(self.ranks))]
        return all(file.exists() and file.stat().st_size for file in files)

    def said(self):
        return (self.directory / "errors.txt").read_text()

    def saved(self):
        return all((self.directory / f"saved{rank}").exists() for rank in range(self.ranks))


@pytest.fixture
def run(tmp_path):
    """Starts runs and makes sure that nothing of them is left."""
    runs = []

    def start(ranks, name="hold"):
        runs.append(Run(tmp_path, ranks, name))
        return runs[-1]

    yield start
    for one in runs:
        for child in psutil.Process(one.process.pid).children() if one.process.poll() is None else []:
            end_session(child.pid, patience=0.0)
        one.process.kill()
        one.process.wait(10)
        one.errors.close()


def gone(pids):
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)


@pytest.mark.ranks
def test_ranks_end_with_zero_and_never_import_from_the_working_folder(run, tmp_path):
    one = run(RANKS, "short")
    assert one.process.wait(120) == 0
    assert json.loads((tmp_path / "progress.jsonl").read_text())["safe_path"] is True


@pytest.mark.ranks
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_all_ranks_write_their_checkpoint(run, number):
    one = run(RANKS)
    wait_until_true(one.begun)
    pids = one.pids()
    one.process.send_signal(number)
    assert one.process.wait(120) == 75
    assert one.saved()
    assert gone(pids)


@pytest.mark.ranks
def test_a_killed_rank_ends_all_within_ten_seconds_and_is_named(run):
    one = run(RANKS)
    wait_until_true(one.begun)
    pids = one.pids()
    os.kill(pids[1], signal.SIGKILL)
    begun = time.monotonic()
    assert one.process.wait(120) == 7
    assert time.monotonic() - begun < 10
    assert gone(pids)
    (sentence,) = [line for line in one.said().splitlines() if line.startswith("error: ")]
    if find_mpirun().family == "openmpi":
        assert sentence.startswith(f"error: rank 1 (process {pids[1]} on ")
        assert "signal 9 (Killed); all ranks have ended" in sentence
        assert one.said().splitlines() == [sentence]


@pytest.mark.ranks
def test_a_killed_mpirun_leaves_no_rank(run):
    one = run(RANKS)
    wait_until_true(one.begun)
    pids = one.pids()
    (mpirun,) = psutil.Process(one.process.pid).children()
    folder = Path(mpirun.environ()[MPI_FOLDER])
    if find_mpirun().family == "openmpi" and find_mpirun().version >= (5, 0):
        assert [path.name for path in folder.iterdir()] == [f"ompi.{mpirun.pid}"]
    mpirun.kill()
    assert one.process.wait(120) == 7
    assert gone(pids)
    assert session_members(mpirun.pid) == []
    # What a killed mpirun leaves would stop the next one of its process id.
    assert not folder.exists()


@pytest.mark.ranks
def test_an_exception_in_one_rank_ends_all(run):
    one = run(RANKS, "raise")
    assert one.process.wait(120) == 1
    assert "one rank fails" in one.said()
    assert gone(one.pids())


@pytest.mark.ranks
def test_a_stop_before_the_first_record_is_short(run):
    one = run(RANKS, "mute")
    wait_until_true(lambda: all((one.directory / f"rank{rank}.pid").exists() for rank in range(RANKS)))
    time.sleep(0.1)
    pids = one.pids()
    one.process.send_signal(signal.SIGINT)
    assert one.process.wait(60) == 128 + signal.SIGINT  # and not after the hundred seconds of grace
    assert gone(pids)


def test_one_rank_needs_no_mpirun_and_stops_as_well(run):
    one = run(1)
    wait_until_true(one.begun)
    (child,) = psutil.Process(one.process.pid).children()
    assert [child.pid] == one.pids()
    one.process.terminate()
    assert one.process.wait(120) == 75
    assert one.saved()


def test_further_signals_do_not_wait_for_the_checkpoint(run):
    one = run(1)
    wait_until_true(one.begun)
    (pid,) = one.pids()
    os.kill(pid, signal.SIGSTOP)  # hears nothing but SIGKILL
    for _ in range(3):
        one.process.send_signal(signal.SIGINT)
        time.sleep(0.4)
    assert one.process.wait(60) == 128 + signal.SIGINT  # and not after the hundred seconds of grace
    assert gone([pid])


OPEN_MPI_5 = Mpirun("mpirun", "openmpi", (5, 0))


@pytest.mark.parametrize(
    ("text", "family", "version"),
    [
        ("mpirun (Open MPI) 5.0.11\n\nReport bugs to https://www.open-mpi.org/community/help/\n", "openmpi", (5, 0)),
        ("mpirun (Open MPI) 4.1.4\n", "openmpi", (4, 1)),
        ("mpirun (OpenRTE) 4.1.0\n", "openmpi", (4, 1)),
        ("HYDRA build details:\n    Version:                                 5.0.2\n", "mpich", (5, 0)),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.13 Build 20240515\n", "mpich", (2021, 13)),
    ],
)
def test_starters_are_told_apart(text, family, version):
    assert parse_version("mpirun", text) == Mpirun("mpirun", family, version)


def test_an_unknown_starter_is_refused():
    with pytest.raises(LaunchError, match="must be Open MPI or MPICH"):
        parse_version("mpirun", "usage: something else")


def test_each_starter_is_spoken_to_in_its_own_words(tmp_path):
    program = [sys.executable, "-m", "mpi4py", "-m", "pipeline.train", str(tmp_path / "c.json"), "--debug"]
    config = tmp_path / "c.json"
    yielding = ["--bind-to", "none", "--mca", "mpi_yield_when_idle", "1", "-np", "4"]
    assert engine_command(config, 4, debug=True, mpirun=OPEN_MPI_5) == [
        *("mpirun", "--map-by", ":OVERSUBSCRIBE"),
        *yielding,
        *program,
    ]
    old = Mpirun("mpirun", "openmpi", (4, 1))
    assert engine_command(config, 4, debug=True, mpirun=old) == ["mpirun", "--oversubscribe", *yielding, *program]
    mpich = Mpirun("mpirun", "mpich", (5, 0))
    assert engine_command(config, 4, debug=True, mpirun=mpich) == ["mpirun", "-n", "4", *program]
    assert engine_command(config, 1) == [sys.executable, "-m", "pipeline.train", str(config)]
    with pytest.raises(LaunchError, match="ranks: 0"):
        engine_command(config, 0)


def test_the_ranks_environment(monkeypatch):
    environment = engine_environment({"PYTHONPATH": "/some/where", "KEPT": "1"}, threads=3, gpus=("1", "4"))
    assert environment["PYTHONSAFEPATH"] == "1"
    assert environment["KEPT"] == "1"
    assert (environment["CROSSLANE_THREADS"], environment["CUDA_VISIBLE_DEVICES"]) == ("3", "1,4")
    root = str(Path(__file__).parents[2])
    assert environment["PYTHONPATH"].split(os.pathsep) == [root, "/some/where"]
    assert engine_environment(environment)["PYTHONPATH"] == environment["PYTHONPATH"]
    assert "CUDA_VISIBLE_DEVICES" not in engine_environment({})
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert engine_environment({})["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] == "1"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "OMPI_ALLOW_RUN_AS_ROOT" not in engine_environment({})


def test_the_starter_beside_the_interpreter_goes_before_the_one_on_the_path(tmp_path, monkeypatch):
    found = find_mpirun()
    for folder, version in (("beside", "4.1.9"), ("elsewhere", "9.9.9")):
        (tmp_path / folder).mkdir()
        script = tmp_path / folder / "mpirun"
        script.write_text(f"#!/bin/sh\necho 'mpirun (Open MPI) {version}'\n")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "elsewhere") + os.pathsep + os.environ["PATH"])
    assert find_mpirun(str(tmp_path / "beside" / "python")).version == (4, 1)
    assert find_mpirun(str(tmp_path / "no such" / "python")).version == (9, 9)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="not found"):
        find_mpirun(str(tmp_path / "nor here" / "python"))
    assert shutil.which(found.path) is not None


@pytest.mark.parametrize(
    ("raw", "stopped_by", "code"),
    [
        (0, None, 0),
        (3, None, 3),
        (75, signal.SIGTERM, 75),
        (137, None, 7),  # Open MPI: a rank was killed
        (9, None, 7),  # MPICH says so
        (1, None, 1),
        (1, signal.SIGTERM, 143),  # Open MPI after SIGTERM
        (143, signal.SIGINT, 130),
        (3, signal.SIGINT, 3),
        (0, signal.SIGINT, 0),
    ],
)
def test_exit_codes_mean_the_same_whoever_started_the_ranks(raw, stopped_by, code):
    assert exit_code_of(raw, stopped_by=stopped_by) == code


def test_every_process_of_a_session_is_found_and_ended():
    child = "import subprocess, sys, os, time; os.setpgid(0, 0); time.sleep(60)"
    program = f"import subprocess, sys, time; [subprocess.Popen([sys.executable, '-c', {child!r}]) for _ in range(2)]"
    leader = subprocess.Popen([sys.executable, "-c", program + "; time.sleep(0.5)"], start_new_session=True)
    reaper = threading.Thread(target=leader.wait)
    reaper.start()
    wait_until_true(lambda: len(session_members(leader.pid)) >= 2)
    reaper.join()  # the leader is gone, its children are not
    left = session_members(leader.pid)
    assert len(left) == 2
    assert end_session(leader.pid, patience=0.0)
    assert gone(left)
