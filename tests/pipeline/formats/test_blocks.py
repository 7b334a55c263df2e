"""Rows that follow one another are read block by block, and are those that the mapped files hold."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlrm.errors import DataError
from pipeline.dataset import Split, load_dataset
from pipeline.formats import raw
from pipeline.formats.batch import HostBatch
from pipeline.manifest import FileInfo, SplitInfo, read_manifest, row_words, write_manifest

ONES = ((50, 1), (2**31 - 1, 1), (9, 1), (1000, 1))
"""Tables of hotness 1."""


def cut_up(folder: Path, rng: np.random.Generator) -> Path:
    """The train split in four files, one of them empty."""
    manifest = read_manifest(folder)
    (file,) = manifest.splits["train"].files
    content = (folder / file.path).read_bytes()
    size = 4 * row_words(manifest)
    bounds = np.sort(rng.integers(0, file.rows + 1, 3))
    bounds = [0, bounds[0], bounds[1], bounds[1], bounds[2], file.rows]
    files = []
    for number, (start, stop) in enumerate(pairwise(bounds)):
        (folder / f"{number}.bin").write_bytes(content[size * start : size * stop])
        files.append(replace(file, path=f"{number}.bin", rows=int(stop - start), bytes=int(size * (stop - start))))
    kept = tuple(FileInfo(path=one.path, rows=one.rows, bytes=one.bytes) for one in files)
    write_manifest(folder, replace(manifest, splits={"train": SplitInfo(rows=file.rows, files=kept)}))
    return folder


def arrays(batch: HostBatch) -> list[Any]:
    return [batch.labels, batch.dense, batch.keys.keys, batch.keys.offsets, batch.keys.weights]


@pytest.mark.parametrize(
    "options",
    [
        {"shape": ONES, "num_dense": 3},
        {"shape": ONES, "num_dense": 2},
        {"shape": ONES[:3], "num_dense": 4},
        {"shape": ONES[:3], "num_dense": 3, "label_dtype": "float32"},
        {"shape": ONES[:1], "num_dense": 0},
        {"shape": ONES, "num_dense": 3, "dense_dtype": "int32"},
        {"shape": ONES, "num_dense": 3, "key_dtype": "int64"},
        {"shape": ONES, "num_dense": 1, "weighted": True},
        {"shape": ((50, 1), (9, 3)), "num_dense": 1, "missing": True},
        {"shape": ONES, "num_dense": 1, "layout": "jagged"},
    ],
)
def test_blocks_hold_the_rows_of_the_mapped_files(
    prepared: Callable[..., Path], rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    folder = prepared(rows=400, **options)
    split = load_dataset(folder if "layout" in options else cut_up(folder, rng)).split("train")
    start, stop = sorted(rng.integers(0, 401, 2))
    spans = [slice(0, 400), slice(int(start), int(stop)), slice(399, 400)]
    mapped = [arrays(split.read(span)) for span in spans]
    monkeypatch.setattr(raw, "_READ_BYTES", 1)
    monkeypatch.setattr(raw, "_BUFFER_BYTES", int(rng.integers(1, 20_000)))
    opened: list[Any] = []
    original = raw.MappedFile.opened
    monkeypatch.setattr(raw.MappedFile, "opened", lambda self: opened.append(self.path) or original(self))
    for span, wanted in zip(spans, mapped, strict=True):
        np.testing.assert_equal(arrays(split.read(span)), wanted)
        np.testing.assert_equal(split.read_keys(span).keys, wanted[2])
    assert opened
    # Rows that do not follow one another come out of the mapped file.
    opened.clear()
    order = rng.permutation(400)
    for rows in (order, np.concatenate([[5], np.arange(0, 400)]), np.arange(399, -1, -1)):
        labels = split.read(rows).labels
        np.testing.assert_array_equal(labels, mapped[0][0][rows])
    assert not opened


def poked(split: Split, folder: Path, row: int, word: int, value: int) -> str:
    """Sets a word of a row; returns the file and the row inside it."""
    path, inside = split.files.locate(row)
    content = bytearray((folder / path.name).read_bytes())
    at = (inside * split.files.words_of(row).size + word) * 4
    content[at : at + 4] = np.int32(value).tobytes()
    with (folder / path.name).open("r+b") as file:  # in place: it is mapped
        file.write(content)
    return f"{path.name}: row {inside} (byte {at})"


def test_faults_in_blocks_are_named_by_file_row_and_byte(
    prepared: Callable[..., Path], rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raw, "_READ_BYTES", 1)
    monkeypatch.setattr(raw, "_BUFFER_BYTES", 1000)
    for word, value, message in (
        (0, 7, "label 7 is neither"),
        (2, 0x7FC00000, "dense column 'd1' is nan"),
        (3, -0x00800000, "dense column 'd2' is -inf"),
        (4, -1, "table 'T0' has no key"),
        (6, 9, "key 9 of table 'T2' lies outside its rows 0 .. 8"),
        (7, 2**31 - 1, f"key {2**31 - 1} of table 'T3' lies outside"),
        (5, -(2**31), f"key {-(2**31)} of table 'T1' lies outside"),
    ):
        folder = cut_up(prepared(f"w{word}", shape=ONES, num_dense=3, rows=300), rng)
        split = load_dataset(folder).split("train")
        place = poked(split, folder, int(rng.integers(300)), word, value)
        for rows in (slice(0, 300), rng.permutation(300)):
            with pytest.raises(DataError, match=re.escape(f"{place}: ") + f".*{re.escape(message)}"):
                split.read(rows)


def test_a_file_that_is_cut_short_or_goes_away_while_it_is_read_is_named(
    prepared: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raw, "_READ_BYTES", 1)
    folder = prepared(shape=ONES, num_dense=3, rows=300)
    split = load_dataset(folder).split("train")
    os.truncate(folder / "train.bin", 123 * 32 + 5)
    with pytest.raises(DataError, match=r"train\.bin: row 123 \(byte 3941\): the file ends there, but 5659 more"):
        split.read(slice(0, 300))
    (folder / "train.bin").unlink()
    with pytest.raises(DataError, match=r"train\.bin: No such file"):
        split.read(slice(0, 300))


def test_a_split_of_more_files_than_a_process_may_open_is_read(
    prepared: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepared(shape=ONES, num_dense=3, rows=200)
    manifest, content = read_manifest(folder), (folder / "train.bin").read_bytes()
    for row in range(200):
        (folder / f"{row}.bin").write_bytes(content[32 * row : 32 * (row + 1)])
    files = tuple(FileInfo(path=f"{row}.bin", rows=1, bytes=32) for row in range(200))
    write_manifest(folder, replace(manifest, splits={"train": SplitInfo(rows=200, files=files)}))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = {int(entry.name) for entry in Path("/proc/self/fd").iterdir()}
    few = [number for number in range(len(taken) + 60) if number not in taken][50]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, limits[1]))
        monkeypatch.setattr(raw, "allow_files", lambda _: None)
        with pytest.raises(DataError, match=r"\.bin: Too many open files; raise the limit with `ulimit -n`"):
            load_dataset(folder).split("train")
        monkeypatch.undo()
        split = load_dataset(folder).split("train")
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > few
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    found = split.read(np.arange(200))
    assert found.labels.tolist() == np.frombuffer(content, np.int32).reshape(200, 8)[:, 0].tolist()
