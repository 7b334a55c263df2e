"""Criteo preparation: the compiled engine against plain Python, and what it refuses."""

from __future__ import annotations

import gzip
import math
import os
import random
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm.errors import ConfigError, DataError
from pipeline.dataset import load_dataset
from pipeline.etl import chunks, criteo_text
from pipeline.etl.criteo import CriteoInputs
from pipeline.etl.criteo import prepare_criteo as prepare
from pipeline.etl.rules import make_rules

REPOSITORY = Path(__file__).parents[3]
REAL_ROWS = Path(os.environ.get("CROSSLANE_CRITEO_DIR", str(REPOSITORY / ".." / "shared" / "data")))

Row = tuple[int, list[int | None], list[int | None]]


def random_rows(source: random.Random, n: int, pool: int = 6) -> list[Row]:
    """Rows whose categories repeat, with missing, negative and very large values among them."""
    values = [[source.getrandbits(32) for _ in range(pool)] + [None] for _ in range(26)]
    integers = (None, 0, 1, -1, -3, 17, 10**6, 10**18 - 1, -(10**18) + 1)
    return [
        (source.randint(0, 1), [source.choice(integers) for _ in range(13)], [source.choice(v) for v in values])
        for _ in range(n)
    ]


def line_of(row: Row, *, upper: bool = False) -> str:
    label, integers, categories = row
    texts = ["" if value is None else format(value, "08X" if upper else "08x") for value in categories]
    return "\t".join([str(label), *("" if value is None else str(value) for value in integers), *texts])


def write(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(line_of(row) + "\n" for row in rows))
    return path


def prepare_criteo(train: list[Path], test: list[Path], out: Path, **options: Any) -> Path:
    given = {name: options.pop(name) for name in ("validation", "validation_fraction", "last_day") if name in options}
    engine = {
        name: options.pop(name) for name in ("threads", "progress", "memory_limit", "overwrite") if name in options
    }
    return prepare(CriteoInputs(train=train, test=test, **given), out, rules=make_rules(**options), **engine)


def content(directory: Path, split: str) -> bytes:
    """A split's shards, one after the other."""
    return b"".join(
        (directory / file.path).read_bytes() for file in load_dataset(directory).manifest.splits[split].files
    )


def words(directory: Path, split: str) -> np.ndarray:
    return np.frombuffer(content(directory, split), "<i4").reshape(-1, 40)


def plain_numbers(rows: list[Row], threshold: int) -> list[dict[int | None, int]]:
    """For each column, category -> number, by sorting in plain Python."""
    numbers = []
    for column in range(26):
        counts = Counter(row[2][column] for row in rows)
        kept = sorted((-count, -1 if value is None else value) for value, count in counts.items() if count >= threshold)
        numbers.append({None if value < 0 else value: place for place, (_, value) in enumerate(kept, 1)})
    return numbers


def assert_encoded(found: np.ndarray, rows: list[Row], numbers: list[dict[int | None, int]]) -> None:
    assert found[:, 0].tolist() == [label for label, _, _ in rows]
    dense = [[math.log1p(max(value or 0, 0)) for value in integers] for _, integers, _ in rows]
    np.testing.assert_array_almost_equal_nulp(
        found[:, 1:14].copy().view(np.float32), np.array(dense, np.float32).reshape(-1, 13), nulp=1
    )
    expected = [[numbers[column].get(value, 0) for column, value in enumerate(row[2])] for row in rows]
    assert found[:, 14:].tolist() == expected


@settings(max_examples=25, deadline=None)
@given(
    source=st.randoms(use_true_random=False),
    num_train=st.integers(2, 60),
    num_test=st.integers(0, 20),
    threshold=st.integers(1, 5),
    piece_bytes=st.integers(1, 3000),
    chunk_bytes=st.integers(1, 5000),
    line_end=st.sampled_from(["\n", "\r\n"]),
    ended=st.booleans(),
    upper=st.booleans(),
    validation=st.sampled_from([0.0, 0.3, 0.5]),
)
def test_engine_equals_plain_python(
    source: random.Random,
    num_train: int,
    num_test: int,
    threshold: int,
    piece_bytes: int,
    chunk_bytes: int,
    line_end: str,
    ended: bool,
    upper: bool,
    validation: float,
) -> None:
    rows = random_rows(source, num_train + num_test)
    train, test = rows[:num_train], rows[num_train:]
    counted = num_train - round(num_train * validation)
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "PIECE_BYTES", piece_bytes)
        patch.setattr(chunks, "SMALLEST_CHUNK", chunk_bytes)
        folder = Path(name)
        files = {}
        for split, part in (("train", train), ("test", test)):
            text = line_end.join(line_of(row, upper=upper) for row in part) + (line_end if ended else "")
            (folder / split).write_bytes(text.encode())
            files[split] = [folder / split] if part else []
        out = prepare_criteo(
            files["train"],
            files["test"],
            folder / "out",
            validation_fraction=validation,
            frequency_threshold=threshold,
            threads=2,
        )
        numbers = plain_numbers(train[:counted], threshold)
        assert_encoded(words(out, "train"), train[:counted], numbers)
        if counted < num_train:
            assert_encoded(words(out, "validation"), train[counted:], numbers)
        if test:
            assert_encoded(words(out, "test"), test, numbers)
        manifest = load_dataset(out).manifest
        assert [table.rows for table in manifest.tables] == [len(column) + 1 for column in numbers]


def test_test_rows_influence_no_number(tmp_path: Path) -> None:
    source = random.Random()
    train = write(tmp_path / "train.tsv", random_rows(source, 50))
    outputs = []
    for name in ("a", "b"):
        test = write(tmp_path / f"{name}.tsv", random_rows(source, 200))
        outputs.append(prepare_criteo([train], [test], tmp_path / f"out_{name}"))
    assert content(outputs[0], "train") == content(outputs[1], "train")
    assert load_dataset(outputs[0]).tables == load_dataset(outputs[1]).tables
    # Categories drawn anew share no value with the training rows (but for the missing one).
    assert set(np.unique(words(outputs[0], "test")[:, 14:])) - {0} <= set(range(1, 8))
    unseen = words(prepare_criteo([train], [tmp_path / "a.tsv"], tmp_path / "c", frequency_threshold=51), "test")
    assert not unseen[:, 14:].any()


def test_validation_rows_influence_no_number(tmp_path: Path) -> None:
    source = random.Random()
    first = random_rows(source, 40)
    outputs = []
    for name in ("a", "b"):
        rows = first + random_rows(source, 10)
        file = write(tmp_path / f"{name}.tsv", rows)
        outputs.append(prepare_criteo([file], [], tmp_path / f"out_{name}", validation_fraction=0.2))
    assert content(outputs[0], "train") == content(outputs[1], "train")
    separate = prepare_criteo(
        [write(tmp_path / "first.tsv", first)],
        [],
        tmp_path / "out_c",
        validation=[write(tmp_path / "v.tsv", rows[40:])],
    )
    for split in ("train", "validation"):
        assert content(outputs[1], split) == content(separate, split)


def test_gzip_and_several_files_equal_one_plain_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "PIECE_BYTES", 1000)
    rows = random_rows(random.Random(), 60)
    whole = prepare_criteo([write(tmp_path / "all.tsv", rows)], [], tmp_path / "whole", validation_fraction=0.25)
    files = []
    for number, part in enumerate((rows[:7], rows[7:50], rows[50:])):
        files.append(tmp_path / f"{number}.tsv.gz")
        files[-1].write_bytes(gzip.compress("\n".join(map(line_of, part)).encode()))
    seen: list[tuple[str, int, int]] = []
    parts = prepare_criteo(
        files, [], tmp_path / "parts", validation_fraction=0.25, progress=lambda *step: seen.append(step)
    )
    for split in ("train", "validation"):
        assert content(whole, split) == content(parts, split)
    total = sum(file.stat().st_size for file in files)
    assert {phase: done for phase, done, _ in seen if phase != "number"} == {"count": total, "encode": total}
    assert {of for phase, _, of in seen if phase != "number"} == {total}


GOOD = line_of((1, [5] * 13, [0xAB] * 26))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (GOOD.rsplit("\t", 1)[0], "39 columns, but a row has 40"),
        ("", "1 columns|column 1 \\(label\\): ''"),
        (GOOD + "\t", "more than 40 columns"),
        (GOOD + "\tx", "more than 40 columns"),
        ("2" + GOOD[1:], "column 1 \\(label\\): '2', but must be 0 or 1"),
        ("label" + GOOD[1:], "column 1 \\(label\\): 'label'"),
        (GOOD[1:], "column 1 \\(label\\): ''"),
        (GOOD.replace("5", "5.5", 1), "column 2 \\(I1\\): '5.5', but must be an integer"),
        (GOOD.replace("5", "-", 1), "column 2 \\(I1\\): '-'"),
        (
            GOOD.replace("5", "1" * 19, 1),
            "column 2 \\(I1\\): '1111111111111111111', but must be an integer of at most 18",
        ),
        (GOOD[:-8] + "0000000g", "column 40 \\(C26\\): '0000000g', but must be 8 hexadecimal digits"),
        (GOOD[:-8] + "000000a", "column 40 \\(C26\\): '000000a'"),
        (GOOD[:-8] + "0000000\xff", "column 40 \\(C26\\)"),
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_malformed_rows_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, message: str, split: str
) -> None:
    monkeypatch.setattr(chunks, "PIECE_BYTES", 500)
    good, bad = tmp_path / "good.tsv", tmp_path / "bad.tsv"
    good.write_text(f"{GOOD}\n" * 3)
    bad.write_bytes("\n".join([GOOD] * 11 + [line] + [GOOD] * 3).encode("latin-1"))
    files = ([bad], [good]) if split == "train" else ([good], [bad])
    with pytest.raises(DataError, match=f"bad.tsv: line 12: .*({message})"):
        prepare_criteo(*files, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_that_will_not_do_are_named(tmp_path: Path) -> None:
    good, empty = write(tmp_path / "good.tsv", random_rows(random.Random(), 5)), tmp_path / "empty.tsv"
    empty.touch()
    cut = tmp_path / "cut.tsv.gz"
    cut.write_bytes(gzip.compress(good.read_bytes() * 50)[:-20])
    for train, test, message in (
        ([tmp_path / "absent.tsv"], [], "absent.tsv: no such file"),
        ([tmp_path], [], "not a file"),
        ([empty], [], "empty.tsv: empty"),
        ([cut], [], r"cut.tsv.gz: damaged or truncated gzip .* after \d+ whole lines \(\d+ bytes of text\)"),
        ([good], [good], "named for train and again for test"),
        ([good, good], [], "name each file once"),
    ):
        with pytest.raises(DataError, match=message):
            prepare_criteo(train, test, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_fraction": 1.0}, "validation fraction: 1.0"),
        ({"validation_fraction": math.nan}, "validation fraction: nan"),
        ({"validation_fraction": 0.01}, "leaves 5 to train on and 0 to validate on"),
        ({"validation_fraction": 0.2, "validation": [Path("x")]}, "give one of them"),
        ({"frequency_threshold": 0}, "frequency threshold: 0"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path: Path, options: dict[str, object], message: str) -> None:
    file = write(tmp_path / "rows.tsv", random_rows(random.Random(), 5))
    with pytest.raises(ConfigError, match=message):
        prepare_criteo([file], [], tmp_path / "out", **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="train files: none"):
        prepare_criteo([], [file], tmp_path / "out")


def test_real_rows_are_numbered_by_frequency(tmp_path: Path) -> None:
    train, test = REAL_ROWS / "criteo_kaggle_train_7200.tsv", REAL_ROWS / "criteo_kaggle_test_800.tsv"
    if not train.is_file() or not test.is_file():
        pytest.skip(f"no Criteo rows in {REAL_ROWS}; set CROSSLANE_CRITEO_DIR to their folder")
    out = prepare_criteo([train], [test], tmp_path / "out", frequency_threshold=3)
    found, unseen = words(out, "train"), words(out, "test")
    assert (len(found), len(unseen)) == (7200, 800)
    frames = [pl.read_csv(file, separator="\t", has_header=False, infer_schema=False) for file in (train, test)]
    for frame in frames:
        frame.columns = list(criteo_text.COLUMN_NAMES)
    for column in range(26):
        name = f"C{column + 1}"
        counts = frames[0].group_by(pl.col(name).alias("value")).len("count").filter(pl.col("count") >= 3)
        # A category's number and its Polars rank agree, missing being smaller than every value.
        ranked = counts.sort(["count", "value"], descending=[True, False], nulls_last=False)["value"].to_list()
        numbers = {value: place for place, value in enumerate(ranked, 1)}
        for frame, rows in zip(frames, (found, unseen), strict=True):
            assert rows[:, 14 + column].tolist() == [numbers.get(value, 0) for value in frame[name]]
        by_number = np.bincount(found[:, 14 + column])[1:]
        assert (np.diff(by_number) <= 0).all()
        assert by_number.min() >= 3
    label, first = frames[0]["label"].cast(pl.Int32), frames[0]["I1"].cast(pl.Float64).fill_null(0)
    assert found[:, 0].tolist() == label.to_list()
    expected = np.log1p(np.maximum(first.to_numpy(), 0))
    np.testing.assert_allclose(found[:, 1].copy().view(np.float32), expected, rtol=1e-6)
