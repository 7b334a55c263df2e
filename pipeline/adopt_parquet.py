"""Adopts Parquet files of HugeCTR or NVTabular: writes a manifest over them, to train from them as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from dlrm.errors import DataError
from pipeline.adopt import publish
from pipeline.checksums import file_checksum
from pipeline.etl.text_blocks import check_distinct
from pipeline.formats.interchange import ReadOptions
from pipeline.formats.parquet import ParquetSource, files_of
from pipeline.manifest import DenseInfo, FileInfo, Manifest, SplitInfo


def adopt_parquet(
    files: Mapping[str, Sequence[str | Path]],
    *,
    out: str | Path,
    table_rows: Sequence[int] | None = None,
    name: str | None = None,
    checksums: bool = False,
    relative: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write ``dataset.json`` over existing Parquet files.

    Args:
        files: of each split, in order: Parquet files, file lists, or folders. A folder that is all that ``train`` has,
            and has a folder for each split, stands for all of them.
        out: folder that gets the manifest; made where missing.
        table_rows: rows of each table; ``None``: as a file beside the data says, else the largest key + 1.
        name: of the set; ``None``: the folder's name.
        checksums: read the files whole and note their sums.
        relative: write paths relative to ``out``.
        overwrite: replace a manifest that is there.

    Returns:
        The folder.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError: a file is missing, named twice or no Parquet file, columns differ, or rows at an end are wrong.
    """
    directory = Path(out)
    given = {split: [Path(path) for path in paths] for split, paths in files.items() if paths}
    if not given:
        raise DataError("adopt: no files; name at least one")
    found = files_of(given["train"][0]) if list(given) == ["train"] and len(given["train"]) == 1 else {}
    if not found:
        found = {split: [file for path in paths for file in _of_one_split(path)] for split, paths in given.items()}
    check_distinct(found)
    beside = next(iter(given.values()))[0]
    options = ReadOptions(table_rows=None if table_rows is None else tuple(table_rows), allow=frozenset({"fp32-dense"}))
    source = ParquetSource(found, beside if beside.is_dir() else beside.parent, options)
    schema = source.schema
    manifest = Manifest(
        name=name or directory.resolve().name,
        layout="parquet",
        label_column=source.columns.label,
        dense=DenseInfo(names=schema.dense_names),
        key_dtype=schema.key_dtype,
        missing_keys=schema.missing_keys,
        tables=tuple(replace(table, hotness=max(1, table.hotness)) for table in schema.tables),
        splits={
            split: SplitInfo(
                rows=source.splits[split],
                files=tuple(_file_info(path, source.file_rows[path], checksums) for path in paths),
            )
            for split, paths in found.items()
        },
        licence=schema.licence,
        source=schema.source,
        notes=(*schema.notes, "dense: as they were found; values of 64 bits are rounded to 32"),
    )
    return publish(directory, manifest, relative=relative, overwrite=overwrite)


def _of_one_split(path: Path) -> list[Path]:
    """The Parquet files that a file, file list or folder stands for.

    Raises:
        DataError: it has several splits, or none.
    """
    found = files_of(path)
    if len(found) != 1:
        raise DataError(
            f"{path}: holds {', '.join(found) or 'no Parquet files'}, but one split is needed; name its files, or "
            "the folder alone"
        )
    return next(iter(found.values()))


def _file_info(path: Path, rows: int, checksums: bool) -> FileInfo:
    return FileInfo(
        path=str(path.resolve()),
        rows=rows,
        bytes=path.stat().st_size,
        checksum=file_checksum(path) if checksums else None,
    )
