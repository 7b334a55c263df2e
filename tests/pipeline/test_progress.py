"""Progress records: written whole, read whole, shown."""

from __future__ import annotations

import io
import signal
import subprocess
import sys

import pytest
from rich.console import Console

from pipeline.console import RunProgress
from pipeline.progress import ProgressWriter, read_records


def test_records_come_back_in_order_and_from_where_the_reader_was(tmp_path):
    path = tmp_path / "progress.jsonl"
    writer = ProgressWriter(path)
    writer.write("step", step=1, loss=float("nan"))
    ((first, behind),) = read_records(path)
    assert (first["type"], first["step"], first["loss"]) == ("step", 1, None)
    writer.write("end", step=2)
    writer.close()
    assert [record["step"] for record, _ in read_records(path, behind)] == [2]


def test_a_record_torn_by_a_crash_costs_no_other(tmp_path):
    path = tmp_path / "progress.jsonl"
    path.write_text('{"type":"step","step":1}\n{"type":"st')
    writer = ProgressWriter(path)
    writer.write("start", step=1)
    writer.close()
    assert [record["type"] for record, _ in read_records(path)] == ["step", "start"]


@pytest.mark.parametrize("place", ["absent.jsonl", "file/progress.jsonl", "."])
def test_what_cannot_be_opened_has_no_records_yet(tmp_path, place):
    (tmp_path / "file").touch()
    assert list(read_records(tmp_path / place)) == []


def test_a_stopped_run_says_how_it_goes_on():
    shown = io.StringIO()
    with RunProgress(Console(file=shown, width=40)) as view:
        view.feed({"type": "start", "run": "r", "steps": 100, "step": 0, "ranks": 1, "threads": 1})
        view.feed({"type": "step", "step": 37, "samples_per_s": None, "loss": None})
        view.feed({"type": "end", "step": 37, "reason": "stopped"})
    # One line however narrow the log is, so that it can be searched for.
    assert "r: stopped at step 37 after a checkpoint; started again, the run goes on from there\n" in shown.getvalue()


@pytest.mark.parametrize(("stoppable", "word"), [(True, "_request"), (False, "SIG_DFL")])
def test_only_work_that_looks_for_a_stop_catches_signals(stoppable, word):
    """Otherwise SIGTERM and the first Ctrl-C would do nothing."""
    program = (
        "import signal, sys; from pipeline.entry import run_process\n"
        f"work = lambda _: print(repr(signal.getsignal({int(signal.SIGTERM)}))) or 0\n"
        f"sys.exit(run_process(work, stoppable={stoppable}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=True)
    assert word in done.stdout
