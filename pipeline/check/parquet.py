"""Rows of Parquet files as words in memory, whatever their values are, for a check to count.

Shapes: B rows, N dense columns, H key columns of all tables, V = 1 + N + 2 H 32-bit words of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dlrm.errors import DataError
from pipeline.formats.parquet_block import block_of, of_manifest
from pipeline.formats.parquet_file import read_frames, read_shape
from pipeline.manifest import Manifest


def parquet_words(path: Path, manifest: Manifest) -> Iterator[NDArray[np.int32]]:
    """Rows [B, V] of a file in order: int32 label (-1: neither 0 nor 1), float32 dense columns, int64 keys.

    Args:
        path: the file.
        manifest: of the data set.

    Raises:
        DataError: a column is missing, a page cannot be read, a value is null, or a bag has more keys than its table's
            hotness.
    """
    columns, schema = of_manifest(manifest)
    types = read_shape(path)[0]
    if missing := [name for name in columns.all if name not in types]:
        raise DataError(f"{path}: no column {missing[0]!r}; restore the file or adopt the files again")
    first = 0
    for frame in read_frames(path, columns.all, schema.block_rows()):
        block = block_of(frame, columns, schema, path, first, rounds=True)
        first += block.rows
        yield np.concatenate([block.labels[:, None], block.dense.view(np.int32), block.keys.view(np.int32)], axis=1)
