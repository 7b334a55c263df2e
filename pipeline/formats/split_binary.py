"""Split binary of NVIDIA's DeepLearningExamples (DLRM): a file a column, described by ``feature_spec.yaml``.

Published with its ``FeatureSpec``: ``feature_spec`` gives every column its dtype (and categories their cardinality),
``channel_spec`` lists the columns of the channels ``categorical``, ``numerical`` and ``label``, ``source_spec`` names
the files of the mappings ``train`` and ``test``. A label is one byte (bool), the numerical columns are float16 side by
side in one file, a category is int8, int16 or int32, the first of them whose largest value exceeds its cardinality.

Shapes: B rows, N dense columns, T tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import yaml
from numpy.typing import NDArray

from dlrm.errors import DataError
from pipeline.formats.batch import MappedFile
from pipeline.formats.block import (
    Block,
    DenseKind,
    Schema,
    check_block,
    make_block,
    read_sidecar,
    reversed_hint,
    write_sidecar,
)
from pipeline.formats.feature_spec import CATEGORY_TYPES, CHUNK_TYPE, SPEC, Spec, read_spec
from pipeline.formats.interchange import (
    Fit,
    Loss,
    ReadOptions,
    WriteOptions,
    cannot_hold,
    distinct_names,
    key_dtype_of,
)
from pipeline.manifest import TableInfo


def category_type(cardinality: int) -> str:
    """The type that a category of so many values is stored in.

    Raises:
        DataError: none is wide enough.
    """
    fitting = [name for name in CATEGORY_TYPES if cardinality < np.iinfo(name).max]
    if not fitting:
        cannot_hold("split-binary", f"a table of {cardinality} rows", "at most 2147483646 fit; choose another format")
    return fitting[0]


class SplitBinarySource:
    """The columns of each mapping."""

    def __init__(self, spec: Spec, options: ReadOptions) -> None:
        """Check the size of every file."""
        self._spec = spec
        self._dense_type = np.dtype(spec.dtypes[spec.dense[0]] if spec.dense else "float16")
        self.splits = {split: self._rows(split) for split in spec.files}
        known = read_sidecar(spec.path.parent, len(spec.dense), len(spec.tables))
        rows = options.table_rows or tuple(spec.cardinalities[name] for name in spec.tables)
        if len(rows) != len(spec.tables):
            raise DataError(f"--rows: {len(rows)} numbers for {len(spec.tables)} tables; give one each")
        base = known or Schema(
            name=spec.path.resolve().parent.name or "split-binary",
            dense_names=(),
            dense="float16",
            tables=(),
            source="split binary of NVIDIA's DeepLearningExamples",
        )
        ordered = [table.frequency_ordered for table in base.tables] or [False] * len(rows)
        dense: DenseKind = "float16" if self._dense_type == np.float16 else "float32"
        self.schema = replace(
            base,
            dense_names=tuple(spec.dense),
            dense=dense,
            tables=tuple(
                TableInfo(name=name, rows=count, frequency_ordered=by_frequency)
                for name, count, by_frequency in zip(spec.tables, rows, ordered, strict=True)
            ),
            key_dtype=key_dtype_of(max(rows, default=1)),
        )

    def _rows(self, split: str) -> int:
        files, label = self._spec.files[split], self._spec.label
        sizes: dict[str, int] = {}
        for name, path in files.items():
            try:
                sizes[name] = path.stat().st_size
            except OSError as error:
                raise DataError(f"{path}: {error.strerror or error}; {self._spec.path} names it") from None
        rows = sizes[label]
        others = {sizes[name] / self._width(name) for name in files if name != label}
        if len(files) > 2 and len(others) == 1 and rows not in others:
            kind = "truncated" if rows < min(others) else "oversized"
            raise DataError(
                f"{files[label]}: {kind}, {rows} labels of a byte each, but the other files have {min(others):.10g} "
                f"rows (the difference starts at row and byte {min(rows, *others):.10g}); copy the file again"
            )
        for name, path in files.items():
            size, width = sizes[name], self._width(name)
            if size != rows * width:
                kind = "truncated" if size < rows * width else "oversized"
                raise DataError(
                    f"{path}: {kind}, {size} bytes, but {rows} labels need {rows * width} ({width} bytes a row, row "
                    f"{min(size // width, rows)} at byte {min(size, rows * width)}); copy the file again"
                )
        return rows

    def _width(self, name: str) -> int:
        if self._spec.dense and name == self._spec.dense[0]:
            return self._dense_type.itemsize * len(self._spec.dense)
        return np.dtype(self._spec.dtypes[name]).itemsize

    def blocks(self, split: str) -> Iterator[Block]:
        """The rows of a split in order, checked."""
        spec, rows, size = self._spec, self.splits[split], self.schema.block_rows()
        maps = {name: MappedFile(path, rows * self._width(name)) for name, path in spec.files[split].items()}
        labels: NDArray[Any] = maps[spec.label].view(np.uint8)
        dense: NDArray[Any] = np.empty((rows, 0), self._dense_type)
        if spec.dense:
            dense = maps[spec.dense[0]].view(self._dense_type.newbyteorder("<")).reshape(rows, len(spec.dense))
        columns = [maps[name].view(np.dtype(spec.dtypes[name]).newbyteorder("<")) for name in spec.tables]
        for start in range(0, rows, size):
            part = slice(start, min(rows, start + size))
            keys = np.empty((part.stop - start, len(columns)), np.int64)
            for t, column in enumerate(columns):
                keys[:, t] = column[part]
            block = make_block(labels[part], dense[part].astype(np.float32), keys)

            def where(row: int, kind: str, column: int, first: int = start) -> str:
                return self._where(split, first + row, kind, column)

            try:
                yield check_block(block, self.schema, where)
            except DataError as error:
                raise DataError(f"{error}{self._hint(block)}") from None
            for name, file in maps.items():
                file.release(part.start * self._width(name), part.stop * self._width(name))

    def _hint(self, block: Block) -> str:
        """A clause for two-byte keys that would be in range the other way round; longer ones have theirs already."""
        for t, name in enumerate(self._spec.tables):
            wrong = block.keys[:, t][(block.keys[:, t] < 0) | (block.keys[:, t] >= self.schema.tables[t].rows)]
            if wrong.size and self._spec.dtypes[name] == "int16":
                return reversed_hint(int(wrong[0]), 2, self.schema.tables[t].rows - 1)
        return ""

    def _where(self, split: str, row: int, kind: str, column: int) -> str:
        spec = self._spec
        name = {"label": spec.label, "dense": spec.dense[0] if spec.dense else ""}.get(kind) or spec.tables[column]
        byte = row * self._width(name) + (column * self._dense_type.itemsize if kind == "dense" else 0)
        return f"{spec.files[split][name]}: row {row} (byte {byte})"


class SplitBinarySink:
    """The columns of each split being written."""

    def __init__(self, directory: Path, schema: Schema) -> None:
        """Files are made by the first row of a split."""
        self._directory = directory
        self._schema = schema
        self._types = [category_type(table.rows) for table in schema.tables]
        self._files: dict[str, dict[str, BinaryIO]] = {}

    def write(self, split: str, block: Block) -> None:
        """Append rows."""
        files = self._files.get(split) or self._open(split)
        files["label.bin"].write(block.labels.astype(np.uint8).data)
        if block.dense.shape[1]:
            files["numerical.bin"].write(block.dense.astype("<f2").data.cast("B"))
        for t, dtype in enumerate(self._types):
            column = block.keys[:, t].astype(np.dtype(dtype).newbyteorder("<"))
            files[f"cat_{t}.bin"].write(column.data.cast("B"))

    def _open(self, split: str) -> dict[str, BinaryIO]:
        folder = self._directory / split
        folder.mkdir()
        names = ["label.bin", *(["numerical.bin"] if self._schema.dense_names else [])]
        names += [f"cat_{t}.bin" for t in range(len(self._types))]
        files = self._files[split] = {}
        for name in names:
            files[name] = (folder / name).open("wb")
        return files

    def finish(self) -> None:
        """Write the specification, and what it has no place for."""
        self.close()
        schema = self._schema
        names = distinct_names(schema, "split-binary")
        dense, tables, label = names[: len(schema.dense_names)], names[len(schema.dense_names) : -1], names[-1]
        features: dict[str, dict[str, Any]] = {name: {"dtype": "float16"} for name in dense}
        for name, dtype, table in zip(tables, self._types, schema.tables, strict=True):
            features[name] = {"dtype": dtype, "cardinality": table.rows}
        features[label] = {"dtype": "bool"}
        sources = {}
        for split in self._files:
            chunks = [([label], "label.bin"), *([(dense, "numerical.bin")] if dense else [])]
            chunks += [([name], f"cat_{t}.bin") for t, name in enumerate(tables)]
            sources[split] = [
                {"type": CHUNK_TYPE, "features": part, "files": [f"{split}/{file}"]} for part, file in chunks
            ]
        spec = {
            "feature_spec": features,
            "source_spec": sources,
            "channel_spec": {"categorical": tables, "numerical": dense, "label": [label]},
            "metadata": {},
        }
        (self._directory / SPEC).write_text(yaml.dump(spec, sort_keys=False, allow_unicode=True), encoding="utf-8")
        write_sidecar(self._directory, schema)

    def close(self) -> None:
        """Close the files."""
        for files in self._files.values():
            for file in files.values():
                file.close()


class SplitBinary:
    """The format."""

    name = "split-binary"

    def detect(self, path: Path) -> bool:
        """A folder with ``feature_spec.yaml``, or that file."""
        return (path / SPEC).is_file() or (path.is_file() and path.name == SPEC)

    def read(self, path: Path, options: ReadOptions) -> SplitBinarySource:
        """Open a folder."""
        return SplitBinarySource(read_spec(path if path.is_file() else path / SPEC), options)

    def fit(self, schema: Schema, options: WriteOptions) -> Fit:  # noqa: ARG002 - has no options
        """Dense columns of 16 bits, one key a table."""
        losses: set[Loss] = {"weights"} if schema.weighted else set()
        if schema.dense_names and schema.dense != "float16":
            losses |= {"fp16-dense", "log1p-dense"} if schema.counts else {"fp16-dense"}
        for table in schema.tables:
            if table.hotness > 1:
                cannot_hold(
                    self.name, f"table {table.name!r} of {table.hotness} keys, only one", "choose another format"
                )
            category_type(table.rows)
        distinct_names(schema, self.name)
        dense: DenseKind = "float16"
        kept = replace(schema, dense=dense, weighted=False, missing_keys=False, key_dtype="int32", offset_keys=False)
        return Fit(kept, frozenset(losses))

    def write(self, directory: Path, schema: Schema, options: WriteOptions) -> SplitBinarySink:  # noqa: ARG002
        """Start writing."""
        return SplitBinarySink(directory, schema)


SPLIT_BINARY = SplitBinary()
