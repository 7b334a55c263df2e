"""What mpirun adds to an error that the engine has explained: one sentence is left of it."""

import os
import random
import subprocess
import sys

import pytest

from service.launchers.banners import BannerFilter
from service.launchers.mpi import engine_environment
from service.settings import inherited_environment

RANKS = os.environ.get("CROSSLANE_TEST_RANKS") or "2"
FRAME = "-" * 74 + "\n"
ABORT = (
    f"{FRAME}MPI_ABORT was invoked on rank 0 in communicator MPI_COMM_WORLD\n  Errorcode: 3\n\n"
    f"NOTE: invoking MPI_ABORT causes Open MPI to kill all MPI processes.\n{FRAME}"
)
CALLING = (
    f'{FRAME}prterun has exited due to process rank 0 with PID 0 on node a calling\n"abort". And so on.\n{FRAME}\0'
)
STATUS_4 = f"{FRAME}Primary job  terminated normally, but 1 process returned\na non-zero exit code. And so on.\n{FRAME}"
STATUS_5 = f"{FRAME}prterun detected that one or more processes exited with non-zero status,\nthus causing\n{FRAME}"
KILLED = f"{FRAME}prterun noticed that process rank 1 with PID 7 on node a exited on\nsignal 9 (Killed).\n{FRAME}"
AGAIN = "[a:7] 1 more process has sent help message help-mpi-api.txt / mpi-abort\n"
ERROR = "error: data set x: no readable dataset.json; name the folder of a prepared data set\n"


def shown_and_held(text):
    shown = []
    banners = BannerFilter(shown.append)
    banners.feed(text.splitlines(keepends=True))
    return "".join(shown), banners.held


@pytest.mark.parametrize("banners", [[ABORT, CALLING], [STATUS_4, STATUS_5], [ABORT, AGAIN]])
def test_what_repeats_the_end_is_held_back(banners):
    shown, held = shown_and_held("before\n" + ERROR + "".join(banners) + "after\n")
    assert shown == f"before\n{ERROR}after\n"
    assert "".join(held) == "".join(banners).replace("\0", "")


def test_which_rank_was_killed_becomes_a_sentence():
    shown = []
    banners = BannerFilter(shown.append)
    banners.feed((KILLED + ABORT).splitlines(keepends=True))
    assert (shown, banners.held) == ([], [KILLED, ABORT])
    assert banners.death == "rank 1 (process 7 on a) was ended by signal 9 (Killed)"


def test_what_tells_something_new_is_shown():
    new = f"{FRAME}There are not enough slots available in the system to satisfy the 4 slots\n{FRAME}"
    assert shown_and_held(new + ABORT) == (new, [ABORT])


def test_an_error_inside_a_text_of_mpiruns_is_shown():
    head, tail = ABORT[:120], ABORT[120:]
    assert head.count("\n") == 1
    cut = head.index("\n") + 1
    shown, held = shown_and_held(head[:cut] + ERROR + head[cut:] + tail)
    assert (shown, held) == (ERROR, [ABORT])


def test_an_error_that_quotes_mpirun_is_shown():
    text = 'error: rank 1: MPI_ABORT was invoked on rank 1, calling "abort"\n'
    assert shown_and_held(text) == (text, [])


def test_nothing_is_lost_of_other_text_whatever_its_frames():
    for _ in range(50):
        lines = [random.choice([FRAME, "word\n", "-----\n", "\n", ERROR]) for _ in range(random.randrange(100))]
        shown, held = shown_and_held("".join(lines))
        assert held == []
        assert sorted(shown.splitlines()) == sorted("".join(lines).splitlines())


@pytest.mark.ranks
def test_a_wrong_data_set_on_ranks_is_one_line(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("data: {path: nowhere}\n")
    done = subprocess.run(
        [sys.executable, "-m", "service.cli", "train", str(config), "--ranks", RANKS],
        cwd=tmp_path,
        env=engine_environment(inherited_environment()),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.startswith("error: data set nowhere: ")
    assert done.stderr.count("\n") == 1, done.stderr
