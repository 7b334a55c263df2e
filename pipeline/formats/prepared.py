"""Prepared data sets (``dataset.json`` with Raw rows or jagged files) as a format; HugeCTR's Raw is Raw with options.

Shapes: B rows, N dense columns, T tables, H key columns of all tables, V words of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dlrm.errors import DataError
from pipeline.dataset import Dataset, load_dataset
from pipeline.formats.bags import to_columns
from pipeline.formats.block import Block, DenseKind, Schema, check_block, make_block
from pipeline.formats.interchange import Fit, ReadOptions, WriteOptions, cannot_hold, key_dtype_of
from pipeline.formats.raw import LABEL_ONE, RowFiles
from pipeline.manifest import MANIFEST_NAME
from pipeline.writer import DatasetWriter

_NO_LABEL = -1


class PreparedSource:
    """A prepared data set."""

    def __init__(self, dataset: Dataset, options: ReadOptions) -> None:
        """Take the manifest's word for what the rows hold."""
        manifest = dataset.manifest
        if options.table_rows is not None:
            raise DataError(f"--rows: {dataset.path / MANIFEST_NAME} has the tables' rows; leave the option out")
        self._dataset = dataset
        self.splits = {name: split.rows for name, split in manifest.splits.items()}
        self.schema = Schema(
            name=manifest.name,
            dense_names=manifest.dense.names,
            dense=manifest.dense.dtype,
            tables=tuple(replace(table, hotness=max(1, table.hotness)) for table in manifest.tables),
            weighted=manifest.weighted,
            missing_keys=manifest.missing_keys or manifest.layout == "jagged",
            key_dtype=manifest.key_dtype,
            licence=manifest.licence,
            source=manifest.source,
            notes=manifest.notes,
        )

    def blocks(self, split: str) -> Iterator[Block]:
        """The rows of a split in order, checked."""
        opened = self._dataset.split(split)
        files = opened.files
        size = self.schema.block_rows()
        for start in range(0, self.splits[split], size):
            rows = np.arange(start, min(start + size, self.splits[split]), dtype=np.int64)
            pieces = [words[inside[0] : inside[-1] + 1] for words, inside, _ in files.pieces(rows)]
            words = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
            block = self._block(split, words, rows)
            yield check_block(block, self.schema, _Where(files, start))
            opened.release(start, start + block.rows)

    def _block(self, split: str, words: Any, rows: Any) -> Block:
        manifest = self._dataset.manifest
        num_dense = len(manifest.dense.names)
        labels = words[:, 0].copy()
        if manifest.label_dtype == "float32":
            labels[labels == 1] = _NO_LABEL
            labels[labels == LABEL_ONE["float32"]] = 1
        dense = words[:, 1 : 1 + num_dense]
        if manifest.dense.dtype == "float32":
            dense = dense.view(np.float32)
        if manifest.layout == "jagged":
            bags = self._dataset.split(split).read(rows).keys
            keys, weights = to_columns(bags, self.schema.columns, split)
            return make_block(labels, dense, keys, weights)
        num_keys, first = int(self.schema.columns[-1]), 1 + num_dense
        wide = manifest.key_dtype == "int64"
        end = first + num_keys * (2 if wide else 1)
        keys = words[:, first:end]
        if wide:
            keys = np.ascontiguousarray(keys).view(np.int64)
        return make_block(labels, dense, keys, words[:, end:].view(np.float32) if manifest.weighted else None)


@dataclass(frozen=True, slots=True)
class _Where:
    """File, row and byte of a value of a block."""

    files: RowFiles
    first: int

    def __call__(self, row: int, kind: str, column: int) -> str:
        return self.files.place(self.first + row, kind, column)


class PreparedSink:
    """A prepared data set being written."""

    def __init__(
        self, directory: Path, schema: Schema, options: WriteOptions, layout: Literal["raw", "jagged"]
    ) -> None:
        """Open a writer."""
        self._schema = schema
        self._writer = DatasetWriter(
            directory,
            name=schema.name,
            dense_names=schema.dense_names,
            tables=schema.tables,
            layout=layout,
            key_dtype=schema.key_dtype,
            weighted=schema.weighted,
            dense_dtype="int32" if schema.counts else "float32",
            label_dtype=options.label_dtype,
        )

    def write(self, split: str, block: Block) -> None:
        """Append rows."""
        self._writer.write(
            split, block.labels, block.dense, block.keys, block.weights if self._schema.weighted else None
        )

    def finish(self) -> None:
        """Write the manifest."""
        self._writer.finish(licence=self._schema.licence, source=self._schema.source, notes=self._schema.notes)

    def close(self) -> None:
        """Remove what was written before ``finish``."""
        self._writer.abort()


class Prepared:
    """The format of ``dataset.json`` in one of its layouts."""

    def __init__(self, layout: Literal["raw", "jagged"]) -> None:
        """Choose what is written; either is read."""
        self.name: str = layout
        self._layout: Literal["raw", "jagged"] = layout

    def detect(self, path: Path) -> bool:
        """A folder with a manifest."""
        return (path / MANIFEST_NAME).is_file()

    def read(self, path: Path, options: ReadOptions) -> PreparedSource:
        """Open a folder."""
        return PreparedSource(load_dataset(path), options)

    def fit(self, schema: Schema, options: WriteOptions) -> Fit:
        """Everything has a place."""
        if options.label_dtype == "float32" and schema.counts:
            cannot_hold(
                "HugeCTR's float_label_dense", "int32 dense columns", "leave the label int32, or --allow log1p-dense"
            )
        narrowest = key_dtype_of(max((table.rows for table in schema.tables), default=1))
        if options.key_dtype == "int32" and narrowest == "int64":
            cannot_hold(f"{self.name} with int32 keys", "a table of more than 2147483648 rows", "use int64 keys")
        dense: DenseKind = "int32" if schema.counts else "float32"
        return Fit(replace(schema, dense=dense, key_dtype=options.key_dtype or narrowest, offset_keys=False))

    def write(self, directory: Path, schema: Schema, options: WriteOptions) -> PreparedSink:
        """Start writing."""
        return PreparedSink(directory, schema, options, self._layout)


RAW = Prepared("raw")
JAGGED = Prepared("jagged")
