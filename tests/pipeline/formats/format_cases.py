"""What rows hold, whatever format they lie in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlrm.errors import DataError
from pipeline.convert import detect, format_named
from pipeline.formats.block import Block, Schema
from pipeline.formats.interchange import ReadOptions, WriteOptions
from pipeline.manifest import TableInfo

ONE_HOT = ((1000, 1), (100, 1), (3, 1), (70_000, 1))
MULTI_HOT = ((1000, 3), (50, 1), (70_000, 5))


@dataclass
class Rows:
    """What rows hold, as plain Python values; a bag is its keys, each with its weight where there are weights."""

    labels: list[int]
    dense: np.ndarray[Any, Any]
    bags: list[list[list[Any]]]


def collect(blocks: Iterable[Block], schema: Schema) -> Rows:
    """The rows of blocks, one after the other."""
    ends = list(pairwise(schema.columns.tolist()))
    labels: list[int] = []
    dense, bags = [], []
    for block in blocks:
        labels += block.labels.tolist()
        dense.append(block.dense)
        weights = block.weights.tolist() if schema.weighted else [[None] * block.keys.shape[1]] * block.rows
        for keys, factors in zip(block.keys.tolist(), weights, strict=True):
            pairs = list(zip(keys, factors, strict=True)) if schema.weighted else keys
            bags.append([[pairs[h] for h in range(start, stop) if keys[h] >= 0] for start, stop in ends])
    return Rows(labels, np.concatenate(dense), bags)


def read_rows(path: Path, split: str = "train", **options: Any) -> Rows:
    """All rows of a split of a file or folder whose format is found out."""
    source = detect(path).read(path, ReadOptions(**options))
    return collect(source.blocks(split), source.schema)


def assert_same(found: Rows, wanted: Rows) -> None:
    assert found.labels == wanted.labels
    assert found.bags == wanted.bags
    np.testing.assert_array_equal(found.dense, wanted.dense)
    assert found.dense.dtype == wanted.dense.dtype


def read_all(name: str, path: Path, **options: Any) -> None:
    """Read every row."""
    source = format_named(name).read(path, ReadOptions(**options))
    for split in source.splits:
        for _ in source.blocks(split):
            pass


def refused(name: str, path: Path, message: str, **options: Any) -> None:
    with pytest.raises(DataError, match=message):
        read_all(name, path, **options)


def poke(path: Path, byte: int, content: bytes) -> None:
    """Overwrite bytes of a file."""
    old = path.read_bytes()
    path.write_bytes(old[:byte] + content + old[byte + len(content) :])


def swap(path: Path, dtype: str) -> None:
    """Turn the bytes of every value round."""
    np.fromfile(path, dtype).byteswap().tofile(path)


def bytes_of(text: str) -> bytes:
    """Bytes of lines of hexadecimal digits; what follows ``#`` is a comment."""
    return bytes.fromhex("".join(line.split("#")[0] for line in text.splitlines()))


def write_block(name: str, folder: Path, schema: Schema, block: Any, **options: Any) -> None:
    """Write one block as the split ``train``."""
    folder.mkdir()
    sink = format_named(name).write(folder, schema, WriteOptions(**options))
    sink.write("train", block)
    sink.finish()
    sink.close()


def schema_of(dense: Any, num_dense: int, *shape: tuple[int, int], **fields: Any) -> Schema:
    tables = tuple(TableInfo(name=f"C{t + 1}", rows=rows, hotness=count) for t, (rows, count) in enumerate(shape))
    names = tuple(f"I{n + 1}" for n in range(num_dense))
    return Schema(name="fixture", dense_names=names, dense=dense, tables=tables, **fields)
