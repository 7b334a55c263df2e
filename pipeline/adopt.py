"""Adopts Raw files that a user has already: writes a manifest over them and copies nothing.

Shapes: B rows, N dense columns, T tables, H key columns of all tables.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from dlrm.errors import DataError
from pipeline.checksums import file_checksum
from pipeline.dataset import Dataset
from pipeline.etl.text_blocks import check_distinct, check_files
from pipeline.formats.raw import LABEL_ONE, label_fault
from pipeline.manifest import (
    ADOPTED,
    MANIFEST_NAME,
    DenseDtype,
    DenseInfo,
    FileInfo,
    KeyDtype,
    LabelDtype,
    Manifest,
    SplitInfo,
    TableInfo,
    row_words,
    write_manifest,
)

AdoptLayout = Literal["hugectr-raw", "dlrm-bin"]
"""Of ``adopt``; ``adopt_parquet`` has Parquet files."""

_PROBED_ROWS = 1024  # read at each end of a split, so that a wrong layout shows at once
_LARGEST_COUNT = 1 << 26  # float32 values of usual size have larger bit patterns than any usual count
_SMALLEST_VALUE = 1e-30  # counts, read as float32, are smaller


def adopt(
    files: Mapping[str, Sequence[str | Path]],
    *,
    layout: AdoptLayout,
    rows_per_table: Sequence[int],
    out: str | Path,
    num_dense: int = 13,
    dense_dtype: DenseDtype | None = None,
    label_dtype: LabelDtype = "int32",
    hotness: Sequence[int] | None = None,
    key_dtype: KeyDtype = "int32",
    missing_keys: bool = False,
    name: str | None = None,
    checksums: bool = False,
    relative: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write ``dataset.json`` over existing files of headerless little-endian rows.

    Both layouts are rows of a label, N dense columns and the keys of each table; keys need not be in the order
    of their frequency. ``dlrm-bin`` (``*_train.bin`` of facebookresearch/dlrm) is always int32 with one key a
    table. ``hugectr-raw`` (HugeCTR's Raw) has int32 or float32 dense columns, any fixed hotness, 4-byte or 8-byte
    keys, and int32 labels, or float32 ones (HugeCTR's ``float_label_dense``). Integer dense columns are read as
    log(1 + max(x, 0)), which is what both programs do; float32 ones as they are.

    Args:
        files: paths of each split, in order; a split's rows are those of its files, one after the other.
        layout: ``hugectr-raw`` or ``dlrm-bin``.
        rows_per_table: rows of the T tables, in column order.
        out: folder that gets the manifest; made where missing.
        num_dense: N.
        dense_dtype: ``None``: int32.
        label_dtype: type of the label.
        hotness: key columns of each table; ``None``: 1 each.
        key_dtype: type of the keys.
        missing_keys: whether -1 (no key) may stand in a table of hotness 1.
        name: of the set; ``None``: the folder's name.
        checksums: read the files whole and note their sums.
        relative: write paths relative to ``out`` (files and manifest move together), not absolute.
        overwrite: replace a manifest that is there.

    Returns:
        The folder.

    Raises:
        DataError: a file is missing, empty or named twice, its size is no multiple of a row's, or its first or last
            rows do not hold what the arguments say.
    """
    directory = Path(out)
    dense_dtype = dense_dtype or "int32"
    hotness = hotness or [1] * len(rows_per_table)
    _check_arguments(layout, rows_per_table, num_dense, hotness, {key_dtype, dense_dtype, label_dtype})
    paths_of = {split: [Path(path) for path in paths] for split, paths in files.items() if paths}
    if not paths_of:
        raise DataError("adopt: no files; name at least one")
    for split, paths in paths_of.items():
        check_files(paths, split)
    check_distinct(paths_of)
    shape = Manifest(
        name=name or directory.resolve().name,
        layout="raw",
        label_dtype=label_dtype,
        dense=DenseInfo(
            names=tuple(f"I{n + 1}" for n in range(num_dense)),
            dtype=dense_dtype,
            transform="log1p_at_read" if dense_dtype == "int32" else "as_is",
        ),
        key_dtype=key_dtype,
        missing_keys=missing_keys,
        tables=tuple(
            TableInfo(name=f"C{t + 1}", rows=rows, hotness=count)
            for t, (rows, count) in enumerate(zip(rows_per_table, hotness, strict=True))
        ),
        splits={},
        source=f"{ADOPTED} {layout} files",
        notes=(_dense_note(dense_dtype),) if num_dense else (),
    )
    row_bytes = 4 * row_words(shape)
    splits = {}
    for split, paths in paths_of.items():
        infos = tuple(_file_info(path, row_bytes, checksums) for path in paths)
        splits[split] = SplitInfo(rows=sum(info.rows for info in infos), files=infos)
    manifest = replace(shape, splits=splits)
    for info in (file for split in splits.values() for file in split.files):
        _check_types(Path(info.path), manifest)
    return publish(directory, manifest, relative=relative, overwrite=overwrite)


def publish(directory: Path, manifest: Manifest, *, relative: bool, overwrite: bool) -> Path:
    """Write a manifest over files that are there, after a look into both ends of each split.

    Raises:
        DataError: rows do not hold what the manifest says, or the folder holds a data set already.
    """
    _probe(Dataset(directory, manifest))
    if relative:
        manifest = _relative_to(directory.resolve(), manifest)
    if (directory / MANIFEST_NAME).exists() and not overwrite:
        raise DataError(f"{directory}: holds a data set already; choose another folder, or replace it with --overwrite")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_manifest(directory, manifest)
    except OSError as error:
        raise DataError(f"{directory}: {error.strerror or error}; choose a folder that can be written") from None
    return directory


def _check_arguments(
    layout: AdoptLayout,
    rows_per_table: Sequence[int],
    num_dense: int,
    hotness: Sequence[int],
    dtypes: set[str],
) -> None:
    if layout not in ("hugectr-raw", "dlrm-bin"):
        raise DataError(f"adopt: layout {layout!r}; known are hugectr-raw and dlrm-bin")
    if num_dense < 0:
        raise DataError(f"adopt: {num_dense} dense columns; needs at least 0")
    if len(hotness) != len(rows_per_table):
        raise DataError(f"adopt: {len(hotness)} values of hotness for {len(rows_per_table)} tables; give one each")
    for table, rows in enumerate(rows_per_table):
        if rows < 0:
            raise DataError(f"adopt: {rows} rows of table {table + 1}; needs at least 1")
    if any(count < 1 for count in hotness):
        raise DataError(f"adopt: hotness {list(hotness)}; every table has at least one key column")
    if layout == "dlrm-bin" and (dtypes != {"int32"} or set(hotness) - {1}):
        raise DataError(
            "adopt: dlrm-bin holds int32 dense columns, labels and one int32 key a table; use layout hugectr-raw for "
            "others"
        )


def _file_info(path: Path, row_bytes: int, checksums: bool) -> FileInfo:
    size = path.stat().st_size
    if size % row_bytes:
        raise DataError(
            f"{path}: {size} bytes are no whole number of rows of {row_bytes} bytes ({size % row_bytes} are left "
            "over); check the number of tables, dense columns and hotness, or copy the file again"
        )
    return FileInfo(
        path=str(path.resolve()),
        rows=size // row_bytes,
        bytes=size,
        checksum=file_checksum(path) if checksums else None,
    )


def _relative_to(directory: Path, manifest: Manifest) -> Manifest:
    splits = {
        name: replace(
            split, files=tuple(replace(file, path=os.path.relpath(file.path, directory)) for file in split.files)
        )
        for name, split in manifest.splits.items()
    }
    return replace(manifest, splits=splits)


def _probe(dataset: Dataset) -> None:
    """Read both ends of each split, so that a wrong number of tables, rows or columns is refused here."""
    for name, info in dataset.splits.items():
        split = dataset.split(name)
        for rows in (slice(0, _PROBED_ROWS), slice(max(0, info.rows - _PROBED_ROWS), info.rows)):
            try:
                split.read(rows)
            except DataError as error:
                raise DataError(
                    f"{error} (or the rows are laid out otherwise: check the tables, their rows, hotness and type of "
                    "key, and the dense columns)"
                ) from None


def _check_types(path: Path, manifest: Manifest) -> None:
    """Refuse labels of another type, and int32 columns that look like float32 or the other way round."""
    width, dtype = row_words(manifest), manifest.dense.dtype
    rows = np.fromfile(path, "<i4", count=_PROBED_ROWS * width).reshape(-1, width)
    labels = rows[:, 0]
    foreign = np.flatnonzero((labels != 0) & (labels != LABEL_ONE[manifest.label_dtype]))
    if foreign.size:
        fault = label_fault(int(labels[foreign[0]]), manifest.label_dtype)
        raise DataError(f"{path}: row {foreign[0]}: {fault} (or check the number of tables, columns and hotness)")
    words = rows[:, 1 : 1 + len(manifest.dense.names)]
    present = words[words != 0]
    if not present.size:
        return
    if dtype == "int32":
        foreign, other = np.abs(present.astype(np.int64)) > _LARGEST_COUNT, "float32"
    else:
        values = present.view("<f4")
        foreign, other = ~np.isfinite(values) | (np.abs(values) < _SMALLEST_VALUE), "int32"
    if foreign.mean() > 0.5:
        raise DataError(
            f"{path}: {foreign.mean():.0%} of the first non-zero dense values are no {dtype} numbers of a usual "
            f"size; they look like {other}, so ask for dense type {other}"
        )


def _dense_note(dense_dtype: DenseDtype) -> str:
    if dense_dtype == "int32":
        return "dense: int32 counts, log(1 + max(x, 0)) at read; missing and negative counts are 0"
    return "dense: float32, as they were found"
