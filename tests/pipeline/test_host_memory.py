"""What a process holds already does not count against it where it was given no limit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import psutil
import pytest

from dlrm.errors import ConfigError
from pipeline import host_memory
from pipeline.check.dataset import check_dataset
from pipeline.etl.memory import table_budget
from pipeline.host_memory import available_memory, default_memory_limit, held_memory
from pipeline.manifest import TableInfo
from pipeline.writer import DatasetWriter

MIB = 1 << 20


def test_memory_is_read_as_psutil_reads_it() -> None:
    ballast = np.ones(256 * MIB, np.uint8)
    assert held_memory() == pytest.approx(psutil.Process().memory_info().rss, rel=0.1)
    assert held_memory() >= ballast.nbytes
    assert 0 < available_memory() <= psutil.virtual_memory().total
    assert default_memory_limit(3) > 3 * ballast.nbytes


def test_a_process_that_holds_more_than_half_of_what_is_free_is_not_refused(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    ballast = np.ones(512 * MIB, np.uint8)
    monkeypatch.setattr(host_memory, "available_memory", lambda: 800 * MIB)
    with DatasetWriter(tmp_path, name="x", dense_names=["d"], tables=[TableInfo(name="t", rows=9)]) as writer:
        writer.write("train", np.arange(50) % 2, rng.normal(size=(50, 1)), rng.integers(0, 9, (50, 1)))
        writer.finish()
    assert check_dataset(tmp_path)["status"] != "failed"
    assert table_budget(None, local_ranks=2, pieces=1, piece_bytes=MIB) >= 64 * MIB
    # What a limit leaves is what lies above that memory, too.
    with pytest.raises(ConfigError, match="--memory-limit: 400 MiB, but a check needs at least"):
        check_dataset(tmp_path, memory_limit=400 * MIB)
    with pytest.raises(ConfigError, match=r"memory limit: 800 MiB, but 2 rank\(s\) need at least \d{4,} MiB"):
        table_budget(800 * MIB, local_ranks=2, pieces=1, piece_bytes=MIB)
    del ballast
