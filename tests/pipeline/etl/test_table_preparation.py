"""The table preparer: what goes in comes out, training rows alone decide numbers, and bad tables are refused."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm.errors import ConfigError, CrosslaneError, DataError
from embedding.jagged import Jagged
from pipeline.dataset import HostBatch, load_dataset
from pipeline.etl.schema import TableSchema, load_schema, parse_schema
from pipeline.etl.table import prepare_table


def read(directory: Path, split: str) -> HostBatch:
    return load_dataset(directory).split(split).read(slice(None))


def bags(keys: Jagged) -> list[list[list[int]]]:
    """Keys by table, row and place."""
    num_rows = keys.num_rows
    offsets = np.arange(keys.num_tables * num_rows + 1) if keys.offsets is None else keys.offsets
    cut = [keys.keys[a:b].tolist() for a, b in pairwise(offsets)]
    return [cut[table * num_rows : (table + 1) * num_rows] for table in range(keys.num_tables)]


def prepared(tmp_path: Path, schema: dict[str, Any], train: Any, test: Any = None) -> Path:
    inputs = {"train": pl.DataFrame(train, strict=False)}
    if test is not None:
        inputs["test"] = pl.DataFrame(test, schema=inputs["train"].schema)
    return prepare_table(parse_schema(schema), inputs, tmp_path / "out", overwrite=True)


def test_csv_round_trip(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(
        "stars,age,clicks,city,tags,note\n5,20,0,Oslo,a|b,x\n3,30,7,Bonn,,x\n4,,-2,Oslo,b,x\n1,40,,,b|c|a,\n"
    )
    (tmp_path / "test.csv").write_text('stars,age,clicks,city,tags,note\n4.5,100,1,"Rom, Lazio",d|b,\n')
    (tmp_path / "schema.yaml").write_text(
        yaml.safe_dump(
            {
                "label": {"column": "stars", "rule": ">= 4"},
                "dense": [
                    {"column": "age", "missing": "mean", "transform": "standardise"},
                    {"column": "clicks", "missing": -1, "transform": "log1p"},
                ],
                "tables": [
                    {"column": "city", "name": "place"},
                    {"column": "tags", "multi_hot": {"separator": "|"}, "threshold": 2},
                ],
            }
        )
    )
    inputs = {"train": [tmp_path / "train.csv"], "test": [tmp_path / "test.csv"]}
    out = prepare_table(tmp_path / "schema.yaml", inputs, tmp_path / "out")
    train, test = read(out, "train"), read(out, "test")
    assert train.labels.tolist() == [1, 0, 1, 0]
    assert test.labels.tolist() == [1]
    # Mean of the training rows 30, deviation of (20, 30, 30, 40) sqrt(50).
    np.testing.assert_allclose(train.dense[:, 0], np.array([-10, 0, 0, 10]) / np.sqrt(50), atol=1e-6)
    np.testing.assert_allclose(test.dense[0], [70 / np.sqrt(50), np.log(2)], rtol=1e-6)
    np.testing.assert_allclose(train.dense[:, 1], [0, np.log(8), 0, 0], rtol=1e-6)
    # Oslo twice; the missing city comes before Bonn; tag c is rare (0) and d unseen (0).
    place, tags = bags(train.keys)
    assert place == [[1], [3], [1], [2]]
    assert tags == [[2, 1], [], [1], [1, 0, 2]]
    assert bags(test.keys) == [[[0]], [[0, 1]]]
    manifest = load_dataset(out).manifest
    assert [(table.name, table.rows, table.hotness) for table in manifest.tables] == [("place", 4, 1), ("tags", 3, 3)]
    assert any("deviation" in note or "7.07106781" in note for note in manifest.notes)


@settings(max_examples=40, deadline=None)
@given(
    train=st.lists(st.one_of(st.none(), st.integers(-3, 5)), min_size=1, max_size=40),
    test=st.lists(st.one_of(st.none(), st.integers(-9, 9)), min_size=1, max_size=10),
    threshold=st.integers(1, 4),
    as_text=st.booleans(),
)
def test_numbers_go_by_frequency_in_the_training_rows(
    tmp_path_factory: pytest.TempPathFactory,
    train: list[int | None],
    test: list[int | None],
    threshold: int,
    as_text: bool,
) -> None:
    folder = tmp_path_factory.mktemp("numbers")
    kind: Any = pl.String if as_text else pl.Int64
    convert = (lambda value: None if value is None else str(value)) if as_text else (lambda value: value)
    columns = [[convert(value) for value in values] for values in (train, test)]
    frames = [pl.DataFrame({"y": [0] * len(c), "c": pl.Series(c, dtype=kind)}) for c in columns]
    schema = parse_schema({"label": {"column": "y"}, "tables": [{"column": "c", "threshold": threshold}]})
    out = prepare_table(schema, {"train": frames[0], "test": frames[1]}, folder / "out")
    counts = Counter(columns[0])
    smallest = "" if as_text else -100
    order = sorted(
        (value for value, count in counts.items() if count >= threshold),
        key=lambda value: (-counts[value], smallest if value is None else value),
    )
    numbers = {value: place for place, value in enumerate(order, 1)}
    for split, values in zip(("train", "test"), columns, strict=True):
        assert read(out, split).keys.keys.tolist() == [numbers.get(value, 0) for value in values]
    assert load_dataset(out).tables[0].rows == len(order) + 1


@pytest.mark.parametrize("layout", ["raw", "jagged"])
@pytest.mark.parametrize("weighted", [False, True])
def test_npz_keeps_ids_and_values(tmp_path: Path, rng: np.random.Generator, layout: str, weighted: bool) -> None:
    n = 300
    lengths = rng.integers(0, 5, n)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    arrays = {
        "label": rng.integers(0, 2, n).astype(np.int32),
        "dense": rng.normal(size=(n, 3)).astype(np.float32),
        "one": rng.integers(0, 7, n).astype(np.int32),
        "many.keys": rng.integers(0, 50, offsets[-1]).astype(np.int32),
        "many.offsets": offsets,
    }
    multi_hot = {}
    if weighted:
        arrays["many.weights"] = rng.uniform(0.5, 2, offsets[-1]).astype(np.float32)
        multi_hot["weights"] = "many.weights"
    np.savez(tmp_path / "rows.npz", **arrays)
    schema = parse_schema(
        {
            "label": {"column": "label"},
            "dense": [{"column": "dense.*"}],
            "tables": [
                {"column": "one", "encoding": "identity", "rows": 9},
                {"column": "many", "encoding": "identity", "rows": 50, "multi_hot": multi_hot},
            ],
            "layout": layout,
        }
    )
    out = prepare_table(schema, {"train": [tmp_path / "rows.npz"]}, tmp_path / "out")
    batch = read(out, "train")
    np.testing.assert_array_equal(batch.labels, arrays["label"])
    np.testing.assert_array_equal(batch.dense, arrays["dense"])
    np.testing.assert_array_equal(batch.keys.keys[:n], arrays["one"])
    np.testing.assert_array_equal(batch.keys.keys[n:], arrays["many.keys"])
    np.testing.assert_array_equal(batch.keys.offsets[n:], n + offsets)
    if weighted:
        np.testing.assert_array_equal(batch.keys.weights, [*np.ones(n), *arrays["many.weights"]])
    assert [(table.name, table.rows) for table in load_dataset(out).tables] == [("one", 9), ("many", 50)]


def test_padded_arrays_and_lists_and_text_give_the_same_bags(tmp_path: Path, rng: np.random.Generator) -> None:
    n = 50
    padded = rng.integers(-1, 20, (n, 4))
    lists = [[key for key in row if key >= 0] for row in padded.tolist()]
    np.savez(tmp_path / "a.npz", y=np.ones(n, np.int8), keys=padded)
    pl.DataFrame({"y": np.ones(n, np.int8), "keys": pl.Series(lists, dtype=pl.List(pl.Int16))}).write_parquet(
        tmp_path / "a.parquet"
    )
    text = "".join(f"1;{' '.join(map(str, row))}\n" for row in lists)
    (tmp_path / "a.txt").write_text(text)
    found = []
    for name, extra, columns in (
        ("a.npz", {}, ("y", "keys")),
        ("a.parquet", {}, ("y", "keys")),
        ("a.txt", {"separator": " "}, ("column_1", "column_2")),
    ):
        schema = parse_schema(
            {
                "label": {"column": columns[0]},
                "separator": ";",
                "header": False,
                "tables": [
                    {"column": columns[1], "name": "keys", "encoding": "identity", "rows": 20, "multi_hot": extra}
                ],
            }
        )
        found.append(
            bags(read(prepare_table(schema, {"train": [tmp_path / name]}, tmp_path / f"out_{name}"), "train").keys)
        )
    assert found[0] == found[1] == found[2] == [lists]


def test_long_bags_keep_their_first_keys(tmp_path: Path) -> None:
    schema = {"label": {"column": "y"}, "tables": [{"column": "k", "encoding": "identity", "multi_hot": {"max": 2}}]}
    out = prepared(tmp_path, schema, {"y": [0, 1, 1], "k": [[4, 5, 6], [], [7]]})
    assert bags(read(out, "train").keys) == [[[4, 5], [], [7]]]
    table = load_dataset(out).tables[0]
    assert (table.rows, table.hotness) == (8, 2)
    assert any("first 2 keys of 1 rows" in note for note in load_dataset(out).manifest.notes)


def test_missing_identity_keys_are_no_keys(tmp_path: Path) -> None:
    schema = {"label": {"column": "y"}, "tables": [{"column": "k", "encoding": "identity"}]}
    out = prepared(tmp_path, schema, {"y": [0, 1, 1], "k": [2, None, -1]})
    assert bags(read(out, "train").keys) == [[[2], [], []]]


def test_test_rows_influence_nothing(tmp_path: Path, rng: np.random.Generator) -> None:
    schema = parse_schema(
        {
            "label": {"column": "y"},
            "dense": [{"column": "x", "transform": "standardise", "missing": "mean"}],
            "tables": [{"column": "c"}, {"column": "m", "multi_hot": {"separator": " ", "max": 3}}],
        }
    )

    def frame(n: int, shift: float) -> pl.DataFrame:
        values: list[float | None] = (rng.normal(size=n) + shift).tolist()
        values[0] = None
        words = [" ".join(map(str, rng.integers(0, 9, rng.integers(0, 4)))) for _ in range(n)]
        return pl.DataFrame({"y": rng.integers(0, 2, n), "x": values, "c": rng.integers(0, 30, n), "m": words})

    train = frame(100, 0)
    outputs = [
        prepare_table(schema, {"train": train, "test": frame(200, shift)}, tmp_path / f"out_{shift}")
        for shift in (0, 1000)
    ]
    assert (outputs[0] / "train.bin").read_bytes() == (outputs[1] / "train.bin").read_bytes()
    manifests = [json.loads((out / "dataset.json").read_text()) for out in outputs]
    assert manifests[0]["notes"] == manifests[1]["notes"]
    assert manifests[0]["tables"] == manifests[1]["tables"]


def row_numbers(directory: Path) -> dict[str, list[int]]:
    return {split: read(directory, split).keys.keys.tolist() for split in load_dataset(directory).splits}


def test_random_split_is_a_partition_fixed_by_its_seed(tmp_path: Path, seed: int) -> None:
    frame = pl.DataFrame({"y": [1] * 200, "row": range(200)})
    found = []
    for number, chosen in enumerate((seed, seed, seed + 1)):
        schema = parse_schema(
            {
                "label": {"column": "y"},
                "tables": [{"column": "row", "encoding": "identity"}],
                "split": {"by": "random", "test": 0.2, "validation": 0.1, "seed": chosen},
            }
        )
        found.append(row_numbers(prepare_table(schema, {"all": frame}, tmp_path / str(number))))
    assert {name: len(rows) for name, rows in found[0].items()} == {"train": 140, "validation": 20, "test": 40}
    assert sorted(chain(*found[0].values())) == list(range(200))
    assert found[0] == found[1]
    assert found[0]["test"] != found[2]["test"]
    assert found[0]["test"] != list(range(160, 200))


@pytest.mark.parametrize("column", ["time", None])
@pytest.mark.parametrize("as_text", [False, True])
def test_ordered_split_takes_the_last_rows(tmp_path: Path, column: str | None, as_text: bool) -> None:
    time = [5, 100, 20, 20, 1, 7, 9, 30, 8, 2]
    frame = pl.DataFrame({"y": [1] * 10, "row": range(10), "time": list(map(str, time)) if as_text else time})
    schema = parse_schema(
        {
            "label": {"column": "y"},
            "tables": [{"column": "row", "encoding": "identity"}],
            "split": {"by": "order", "test": 0.2, "validation": 0.2, "column": column},
        }
    )
    order = sorted(range(10), key=lambda row: time[row]) if column else list(range(10))
    expected = {"train": order[:6], "validation": order[6:8], "test": order[8:]}
    assert row_numbers(prepare_table(schema, {"all": frame}, tmp_path / "out")) == expected


MINIMAL: dict[str, Any] = {"label": {"column": "y"}, "dense": [{"column": "x"}], "tables": [{"column": "c"}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lable": {}}, "lable: unknown field"),
        ({"dense": [{"column": "x", "clip": 1}]}, "dense.0.clip: unknown field"),
        ({"tables": [{"column": "c", "multi_hot": {"sep": " "}}]}, "tables.0.multi_hot.sep: unknown field"),
        ({"tables": [{"column": "c", "threshold": 0}]}, "tables.0.threshold"),
        ({"tables": [{"column": "c", "rows": 5}]}, "rows = 5 goes with encoding identity"),
        ({"label": {"column": "y", "rule": "about 4"}}, "label.rule: 'about 4'"),
        ({"label": {}}, "label.column: missing"),
        ({"split": {"by": "random", "test": 0.6, "validation": 0.4}}, "leave no training rows"),
        ({"split": {"test": 0.5}}, "split.by: files"),
        ({"dense": [], "tables": []}, "both empty"),
        ({"separator": ",,"}, "separator"),
    ],
)
def test_wrong_schemas_are_refused_with_the_field(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "schema.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, **change}))
    with pytest.raises(ConfigError, match=message):
        load_schema(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("y,x,c\n1,2,a\n0,1\n", r"line 3: 2 columns, but the first line has 3"),
        ("y,x,c\n1,2,a\n0,1,b,c\n", r"line 3: 4 columns"),
        ("y,x,c\n1,2,a\n0,x1,b\n", r"rows.csv: row 2: column 'x': 'x1', but must be a finite number"),
        ("y,x,c\n1,inf,a\n", r"row 1: column 'x': 'inf'"),
        ("y,x,c\n1,1e39,a\n", r"row 1: column 'x': 1e\+39, but must be within float32"),
        ("y,x,c\n1,2,a\n1,,a\n", r"row 2: column 'x': None, but must be there"),
        ("y,x,c\n1,2,a\n1,NaN,a\n", r"row 2: column 'x': None, but must be there"),
        ("y,x,c\n1,2,a\n4,2,a\n", r"row 2: column 'y': 4.0, but must be 0 or 1"),
        ("y,x,c\n1,2,a\n,2,a\n", r"row 2: column 'y': None"),
        ("y,x,d\n1,2,a\n", r"column 'c': not in .*rows.csv, which has y, x, d"),
        ("y,x,c\n", r"no rows"),
        ("", r"rows.csv: empty"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        prepare_table(parse_schema(MINIMAL), {"train": [path]}, tmp_path / "out")


@pytest.mark.parametrize("row", ["0,1", "0,1,b,c"])
def test_rows_of_another_width_are_named_in_compressed_files_too(tmp_path: Path, row: str) -> None:
    path = tmp_path / "rows.csv.gz"
    path.write_bytes(gzip.compress(f"y,x,c\n1,2,a\n{row}\n".encode()))
    with pytest.raises(
        DataError, match=rf"rows.csv.gz: line 3: {row.count(',') + 1} columns, but the first line has 3"
    ):
        prepare_table(parse_schema(MINIMAL), {"train": [path]}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, 1.0])
def test_compressed_files_that_are_cut_short_say_how_far_they_go(
    tmp_path: Path, rng: np.random.Generator, kept: float
) -> None:
    rows = [f"{number % 2},{number},{key}" for number, key in enumerate(rng.integers(0, 10**9, 20_000))]
    packed = gzip.compress(("y,x,c\n" + "\n".join(rows) + "\n").encode())
    path = tmp_path / "rows.csv.gz"
    path.write_bytes(packed[: max(5, round(kept * len(packed)) - 6)])
    message = r"rows\.csv\.gz: damaged or truncated gzip .* after \d+ whole lines \(\d+ bytes of text\)"
    with pytest.raises(DataError, match=message):
        prepare_table(parse_schema(MINIMAL), {"train": [path]}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("columns", "table", "message"),
    [
        ({"c": [1, 7]}, {"encoding": "identity", "rows": 7}, r"row 2: column 'c': 7, but must be a key from 0 to 6"),
        ({"c": [1, -2]}, {"encoding": "identity"}, r"row 2: column 'c': -2"),
        ({"c": ["1", "1.5"]}, {"encoding": "identity"}, r"row 2: column 'c': '1.5', but must be a key from 0, or -1"),
        ({"c": [1.0, 2.0]}, {"encoding": "identity"}, r"Float64 values, but encoding identity needs integers"),
        ({"c": [1.0, 2.0]}, {}, r"Float64 values cannot be categories"),
        ({"c": [[1], [2]]}, {}, r"set multi_hot for lists"),
        ({"c": ["a b", "c"]}, {"multi_hot": {}}, r"multi_hot.separator must split"),
        ({"c": [1, 2]}, {"multi_hot": {}}, r"multi_hot needs lists"),
        ({"c": [[1], [2, 9]]}, {"encoding": "identity", "rows": 9, "multi_hot": {}}, r"row 2: column 'c': 9"),
        ({"c": [[1], [2, None]]}, {"multi_hot": {}}, r"row 2: column 'c': None"),
        (
            {"c": [[1], [2]], "w": [[1.0], [1.0, 2.0]]},
            {"multi_hot": {"weights": "w"}},
            r"row 2: column 'w': '2 weights'",
        ),
        ({"c": [[1], [2]], "w": [[1.0], [None]]}, {"multi_hot": {"weights": "w"}}, r"row 2: column 'w': None"),
        ({"c": [1, 2]}, {"column": "d*"}, r"columns 'd\*': none"),
    ],
)
def test_bad_categories_are_named(tmp_path: Path, columns: dict[str, Any], table: dict[str, Any], message: str) -> None:
    schema = {"label": {"column": "y"}, "tables": [{"column": "c", **table}]}
    with pytest.raises(CrosslaneError, match=message):
        prepared(tmp_path, schema, {"y": [0, 1], **columns})


def test_bad_inputs_are_named(tmp_path: Path) -> None:
    schema: TableSchema = parse_schema(MINIMAL)
    good = tmp_path / "good.csv"
    good.write_text("y,x,c\n1,2,a\n")
    (tmp_path / "other.csv").write_text("y,c,x\n1,a,2\n")
    (tmp_path / "rows.parquet").write_text("no parquet")
    (tmp_path / "rows.npz").write_text("no npz")
    (tmp_path / "rows.dat").write_text("y\n1\n")
    np.savez(tmp_path / "uneven.npz", y=np.ones(3), x=np.ones(2))
    np.savez(tmp_path / "cut.npz", **{"c.keys": np.ones(3), "c.offsets": np.array([0, 2])})
    for inputs, message in (
        ({"train": [tmp_path / "absent.csv"]}, "absent.csv: no such file"),
        ({"train": [good, tmp_path / "other.csv"]}, "all files need the same columns"),
        ({"train": [good], "test": [good]}, "named for train and again for test"),
        ({"test": [good]}, "no files of split train"),
        ({"train": [tmp_path / "rows.parquet"]}, "not a readable parquet"),
        ({"train": [tmp_path / "rows.npz"]}, "not a readable npz file of plain arrays; write it with numpy.savez"),
        ({"train": [tmp_path / "rows.dat"]}, "says no format"),
        ({"train": [tmp_path / "uneven.npz"]}, "all need as many"),
        ({"train": [tmp_path / "cut.npz"]}, "must rise from 0 to the 3 values"),
    ):
        with pytest.raises(CrosslaneError, match=message):
            prepare_table(schema, inputs, tmp_path / "out")
    with pytest.raises(ConfigError, match="divides one set of files"):
        prepare_table(
            parse_schema({**MINIMAL, "split": {"by": "random", "test": 0.5}}),
            {"train": [good], "test": [tmp_path / "other.csv"]},
            tmp_path / "out",
        )
