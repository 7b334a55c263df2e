"""A whole check: sound sets pass with figures that plain counting gives, every fault is found with its place."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlrm.errors import ConfigError, DataError
from pipeline.check import stream
from pipeline.check.dataset import check_dataset
from pipeline.dataset import load_dataset
from pipeline.manifest import TableInfo
from pipeline.writer import DatasetWriter
from service import cli

SHAPE = ((50, 1), (9, 3), (1000, 1))
ROWS = {"train": 700, "validation": 90, "test": 120}


@pytest.fixture
def written(tmp_path: Path, rng: np.random.Generator) -> Callable[..., Path]:
    """Writes a set of random rows; returns its folder."""

    def write(
        *,
        shape: Sequence[tuple[int, int]] = SHAPE,
        dense_dtype: str = "float32",
        missing: bool = True,
        rows: dict[str, int] = ROWS,
        shift: float = 0.0,
        **options: Any,
    ) -> Path:
        tables = [TableInfo(name=f"T{t}", rows=count, hotness=hotness) for t, (count, hotness) in enumerate(shape)]
        with DatasetWriter(
            tmp_path / "set",
            name="made up",
            dense_names=["d0", "d1"],
            tables=tables,
            dense_dtype=dense_dtype,
            **options,
        ) as writer:
            for split, count in rows.items():
                keys = [rng.integers(-1 if missing else 0, limit, (count, hotness)) for limit, hotness in shape]
                dense = rng.normal(shift * (split == "test"), 1, (count, 2)).astype(np.float32)
                if dense_dtype == "int32":
                    dense = rng.integers(-5, 900, (count, 2))
                joined = np.concatenate(keys, axis=1)
                weights = rng.normal(size=joined.shape).astype(np.float32) if options.get("weighted") else None
                writer.write(split, np.arange(count) % 3 == 0, dense, joined, weights)
            writer.finish()
        return tmp_path / "set"

    return write


def found(values: dict[str, Any]) -> dict[str, tuple[str, int, str]]:
    """Result, faults and sentence of each check."""
    return {one["check"]: (one["status"], one["faults"], one["detail"]) for one in values["checks"]}


def poke(path: Path, byte: int, content: bytes) -> None:
    old = path.read_bytes()
    path.write_bytes(old[:byte] + content + old[byte + len(content) :])


VARIANTS = [
    {},
    {"layout": "jagged", "weighted": True},
    {"weighted": True, "key_dtype": "int64"},
    {"label_dtype": "float32", "missing": False, "shape": ((30, 1), (7, 1))},
]


@pytest.mark.parametrize("options", VARIANTS, ids=["raw", "jagged", "wide", "one-hot"])
def test_a_sound_set_passes_with_the_figures_of_its_rows(
    written: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = written(**options)
    monkeypatch.setattr(stream, "_CHUNK_BYTES", 1 << 12)  # several chunks a file
    values = check_dataset(folder)
    assert {status for status, *_ in found(values).values()} <= {"ok", "warning"}
    assert found(values)["checksums"][0] == "ok"
    dataset = load_dataset(folder)
    batches = {name: dataset.split(name).read(slice(None)) for name in ROWS}
    for name, split in values["splits"].items():
        assert (split["rows"], split["positives"]) == (ROWS[name], batches[name].labels.sum())
    train = batches["train"]
    for n, column in enumerate(values["dense"]):
        every = np.concatenate([batch.dense[:, n] for batch in batches.values()])
        assert (column["minimum"], column["maximum"]) == (every.min(), every.max())
        assert column["mean"] == pytest.approx(train.dense[:, n].mean(dtype=np.float64), abs=1e-9)
        assert column["deviation"] == pytest.approx(train.dense[:, n].std(dtype=np.float64), rel=1e-9)
    for t, table in enumerate(values["tables"]):
        keys = {name: keys_of(batch, t) for name, batch in batches.items()}
        counts = np.bincount(keys["train"], minlength=table["rows"])
        assert table["lookups"] == {name: len(there) for name, there in keys.items()}
        assert table["seen_rows"] == np.count_nonzero(counts)
        assert table["curve"]["count"][0] == counts.max()
        for name in ("validation", "test"):
            assert table["unseen"][name] == pytest.approx(np.mean(counts[keys[name]] == 0))
            assert table["row_0"][name] == pytest.approx(np.mean(keys[name] == 0))


def keys_of(batch: Any, table: int) -> Any:
    """Keys of one table of a batch."""
    rows = batch.num_rows
    if batch.keys.offsets is None:
        return batch.keys.keys[table * rows : (table + 1) * rows]
    return batch.keys.keys[batch.keys.offsets[table * rows] : batch.keys.offsets[(table + 1) * rows]]


def test_counts_are_told_from_missing_ones(written: Any) -> None:
    folder = written(dense_dtype="int32", missing=False)
    stored = np.fromfile(folder / "test.bin", np.int32).reshape(ROWS["test"], -1)[:, 1:3]
    for n, column in enumerate(check_dataset(folder)["dense"]):
        assert column["missing"]["test"] == pytest.approx(np.mean(stored[:, n] < 0))
        assert column["histogram"]["edges"][0] == pytest.approx(0, abs=1e-6)


ROW = 4 * (1 + 2 + 5)


@pytest.mark.parametrize(
    ("byte", "content", "check", "message"),
    [
        (9 * ROW, b"\x02\0\0\0", "labels", rf"test.bin: row 9 (byte {9 * ROW}): label 2 is neither 0 nor 1"),
        (9 * ROW, b"\0\0\0\x01", "labels", "big-endian"),
        (
            9 * ROW + 8,
            struct.pack("<f", np.nan),
            "dense values",
            f"row 9 (byte {9 * ROW + 8}): dense column 'd1' is nan",
        ),
        (
            9 * ROW + 12,
            struct.pack("<i", 50),
            "keys",
            f"row 9 (byte {9 * ROW + 12}): key 50 of table 'T0' lies outside",
        ),
        (9 * ROW + 12, struct.pack(">i", 49), "keys", "big-endian"),
        (9 * ROW + 28, struct.pack("<i", -9), "keys", f"row 9 (byte {9 * ROW + 28}): key -9 of table 'T2'"),
    ],
)
def test_a_wrong_value_is_found_with_file_row_and_byte(
    written: Any, byte: int, content: bytes, check: str, message: str
) -> None:
    folder = written()
    poke(folder / "test.bin", byte, content)
    values = check_dataset(folder)
    status, faults, detail = found(values)[check]
    assert (status, faults, values["status"]) == ("failed", 1, "failed")
    assert message in detail
    assert found(values)["checksums"][:2] == ("failed", 1)
    others = {name: one for name, one in found(values).items() if name not in (check, "checksums")}
    assert {status for status, *_ in others.values()} <= {"ok", "warning"}


def test_all_wrong_values_are_counted(written: Any) -> None:
    folder = written(missing=False)
    words = np.fromfile(folder / "train.bin", np.int32).reshape(ROWS["train"], -1)
    words[5:25, 3] = 77
    words[30:34, 1] = np.float32(np.inf).view(np.int32)
    words.tofile(folder / "train.bin")
    checks = found(check_dataset(folder))
    assert checks["keys"][1] == 20
    assert "row 5 (byte" in checks["keys"][2]
    assert "the first of 20" in checks["keys"][2]
    assert checks["dense values"][1] == 4


def test_a_missing_key_is_a_fault_only_where_the_manifest_has_none(written: Any) -> None:
    folder = written(missing=False, shape=((50, 1), (9, 1)))
    poke(folder / "train.bin", 4 * 3, b"\xff\xff\xff\xff")
    status, _, detail = found(check_dataset(folder))["keys"]
    assert status == "failed"
    assert "row 0 (byte 12): table 'T0' has no key (-1)" in detail
    manifest = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**manifest, "missing_keys": True}))
    values = check_dataset(folder)
    assert found(values)["keys"][0] == "ok"
    assert values["tables"][0]["missing"]["train"] == pytest.approx(1 / ROWS["train"])


def test_jagged_parts_are_checked(written: Any) -> None:
    folder = written(layout="jagged", weighted=True)
    good = {path: path.read_bytes() for path in (folder / "train").iterdir()}
    for file, byte, content, check, message in (
        (
            "001.offsets.bin",
            8 * 7,
            struct.pack("<q", 10**6),
            "offsets",
            "offset 7 (byte 56): offset 1000000 of table 'T1'",
        ),
        ("001.offsets.bin", 0, struct.pack("<q", 1), "offsets", "offset 0 (byte 0): offset 1 of"),
        ("001.offsets.bin", 8 * ROWS["train"], struct.pack("<q", 0), "offsets", f"offset {ROWS['train']} (byte"),
        ("001.keys.bin", 4 * 5, struct.pack("<i", 9), "keys", "key 5 (byte 20): key 9 of table 'T1' lies outside"),
        ("001.keys.bin", 4 * 5, struct.pack("<i", -1), "keys", "key 5 (byte 20): table 'T1' has no key (-1)"),
        (
            "002.weights.bin",
            4 * 5,
            struct.pack("<f", np.inf),
            "weights",
            "weight 5 (byte 20): a weight of table 'T2' is",
        ),
    ):
        path = folder / "train" / file
        poke(path, byte, content)
        status, _, detail = found(check_dataset(folder))[check]
        assert status == "failed", file
        assert message in detail
        path.write_bytes(good[path])


def test_weights_of_keys_that_are_not_there_do_not_matter(written: Any) -> None:
    folder = written(weighted=True, shape=((9, 2),))
    words = np.fromfile(folder / "train.bin", np.int32).reshape(ROWS["train"], -1)
    there = np.argwhere(words[:, 3:5] >= 0)[0]
    for row, column, status in ((*there, "failed"), (*np.argwhere(words[:, 3:5] < 0)[0], "ok")):
        changed = words.copy()
        changed[row, 5 + column] = np.float32(np.nan).view(np.int32)
        changed.tofile(folder / "train.bin")
        assert found(check_dataset(folder))["weights"][0] == status


def test_files_of_another_size_are_named_and_the_others_are_still_read(written: Any) -> None:
    folder = written()
    content = (folder / "test.bin").read_bytes()
    for cut, kind in ((content[:-1], "truncated"), (content + b"\0", "oversized")):
        (folder / "test.bin").write_bytes(cut)
        values = check_dataset(folder)
        status, faults, detail = found(values)["sizes"]
        assert (status, faults) == ("failed", 1)
        assert f"test.bin: {kind}, {len(cut)} bytes where the manifest needs {len(content)}" in detail
        assert found(values)["checksums"][2] == "2 files have the sums of the manifest; the others were not read"
        assert values["splits"]["train"]["rows"] == ROWS["train"]
        assert values["splits"]["test"]["rows"] == 0
    (folder / "test.bin").unlink()
    assert "No such file" in found(check_dataset(folder))["sizes"][2]


def test_drift_and_one_class_are_warned_of(written: Any) -> None:
    folder = written(rows={"train": 4000, "test": 4000}, shift=2.0, missing=False)
    values = check_dataset(folder)
    status, _, detail = found(values)["drift"]
    assert (status, values["status"]) == ("warning", "warning")
    assert "dense column 'd" in detail
    assert min(column["drift"]["test"] for column in values["dense"]) > 1
    assert max(table["drift"]["test"] for table in values["tables"][:2]) < 0.1
    assert found(check_dataset(folder, drift_limit=99))["drift"][0] == "ok"
    labels = np.fromfile(folder / "test.bin", np.int32).reshape(4000, -1)
    labels[:, 0] = 0
    labels.tofile(folder / "test.bin")
    assert found(check_dataset(folder))["classes"][:2] == ("warning", 1)


def test_a_wrong_claim_of_order_is_warned_of(written: Any) -> None:
    folder = written(shape=((50, 1), (9, 1)), missing=False)
    manifest = json.loads((folder / "dataset.json").read_text())
    manifest["tables"][1]["frequency_ordered"] = True
    (folder / "dataset.json").write_text(json.dumps(manifest))
    words = np.fromfile(folder / "train.bin", np.int32).reshape(ROWS["train"], -1)
    words[:, 4] = np.where(np.arange(ROWS["train"]) % 50 == 0, 3, 8)
    words.tofile(folder / "train.bin")
    status, _, detail = found(check_dataset(folder))["frequency order"]
    assert status == "warning"
    assert "table 'T1'" in detail
    assert "row 8 is looked up 686 times" in detail


def test_files_without_sums_are_warned_of(written: Any) -> None:
    folder = written()
    manifest = json.loads((folder / "dataset.json").read_text())
    manifest["splits"]["test"]["files"][0]["checksum"] = None
    (folder / "dataset.json").write_text(json.dumps(manifest))
    assert found(check_dataset(folder))["checksums"][:2] == ("warning", 1)
    assert "not compared" in found(check_dataset(folder, checksums=False))["checksums"][2]


def test_a_file_that_is_cut_short_meanwhile_is_named(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written()
    monkeypatch.setattr(stream, "_CHUNK_BYTES", 1 << 12)

    def cut(phase: str, done: int, total: int) -> None:
        (folder / "train.bin").write_bytes(b"")

    with pytest.raises(DataError, match=r"train\.bin: byte \d+: cannot be read \(became shorter"):
        check_dataset(folder, progress=cut)


def test_reading_past_the_page_cache_finds_the_same(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written()
    usual = check_dataset(folder)
    monkeypatch.setattr("pipeline.check.dataset.prefers_direct", lambda _: True)
    monkeypatch.setattr(stream, "_CHUNK_BYTES", 1 << 12)
    direct = check_dataset(folder)
    times = {"created", "seconds", "bytes_per_s"}
    assert {k: v for k, v in usual.items() if k not in times} == {k: v for k, v in direct.items() if k not in times}


def test_what_is_no_set_or_has_no_files_is_refused(tmp_path: Path, written: Any) -> None:
    with pytest.raises(DataError, match=r"no readable dataset\.json"):
        check_dataset(tmp_path)
    with pytest.raises(ConfigError, match="--memory-limit: 1 MiB, but a check needs at least"):
        check_dataset(written(), memory_limit=1 << 20)


def test_the_command_prints_writes_and_ends_with_codes_of_its_own(
    written: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    folder = written(missing=False)
    assert cli.run(["data", "check", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("checksums", "GB/s", "T2", "validation", "exponent"))
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith("data_check")) == [
        "data_check.html",
        "data_check.json",
    ]
    poke(folder / "train.bin", 0, b"\x07")
    assert cli.run(["data", "check", str(folder), "--report", str(tmp_path / "out"), "--json"]) == 9
    out, err = capsys.readouterr()
    values = json.loads(out)
    assert values["status"] == "failed"
    assert Path(values["report"]) == (tmp_path / "out" / "data_check.html").resolve()
    assert err.count("error: ") == 1
    assert "check of checksums, labels failed" in err.replace("\n", " ")
    (folder / "dataset.json").write_text("{}")
    assert cli.run(["data", "check", str(folder), "--no-report"]) == 9
    assert "check of manifest failed" in capsys.readouterr().err
    assert cli.run(["data", "check", str(tmp_path / "nowhere")]) == 3
    assert cli.run(["data", "check", str(folder), "--no-report", "--report", "x"]) == 2


def test_strict_makes_warnings_faults(written: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = written()
    words = ["data", "check", str(folder), "--no-report", "--no-checksums"]
    assert cli.run(words) == 0
    assert cli.run([*words, "--strict"]) == 9
    assert "check of checksums failed; not compared" in capsys.readouterr().err
