"""Records that a GPU takes apart: every form of keys against the reference, whose own bags are the host's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from dlrm.device import HostDevice
from embedding.placement import TableSpec
from pipeline import split_records_cuda
from pipeline.formats.record_files import RecordLayout
from pipeline.split_records import KeyColumns, SplitKeys, counting_room, split_records

HOTNESS, TABLE_ROWS, CONCAT = (3, 1, 40, 2), (50, 2, 9, 1 << 20), 3
NUM_DENSE, COLUMNS = 2, 8


@dataclass(frozen=True)
class Form:
    bags: bool = True
    missing: bool = False
    weighted: bool = False
    key_words: int = 1
    indexed: bool = False
    concat: bool = False
    turned: bool = True

    def layout(self) -> RecordLayout:
        hotness = HOTNESS if self.bags else (1,) * len(HOTNESS)
        keys = sum(hotness)
        return RecordLayout(
            words=1 + NUM_DENSE + keys * (self.key_words + self.weighted), label_one=1, num_dense=NUM_DENSE,
            dense_transform="as_is", first_key=1 + NUM_DENSE, key_words=self.key_words, hotness=hotness,
            table_rows=TABLE_ROWS, weighted=self.weighted, missing=self.missing,
        )  # fmt: skip

    def records(self, rng: np.random.Generator, count: int) -> np.ndarray:
        layout = self.layout()
        stored = rng.random((count, sum(layout.hotness))) * np.repeat(TABLE_ROWS, layout.hotness)
        keys = stored.astype(np.int64)
        if self.missing:
            away = rng.random(keys.shape) < rng.random((count, 1))
            away[:, -layout.hotness[CONCAT] :] &= not self.concat
            keys[away] = -1
        weights = rng.standard_normal(keys.shape).astype(np.float32).view(np.uint32)
        parts = [
            rng.integers(0, 2, (count, 1), np.uint32),
            rng.standard_normal((count, NUM_DENSE)).astype(np.float32).view(np.uint32),
            keys.view(np.uint32) if self.key_words == 2 else keys.astype(np.int32).view(np.uint32),
        ]
        return np.concatenate([*parts, weights] if self.weighted else parts, axis=1)


FORMS = {
    "plain": Form(bags=False),
    "bags": Form(),
    "concat, wide, picked": Form(concat=True, key_words=2, indexed=True),
    "weighted": Form(weighted=True),
    "missing": Form(missing=True, concat=True),
    "missing, concat row by row": Form(missing=True, concat=True, turned=False),
    "missing, weighted, wide": Form(missing=True, weighted=True, key_words=2),
}


class Split:
    """Room for what is taken out of records, and the tables' columns, on one device."""

    def __init__(self, machine: Any, form: Form, count: int, own: slice) -> None:
        self.form, self.layout, self.own = form, form.layout(), own
        pooling = ["concat" if form.concat and table == CONCAT else "sum" for table in range(len(HOTNESS))]
        specs = [
            TableSpec(name=str(table), rows=rows, dim=4, hotness=hotness, pooling=pooling[table])  # type: ignore[arg-type]
            for table, (rows, hotness) in enumerate(zip(TABLE_ROWS, self.layout.hotness, strict=True))
        ]
        host, keys = (
            KeyColumns.of(self.layout, specs, HostDevice(), turned=form.turned),
            sum(self.layout.hotness) * count,
        )
        places = int(host.vector[-1]) * count
        names = ("table_rows", "column", "vector", "full")
        self.columns = KeyColumns(*(machine.array(getattr(host, name)) for name in names))
        self.labels = machine.array(np.full(count, np.nan, np.float32))
        self.dense = machine.array(np.full((count, COLUMNS), np.nan, np.float32))
        self.out = SplitKeys(
            machine.array(np.full(keys, -7, np.int32)),
            machine.array(np.full(0 if self.layout.plain else places + 1, -7, np.int64)),
            machine.array(np.full(keys if form.weighted else 0, np.nan, np.float32)),
            machine.array(np.zeros(counting_room(self.layout, count), np.uint32)),
        )
        self.fault = machine.array(np.zeros(1, np.int32))

    def arguments(self, machine: Any, records: np.ndarray, index: np.ndarray | None) -> tuple[Any, ...]:
        count = len(records) if index is None else len(index)
        given = None if index is None else machine.array(index)
        return (
            machine.array(records), given, count, self.own, self.layout, self.columns, self.labels, self.dense,
            self.out, self.fault,
        )  # fmt: skip

    def results(self, machine: Any) -> list[np.ndarray]:
        arrays = (self.labels, self.dense, self.out.keys, self.out.offsets, self.out.weights, self.fault)
        return [machine.host(array) for array in arrays]


class Host:
    array = staticmethod(np.array)
    host = staticmethod(np.asarray)


def both(
    machine: Any, form: Form, records: np.ndarray, index: np.ndarray | None, own: slice
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What the kernel makes of records, and the reference."""
    count = len(records) if index is None else len(index)
    kernel, reference = (Split(where, form, count, own) for where in (machine, Host))
    split_records_cuda.split_records(*kernel.arguments(machine, records, index))
    split_records(*reference.arguments(Host, records, index), device=HostDevice(compiled=False))
    return kernel.results(machine), reference.results(Host)


@pytest.mark.parametrize("count", [1, 150])
@pytest.mark.parametrize("name", FORMS)
def test_a_gpu_takes_records_apart_as_the_reference(machine: Any, name: str, count: int, seed: int) -> None:
    rng, form = np.random.default_rng(seed), FORMS[name]
    records = form.records(rng, count)
    index = rng.integers(0, count, count // 2 + 1) if form.indexed else None
    taken = count if index is None else len(index)
    own = slice(taken // 3, taken - taken // 4)
    found, expected = both(machine, form, records, index, own)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    *_, offsets, _, fault = found
    assert fault[0] == 0
    if form.missing:
        assert offsets[-1] < taken * sum(HOTNESS) or count == 1
        assert (np.diff(offsets) == 0).any() or count == 1
    elif not form.concat and form.bags:
        lengths = np.repeat(HOTNESS, taken)
        np.testing.assert_array_equal(np.diff(offsets), lengths)


@pytest.mark.parametrize(
    ("name", "word", "value"),
    [
        ("bags", 0, 2),
        ("bags", 1 + NUM_DENSE + 3, 2),
        ("bags", 1 + NUM_DENSE, 0xFFFFFFFF),
        ("missing", 1 + NUM_DENSE + sum(HOTNESS) - 1, 0xFFFFFFFF),
        ("missing", 1 + NUM_DENSE + 1, 0xFFFFFFFE),
        ("missing, concat row by row", 1 + NUM_DENSE + sum(HOTNESS) - 1, 0xFFFFFFFF),
        ("weighted", -1, 0x7FC00000),
    ],
)
def test_a_wrong_word_is_seen(machine: Any, name: str, word: int, value: int, seed: int) -> None:
    form, row = FORMS[name], 101
    records = form.records(np.random.default_rng(seed), 110)
    records[row, word] = value
    found, expected = both(machine, form, records, None, slice(0, 110))
    assert found[-1][0] == expected[-1][0] == row + 1
    table_rows = np.repeat(TABLE_ROWS, HOTNESS)
    assert (found[2] < table_rows.max()).all()
