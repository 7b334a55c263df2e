"""Every reader sees all rows that changed since it last asked, whatever the others do."""

from __future__ import annotations

import numpy as np
import pytest

from dlrm.device import HostDevice
from embedding.table import Shard
from pipeline.changed_rows import ChangedRows

SIZES = (40, 3, 17)


class Tables:
    """Marks as an embedding keeps them."""

    def __init__(self):
        self.touched = None
        self.late = []

    def track_touched(self):
        self.touched = [np.zeros(size, np.bool_) for size in SIZES]

    def clear_touched(self):
        for marks in self.touched:
            marks.fill(False)

    def settle(self):
        """Marks that lay elsewhere."""
        for number, row in self.late:
            self.touched[number][row] = True
        self.late.clear()

    def resident(self):
        """On the device; here there is but one place."""
        self.settle()
        return self.shards()

    def shards(self):
        return [
            Shard(
                f"t{i}", range(size), range(1), np.zeros((size, 1)), touched=self.touched[i] if self.touched else None
            )
            for i, size in enumerate(SIZES)
        ]


@pytest.mark.parametrize("readers", [("checkpoint",), ("evaluation",), ("checkpoint", "evaluation")])
def test_a_reader_misses_nothing_and_sees_nothing_twice(rng, readers):
    tables = Tables()
    changed = ChangedRows(tables, readers, HostDevice(1))
    expected = {reader: [set() for _ in SIZES] for reader in readers}
    for _ in range(60):
        for number, size in enumerate(SIZES):
            row = int(rng.integers(size))
            if rng.random() < 0.5:
                tables.touched[number][row] = True
            else:
                tables.late.append((number, row))
            for rows in expected.values():
                rows[number].add(row)
        reader = readers[rng.integers(len(readers))]
        ask = changed.shards if rng.random() < 0.5 else changed.resident
        seen = [set(np.flatnonzero(shard.touched).tolist()) for shard in ask(reader)]
        assert seen == expected[reader]
        if rng.random() < 0.6:
            changed.forget(reader)
            expected[reader] = [set() for _ in SIZES]


def test_without_readers_nothing_is_noted():
    tables = Tables()
    ChangedRows(tables, (), HostDevice(1))
    assert tables.touched is None
