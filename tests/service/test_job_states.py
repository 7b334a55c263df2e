"""Which state may follow which, what an exit code means, and what is told of an error."""

import itertools
import threading

import pytest

from service.jobs import TRANSITIONS, JobState, outcome
from service.run_files import ProgressSummaries, last_error_line, read_part, read_tail


def test_the_store_refuses_every_transition_outside_the_table(bench):
    job_id = bench.submit()
    for source, target in itertools.product(JobState, JobState):
        if target not in TRANSITIONS[source]:
            with pytest.raises(ValueError, match="may not go"):
                bench.store.transition(job_id, source, target, reason="for a test")
    assert bench.state(job_id) == "queued"


def test_ended_states_are_those_that_nothing_follows():
    assert {state for state in JobState if state.is_terminal()} == {"succeeded", "failed", "cancelled", "lost"}


def test_a_job_is_lost_only_with_a_reason(bench):
    job_id = bench.submit()
    assert bench.store.transition(job_id, JobState.QUEUED, JobState.RUNNING)
    with pytest.raises(ValueError, match="reason"):
        bench.store.transition(job_id, JobState.RUNNING, JobState.LOST)
    with pytest.raises(ValueError, match="reason"):
        bench.store.transition(job_id, JobState.RUNNING, JobState.LOST, reason="")
    assert bench.store.transition(job_id, JobState.RUNNING, JobState.LOST, reason="for a test")


def test_of_two_that_move_a_job_one_wins(bench):
    for _ in range(5):
        job_id = bench.submit()
        won = []
        start = threading.Barrier(2)

        def move(target, job_id=job_id, won=won, start=start):
            start.wait()
            if bench.store.transition(job_id, JobState.QUEUED, target):
                won.append(target)

        threads = [threading.Thread(target=move, args=(t,)) for t in (JobState.RUNNING, JobState.CANCELLED)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert bench.state(job_id) == won[0]
        if won == [JobState.RUNNING]:  # it has no process, and none shall be looked for
            bench.store.transition(job_id, JobState.RUNNING, JobState.FAILED)


def test_a_state_changes_in_no_other_way(bench):
    job_id = bench.submit()
    with pytest.raises(ValueError, match="transition"):
        bench.store.note(job_id, state="succeeded")
    assert bench.store.note(job_id, pid=1) is False  # it does not run
    assert bench.store.ask_to_cancel(job_id, "why") is False


def test_the_first_reason_to_cancel_stays(bench):
    job_id = bench.submit()
    bench.store.transition(job_id, JobState.QUEUED, JobState.RUNNING)
    assert bench.store.ask_to_cancel(job_id, "first")
    at = bench.store.get(job_id).cancel_at
    assert bench.store.ask_to_cancel(job_id, "second")
    assert (bench.store.get(job_id).cancel_reason, bench.store.get(job_id).cancel_at) == ("first", at)
    bench.store.transition(job_id, JobState.RUNNING, JobState.CANCELLED)


@pytest.mark.parametrize(
    ("code", "cancel_reason", "own_error", "state"),
    [
        (0, None, False, "succeeded"),
        (0, "asked", False, "succeeded"),  # it was done before it heard
        (75, "asked", False, "cancelled"),
        (75, None, False, "cancelled"),
        (3, None, True, "failed"),
        (3, "asked", True, "failed"),
        (143, "asked", False, "cancelled"),
        (143, None, False, "failed"),
        (7, None, False, "failed"),
    ],
)
def test_exit_codes_become_states(code, cancel_reason, own_error, state):
    result = outcome(code, cancel_reason=cancel_reason, own_error=own_error)
    assert result.state == state
    assert result.reason


OPEN_MPI = """some output
--------------------------------------------------------------------------
prterun noticed that process rank 1 with PID 4711 on node here exited on
signal 9 (Killed).
--------------------------------------------------------------------------
"""
MPICH = """
===================================================================================
=   BAD TERMINATION OF ONE OF YOUR APPLICATION PROCESSES
=   PID 4711 RUNNING AT here
=   EXIT CODE: 9
=   CLEANING UP REMAINING PROCESSES
===================================================================================
YOUR APPLICATION TERMINATED WITH THE EXIT STRING: Killed (signal 9)
"""


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("error: one\nmore\nerror: two\n" + OPEN_MPI, "two"),
        (OPEN_MPI, "prterun noticed that process rank 1 with PID 4711 on node here exited on signal 9 (Killed)."),
        (MPICH, "BAD TERMINATION OF ONE OF YOUR APPLICATION PROCESSES PID 4711 RUNNING AT here EXIT CODE: 9 CLEANING"),
        ("Traceback (most recent call last):\n  File x\nValueError: bad\n\n", "ValueError: bad"),
        ("", None),
        ("\n----\n====\n", None),
        (b"caf\xe9\n", "caf\N{REPLACEMENT CHARACTER}"),
    ],
)
def test_the_line_that_says_why(tmp_path, text, line):
    path = tmp_path / "output.log"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    found = last_error_line(path)
    assert found == line or (line is not None and found is not None and found.startswith(line))
    assert last_error_line(tmp_path / "none") is None


def test_a_huge_output_is_not_read_whole(tmp_path):
    path = tmp_path / "output.log"
    with path.open("wb") as file:
        file.write(b"x" * 50_000_000)
        file.write(b"\nlast\n")
    assert last_error_line(path) == "last"
    data, behind = read_tail(path, 2, 1000)
    assert (len(data), behind) == (1000, 50_000_006)
    assert read_part(path, 50_000_001, 100) == (b"last\n", 50_000_006)
    assert read_part(path, 50_000_006, 100) == (b"", 50_000_006)


def test_figures_are_read_once_and_follow_the_file(tmp_path):
    summaries = ProgressSummaries()
    path = tmp_path / "progress.jsonl"
    assert summaries.of(tmp_path) == {}
    old = '{"type": "step", "step": 9, "loss": 9.0}\n'
    path.write_text(old)
    assert summaries.of(tmp_path, len(old)) == {}
    with path.open("a") as file:
        file.write('{"type": "start", "step": 0, "steps": 7}\n{"type": "step", "step": 1, "loss": null}\nnot json\n')
    assert summaries.of(tmp_path, len(old)) == {"step": 1, "steps": 7, "loss": None}
    with path.open("a") as file:
        file.write('{"type": "eval", "step": 2, "split": "test", "metrics": {"auc": 0.5}}\n')
    figures = summaries.of(tmp_path, len(old))
    assert (figures["metrics"], figures["metrics_step"], figures["step"]) == ({"auc": 0.5}, 2, 1)
