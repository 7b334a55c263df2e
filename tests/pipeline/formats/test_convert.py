"""Any format into any other and back: nothing changes, or what changes is allowed by name."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from format_cases import MULTI_HOT, ONE_HOT, assert_same, collect, read_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm.errors import ConfigError, DataError
from pipeline.convert import FORMATS, convert, detect, format_named
from pipeline.dataset import load_dataset
from pipeline.etl.criteo import CriteoInputs, prepare_criteo
from pipeline.formats.block import Schema, make_block
from pipeline.formats.interchange import LOSSES, WriteOptions
from pipeline.generated import describe_synthetic
from pipeline.manifest import TableInfo, write_manifest

REPOSITORY = Path(__file__).parents[3]
REAL_ROWS = Path(os.environ.get("CROSSLANE_CRITEO_DIR", str(REPOSITORY / ".." / "shared" / "data")))

NAMES = [known.name for known in FORMATS]
COUNTS = {"facebook-npz", "criteo-tsv"}
"""Formats that hold counts, and no float dense columns."""
BOTH = {"raw", "jagged"}
ONE_KEY = {"split-binary", "facebook-npz", "criteo-tsv"}
"""Formats with one key a table."""
FULL = {"split-binary", "facebook-npz", "torchrec-npy"}
"""Formats in which no key may be missing."""


def random_rows(rng: np.random.Generator, schema: Schema, rows: int, *, missing: bool) -> Any:
    """A block of random rows, with extreme values among them."""
    limits = np.repeat(schema.table_rows, np.diff(schema.columns))
    keys = rng.integers(-1 if missing else 0, limits, (rows, limits.size))
    keys[rng.random(keys.shape) < 0.1] = 0
    largest = rng.random(keys.shape) < 0.1
    keys[largest] = np.broadcast_to(limits - 1, keys.shape)[largest]
    num_dense = len(schema.dense_names)
    if schema.dense == "float32":
        dense = rng.normal(size=(rows, num_dense)).astype(np.float32)
        dense[rng.random(dense.shape) < 0.1] = np.float32(3.4e38)
        dense[rng.random(dense.shape) < 0.1] = np.float32(-1e-42)
    elif schema.dense == "float16":
        dense = rng.normal(size=(rows, num_dense)).astype(np.float16).astype(np.float32)
    else:
        dense = rng.integers(-(2**31), 2**31, (rows, num_dense))
        dense[rng.random(dense.shape) < 0.1] = -(2**31)
        if schema.dense == "natural":
            dense &= 2**31 - 1
    weights = rng.normal(size=keys.shape).astype(np.float32) if schema.weighted else None
    return make_block(rng.integers(0, 2, rows), dense, keys, weights)


@pytest.mark.parametrize("name", NAMES)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    hotness=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    num_dense=st.integers(0, 3),
    limit=st.sampled_from([1, 3, 126, 127, 128, 40_000, 2**31 - 2]),
    options=st.builds(
        WriteOptions,
        key_dtype=st.sampled_from([None, "int64"]),
        check_sum=st.booleans(),
        offset_keys=st.booleans(),
        rows_per_file=st.sampled_from([None, 1, 7]),
    ),
    missing=st.booleans(),
)
@settings(deadline=None, max_examples=12)
def test_random_rows_come_back_as_they_were_written(
    name: str,
    seed: int,
    rows: list[int],
    hotness: list[int],
    num_dense: int,
    limit: int,
    options: WriteOptions,
    missing: bool,
) -> None:
    rng = np.random.default_rng(seed)
    if name in ONE_KEY:
        hotness = [1] * len(hotness)
    if name == "criteo-tsv":
        hotness, num_dense, limit = [1] * 26, 13, min(limit, 2**32)
    dense = "natural" if name == "facebook-npz" else "int32" if name == "criteo-tsv" else "float32"
    if name == "split-binary":
        dense = "float16"
    schema = Schema(
        name="x",
        dense_names=tuple(f"d{n}" for n in range(num_dense)),
        dense=dense,
        tables=tuple(TableInfo(name=f"T{t}", rows=max(1, limit - t), hotness=count) for t, count in enumerate(hotness)),
        weighted=name in BOTH and bool(seed % 2),
        missing_keys=missing and name not in FULL,
    )
    writer = format_named(name)
    fit = writer.fit(schema, options)
    assert not fit.losses
    blocks = {
        split: [random_rows(rng, schema, count, missing=schema.missing_keys) for count in rows]
        for split in ("train", "test")
    }
    with tempfile.TemporaryDirectory() as folder:
        sink = writer.write(Path(folder), fit.schema, options)
        for split, parts in blocks.items():
            for block in parts:
                sink.write(split, block)
        sink.finish()
        sink.close()
        assert detect(Path(folder)).name == ("raw" if name in BOTH else name)
        for split, parts in blocks.items():
            assert_same(read_rows(Path(folder), split), collect(parts, schema))


@pytest.mark.parametrize("name", sorted(set(NAMES) - COUNTS))
@pytest.mark.parametrize("shape", [ONE_HOT, MULTI_HOT])
def test_a_float_set_goes_through_and_back(prepared: Any, tmp_path: Path, name: str, shape: Any) -> None:
    if name in ONE_KEY and shape is MULTI_HOT:
        with pytest.raises(DataError, match=r"split-binary cannot hold table 'T0' of 3 keys"):
            convert(prepared(shape=shape), tmp_path / "out", to=name)
        return
    source = prepared(shape=shape)
    allow = frozenset({"fp16-dense"}) if name == "split-binary" else frozenset()
    done = convert(source, tmp_path / "out", to=name, allow=allow)  # type: ignore[arg-type]
    back = convert(tmp_path / "out", tmp_path / "back", to="raw")
    assert done.verified
    assert {split: both.rows for split, both in done.splits.items()} == {"train": 50, "test": 26}
    for split, both in done.splits.items():
        assert (both.source_sum == both.target_sum) == (name != "split-binary")
        assert both.target_sum == back.splits[split].source_sum == back.splits[split].target_sum
        wanted = read_rows(source, split)
        if name == "split-binary":
            wanted.dense = wanted.dense.astype(np.float16).astype(np.float32)
        assert_same(read_rows(tmp_path / "back", split), wanted)
    one, other = load_dataset(source).manifest, load_dataset(tmp_path / "back").manifest
    assert (one.name, one.tables, one.dense.names) == (other.name, other.tables, other.dense.names)
    assert (one.licence, one.notes) == (other.licence, other.notes)


@pytest.mark.parametrize("name", sorted(set(NAMES) - FULL - {"criteo-tsv"}))
def test_missing_keys_survive_where_there_is_a_place_for_them(prepared: Any, tmp_path: Path, name: str) -> None:
    source = prepared(shape=((5, 1), (9, 4)), missing=True)
    convert(source, tmp_path / "out", to=name)
    assert_same(read_rows(tmp_path / "out"), read_rows(source))


@pytest.mark.parametrize("name", sorted(FULL - COUNTS))
def test_missing_keys_are_refused_elsewhere(prepared: Any, tmp_path: Path, name: str) -> None:
    source = prepared(shape=((1, 1),), missing=True, rows=200)
    with pytest.raises(DataError, match=r"split 'train': row \d+: table 'T0' has no key"):
        convert(source, tmp_path / "out", to=name, allow=frozenset(LOSSES))
    assert not (tmp_path / "out").exists()


def test_a_bag_that_is_not_full_is_refused_by_torchrec(prepared: Any, tmp_path: Path) -> None:
    source = prepared(shape=((1, 3),), missing=True, rows=200)
    with pytest.raises(DataError, match=r"split 'train': row \d+: table 'T0' lacks a key"):
        convert(source, tmp_path / "out", to="torchrec-npy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize(
    ("options", "name", "losses"),
    [
        ({}, "split-binary", ["fp16-dense"]),
        ({"dense_dtype": "int32"}, "norm", ["log1p-dense"]),
        ({"dense_dtype": "int32"}, "split-binary", ["fp16-dense", "log1p-dense"]),
        ({"weighted": True}, "parquet", ["weights"]),
        ({"weighted": True, "shape": MULTI_HOT}, "torchrec-npy", ["weights"]),
    ],
)
def test_a_loss_is_refused_unless_allowed_by_name(
    prepared: Any, tmp_path: Path, options: Any, name: str, losses: list[Any]
) -> None:
    source = prepared(**options)
    for some in (losses[1:], ["negative-counts"]):
        with pytest.raises(DataError, match=f"--allow {losses[0]}"):
            convert(source, tmp_path / "out", to=name, allow=frozenset(some))
        assert not (tmp_path / "out").exists()
    done = convert(source, tmp_path / "out", to=name, allow=frozenset(losses))
    assert list(done.losses) == losses
    assert done.splits["train"].source_sum != done.splits["train"].target_sum


def test_counts_become_what_training_reads_of_them(prepared: Any, tmp_path: Path) -> None:
    source = prepared(dense_dtype="int32", least=-(2**31), rows=300)
    convert(source, tmp_path / "out", to="raw", write=WriteOptions(label_dtype="int32"))
    convert(source, tmp_path / "norm", to="norm", allow=frozenset({"log1p-dense"}))
    read = load_dataset(source).split("train").read(slice(None))
    np.testing.assert_array_equal(read_rows(tmp_path / "norm").dense, read.dense)


def test_negative_counts_are_clipped_only_where_allowed(prepared: Any, tmp_path: Path) -> None:
    source = prepared(dense_dtype="int32", least=-(2**31), rows=100)
    with pytest.raises(DataError, match=r"split 'train': row \d+: dense column 'd\d' is -\d+.*--allow negative-counts"):
        convert(source, tmp_path / "out", to="facebook-npz")
    done = convert(source, tmp_path / "out", to="facebook-npz", allow=frozenset({"negative-counts"}))
    assert done.losses == ("negative-counts",)
    np.testing.assert_array_equal(read_rows(tmp_path / "out").dense, np.maximum(read_rows(source).dense, 0))
    clean = prepared("clean", dense_dtype="int32", least=0)
    assert convert(clean, tmp_path / "clean-out", to="facebook-npz").losses == ()


def test_values_beyond_16_bits_are_refused_even_if_rounding_is_allowed(prepared: Any, tmp_path: Path) -> None:
    source = prepared(rows=4)
    words = np.fromfile(source / "train.bin", "<i4").reshape(4, -1)
    words[2, 2] = np.float32(65520).view(np.int32)
    words.tofile(source / "train.bin")
    with pytest.raises(
        DataError, match=r"split 'train': row 2: dense column 'd1' is 65520.0, but 16 bits end at 65504"
    ):
        convert(source, tmp_path / "out", to="split-binary", allow=frozenset({"fp16-dense"}))


def test_raw_variants_of_hugectr(prepared: Any, tmp_path: Path) -> None:
    source = prepared(shape=MULTI_HOT)
    convert(source, tmp_path / "out", to="raw", write=WriteOptions(label_dtype="float32", key_dtype="int64"))
    record = np.dtype([("label", "<f4"), ("dense", "<f4", 3), ("keys", "<i8", 9)])
    rows, wanted = np.fromfile(tmp_path / "out" / "train.bin", record), read_rows(source)
    assert rows["label"].tolist() == wanted.labels
    np.testing.assert_array_equal(rows["dense"], wanted.dense)
    assert rows["keys"].tolist() == [[key for bag in bags for key in bag] for bags in wanted.bags]
    assert_same(read_rows(tmp_path / "out"), wanted)
    with pytest.raises(DataError, match=r"float_label_dense cannot hold int32 dense columns"):
        convert(
            prepared("counts", dense_dtype="int32"),
            tmp_path / "other",
            to="raw",
            write=WriteOptions(label_dtype="float32"),
        )


def test_rows_that_are_made_as_they_are_read_can_be_written(tmp_path: Path, seed: int) -> None:
    made = describe_synthetic("criteo-terabyte", rows=300, seed=seed, exponents=(1.1,), scale=1000)
    (tmp_path / "recipe").mkdir()
    write_manifest(tmp_path / "recipe", made)
    convert(tmp_path / "recipe", tmp_path / "out", to="raw")
    for split in made.splits:
        batches = [load_dataset(tmp_path / folder).split(split).read(slice(None)) for folder in ("recipe", "out")]
        np.testing.assert_array_equal(batches[0].dense, batches[1].dense)
        np.testing.assert_array_equal(batches[0].keys.keys, batches[1].keys.keys)


def test_what_cannot_be_converted_leaves_nothing_behind(prepared: Any, tmp_path: Path) -> None:
    source = prepared()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    for target, name, message in (
        ("full", "raw", "is there already"),
        ("source", "raw", "holds the source"),
        ("source/inner", "raw", "lies in it"),
        (".", "raw", "holds the source"),
        ("out", "facebook-npz", "cannot hold float dense columns"),
        ("out", "criteo-tsv", "cannot hold float dense columns"),
    ):
        with pytest.raises(DataError, match=message):
            convert(source, tmp_path / target, to=name)
    with pytest.raises(ConfigError, match="format 'feather': unknown"):
        convert(source, tmp_path / "out", to="feather")
    with pytest.raises(ConfigError, match="--allow: everything unknown"):
        convert(source, tmp_path / "out", to="raw", allow=frozenset({"everything"}))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no such file or folder"):
        convert(tmp_path / "nowhere", tmp_path / "out", to="raw")
    with pytest.raises(DataError, match=r"of no format that tells itself.*data adopt"):
        convert(tmp_path / "source" / "train.bin", tmp_path / "out", to="raw")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "source"]
    convert(source, tmp_path / "full", to="raw", overwrite=True)
    assert not (tmp_path / "full" / "mine").exists()
    assert_same(read_rows(tmp_path / "full"), read_rows(source))


def test_what_reads_back_otherwise_is_not_kept(prepared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a disk that loses a write."""
    from pipeline.formats import torchrec_npy

    write = torchrec_npy.NpyWriter.write

    def forgetful(self: Any, values: Any) -> None:
        write(self, np.where(np.arange(len(values))[:, None] == 7, 0, values))

    monkeypatch.setattr(torchrec_npy.NpyWriter, "write", forgetful)
    with pytest.raises(DataError, match=r"split '\w+' was written with \d+ rows of sum \w{16}, but reads back as"):
        convert(prepared(), tmp_path / "out", to="torchrec-npy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("file", ["criteo_kaggle_train_7200.tsv", "criteo_terabyte_1000.tsv"])
def test_real_rows_of_text_come_back_to_the_byte(tmp_path: Path, file: str) -> None:
    if not (REAL_ROWS / file).is_file():
        pytest.skip(f"no {file} in {REAL_ROWS}; set CROSSLANE_CRITEO_DIR to the folder of Criteo's rows")
    convert(REAL_ROWS / file, tmp_path / "raw", to="raw")
    convert(tmp_path / "raw", tmp_path / "text", to="criteo-tsv")
    assert (tmp_path / "text" / "train.tsv").read_bytes() == (REAL_ROWS / file).read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_real_rows_go_through_every_format(tmp_path: Path, name: str) -> None:
    file = REAL_ROWS / "criteo_kaggle_test_800.tsv"
    if not file.is_file():
        pytest.skip(f"no {file.name} in {REAL_ROWS}; set CROSSLANE_CRITEO_DIR to the folder of Criteo's rows")
    if name in COUNTS:  # the values of 32 bits as keys would make tables that neither holds, so low bits stand in
        lines = [line.split("\t") for line in file.read_text().splitlines()]
        text = [
            "\t".join([*(one or "0" for one in line[:14]), *(f"{int(key or '0', 16) % 1009:08x}" for key in line[14:])])
            for line in lines
        ]
        (tmp_path / "t.tsv").write_text("\n".join(text) + "\n")
        convert(tmp_path / "t.tsv", tmp_path / "source", to="raw")
        manifest = (tmp_path / "source" / "dataset.json").read_text()
        (tmp_path / "source" / "dataset.json").write_text(re.sub(r'"rows": 4294967296', '"rows": 1009', manifest))
    else:
        prepare_criteo(CriteoInputs(train=[file]), tmp_path / "source")
    source = tmp_path / "source"
    done = convert(source, tmp_path / "out", to=name, allow=frozenset({"fp16-dense", "negative-counts"}))
    convert(tmp_path / "out", tmp_path / "back", to="raw")
    wanted = read_rows(source)
    assert len(wanted.labels) == done.splits["train"].rows == 800
    if name == "split-binary":
        wanted.dense = wanted.dense.astype(np.float16).astype(np.float32)
    if name == "facebook-npz":
        wanted.dense = np.maximum(wanted.dense, 0)
    assert_same(read_rows(tmp_path / "back"), wanted)
    assert load_dataset(tmp_path / "back").tables == load_dataset(source).tables
