"""The same bytes from any number of ranks and threads, in any memory, and after a kill at any mark."""

from __future__ import annotations

import gzip
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MPIRUN = Callable[..., "subprocess.CompletedProcess[str]"]


def write_rows(path: Path, rng: np.random.Generator, rows: int) -> str:
    """Rows whose categories repeat (columns 0 to 12), or hardly do."""
    lines = []
    for _ in range(rows):
        fields = [str(rng.integers(2)), *map(str, rng.integers(-3, 9000, 13).tolist())]
        wide = [f"{value:08x}" for value in rng.integers(0, 2**32, 13).tolist()]
        near = [f"{value * 99_999_989 % 2**32:08x}" if value else "" for value in rng.integers(0, 200, 13).tolist()]
        lines.append("\t".join([*fields, *near, *wide]))
    text = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(text, 1) if path.suffix == ".gz" else text)
    return str(path)


@pytest.fixture
def files(tmp_path: Path, rng: np.random.Generator) -> list[str]:
    """Two training files, one of them packed, and a last day."""
    named = [write_rows(tmp_path / name, rng, rows) for name, rows in (("a", 150), ("b.gz", 40), ("c", 101))]
    return [*named[:2], "--", named[2]]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a data set."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def alone(out: Path, kill_at: int, budget: int, files: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(HERE / "prepare_main.py"), str(out), str(kill_at), str(budget), *files],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.ranks
def test_any_number_of_ranks_and_any_memory_give_the_same_bytes(
    tmp_path: Path, files: list[str], mpirun: MPIRUN
) -> None:
    assert (done := alone(tmp_path / "one", 0, 0, files)).returncode == 0, done.stderr
    wanted = tree(tmp_path / "one")
    assert sum(name.startswith("train.") for name in wanted) > 2
    assert sum(name.startswith("test.") for name in wanted) >= 1
    assert sum("C20" in name for name in wanted) >= 1
    # 45 kB hold neither the counts (128 bytes a slot's doubling) nor the look-up tables of the thirteen wide columns.
    assert (done := alone(tmp_path / "small", 0, 45_000, files)).returncode == 0, done.stderr
    assert tree(tmp_path / "small") == wanted
    for ranks, budget in ((2, 0), (4, 45_000)):
        out = tmp_path / f"ranks{ranks}"
        done = mpirun(ranks, str(HERE / "prepare_main.py"), str(out), "0", str(budget), *files)
        assert done.returncode == 0, done.stderr
        assert tree(out) == wanted


def test_a_kill_after_any_mark_changes_no_byte(tmp_path: Path, files: list[str], rng: np.random.Generator) -> None:
    whole = alone(tmp_path / "whole", 0, 45_000, files)
    assert whole.returncode == 0, whole.stderr
    wanted = tree(tmp_path / "whole")
    marks = int(re.search(r"marks (\d+)", whole.stdout)[1])  # type: ignore[index]
    # Job, lines, count batches, vocabulary, statistics, numbered, groups, then shards and publishing: one folder is
    # killed again and again, a few marks after where the kill before left it.
    out, killed = tmp_path / "killed", 0
    for kill_at in (1, *rng.integers(2, 5, marks).tolist()):
        done = alone(out, kill_at, 45_000, files)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not (out / "dataset.json").exists()
        killed += 1
    assert killed >= marks // 8
    left = int(re.search(r"marks (\d+)", done.stdout)[1])  # type: ignore[index]
    assert left < marks
    assert tree(out) == wanted
    # The last moment before the set is there.
    out = tmp_path / "almost"
    assert alone(out, marks, 45_000, files).returncode == -signal.SIGKILL
    assert not (out / "dataset.json").exists()
    again = alone(out, 0, 45_000, files)
    assert again.returncode == 0, again.stderr
    assert int(re.search(r"marks (\d+)", again.stdout)[1]) < marks  # type: ignore[index]
    assert tree(out) == wanted
