"""docs/formats.md says what the code does: its example manifest loads, its example row is what is written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter

from pipeline.dataset import DatasetWriter, TableInfo
from pipeline.manifest import Manifest

DOCUMENT = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")


def test_example_manifest_is_valid() -> None:
    values = json.loads(re.findall(r"```json\n(.*?)```", DOCUMENT, re.DOTALL)[0])
    manifest = TypeAdapter(Manifest).validate_python(values)
    assert TypeAdapter(Manifest).dump_python(manifest, mode="json") == values


def test_example_row_is_what_the_writer_writes(tmp_path: Path) -> None:
    block = re.findall(r"```\n(01 00.*?)```", DOCUMENT, re.DOTALL)[0]
    expected = bytes.fromhex("".join(re.match(r"[0-9a-f ]*(?=  |$)", line)[0] for line in block.splitlines()))  # type: ignore[index]
    tables = [TableInfo(name="a", rows=2**33), TableInfo(name="b", rows=9, hotness=2)]
    with DatasetWriter(
        tmp_path, name="x", dense_names=["x", "y"], tables=tables, key_dtype="int64", weighted=True
    ) as writer:
        keys, weights = np.array([[2**32 + 5, 8, -1]]), np.array([[0.5, 0.25, 0.0]], np.float32)
        writer.write("train", np.array([1]), np.array([[1.0, -2.5]]), keys, weights)
        writer.finish()
    assert (tmp_path / "train.bin").read_bytes() == expected


def test_every_field_is_described() -> None:
    schema = TypeAdapter(Manifest).json_schema()
    names = set(schema["properties"]) - {"dense", "tables", "splits"}
    for part in ("DenseInfo", "TableInfo", "FileInfo", "Ceilings"):
        names |= set(schema["$defs"][part]["properties"])
    described = set(re.findall(r"[a-z_0-9]+", " ".join(re.findall(r"`([^`]*)`", DOCUMENT))))
    assert names <= described
