"""Sums of files: both algorithms, older manifests, and machines without the package of the newer one."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from dlrm.errors import ConfigError, DataError
from pipeline.checksums import Checksum, file_checksum
from pipeline.dataset import load_dataset
from pipeline.manifest import TableInfo
from pipeline.statistics import train_digest
from pipeline.writer import DatasetWriter


def written(folder: Path, rng: np.random.Generator, rows: int = 200) -> Path:
    with DatasetWriter(folder, name="x", dense_names=["d"], tables=[TableInfo(name="t", rows=9)]) as writer:
        for split in ("train", "test"):
            writer.write(split, np.zeros(rows), rng.normal(size=(rows, 1)), rng.integers(0, 9, (rows, 1)))
        return writer.finish()


def older(folder: Path) -> dict[str, Any]:
    """The set's manifest as a release wrote it that knew SHA-256 alone."""
    values: dict[str, Any] = json.loads((folder / "dataset.json").read_text())
    values["version"] = 1
    for split in values["splits"].values():
        for file in split["files"]:
            del file["checksum"]
            file["sha256"] = hashlib.sha256((folder / file["path"]).read_bytes()).hexdigest()
    (folder / "dataset.json").write_text(json.dumps(values))
    return values


@pytest.mark.parametrize("algorithm", ["xxh128", "sha256"])
def test_sums_are_those_of_the_usual_programs(tmp_path: Path, rng: np.random.Generator, algorithm: str) -> None:
    data = rng.bytes(int(rng.integers(0, 3 << 20)))
    (tmp_path / "f").write_bytes(data)
    digits = {"xxh128": xxhash.xxh128_hexdigest, "sha256": lambda all_: hashlib.sha256(all_).hexdigest()}[algorithm]
    checksum = Checksum(algorithm)
    cut = int(rng.integers(0, len(data) + 1))
    checksum.update(data[:cut])
    checksum.update(memoryview(data)[cut:])
    assert checksum.text() == file_checksum(tmp_path / "f", algorithm) == f"{algorithm}:{digits(data)}"


def test_older_manifests_are_read_and_verified(tmp_path: Path, rng: np.random.Generator) -> None:
    values = older(written(tmp_path, rng))
    dataset = load_dataset(tmp_path)
    files = {name: split["files"][0]["sha256"] for name, split in values["splits"].items()}
    assert {name: split.files[0].checksum for name, split in dataset.manifest.splits.items()} == {
        name: f"sha256:{digest}" for name, digest in files.items()
    }
    assert dataset.verify() == ()
    # What older statistics were stamped with.
    assert train_digest(dataset.manifest) == hashlib.sha256(files["train"].encode()).hexdigest()
    file = tmp_path / "train.bin"
    content = bytearray(file.read_bytes())
    content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
    file.write_bytes(content)
    with pytest.raises(DataError, match=rf"train\.bin: SHA-256 [0-9a-f]{{64}}, but the manifest says {files['train']}"):
        dataset.verify()


@pytest.mark.parametrize(
    "splits",
    [[], {"train": []}, {"train": {"rows": 1}}, {"train": {"rows": 1, "files": [3]}}, {"train": {"files": {"a": 1}}}],
)
def test_older_manifests_of_wrong_types_are_refused(tmp_path: Path, rng: np.random.Generator, splits: Any) -> None:
    values = {**older(written(tmp_path, rng)), "splits": splits}
    (tmp_path / "dataset.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match=r"dataset\.json: splits"):
        load_dataset(tmp_path)


def test_an_older_manifests_sum_of_another_form_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    values = older(written(tmp_path, rng))
    values["splits"]["train"]["files"][0]["sha256"] = "0" * 63
    (tmp_path / "dataset.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match="checksum"):
        load_dataset(tmp_path)


def test_without_the_package_sums_are_sha256(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = written(tmp_path / "newer", rng)
    monkeypatch.setitem(sys.modules, "xxhash", None)
    dataset = load_dataset(written(tmp_path / "bare", rng))
    path = dataset.path / "train.bin"
    assert (
        dataset.manifest.splits["train"].files[0].checksum == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    )
    assert dataset.verify() == ()
    with pytest.raises(ConfigError, match="need the package xxhash"):
        load_dataset(newer).verify()
