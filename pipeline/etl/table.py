"""Any table of rows (CSV, Parquet, npz, or a Polars frame) into a prepared data set, as a schema says.

The whole table is held in memory; for Criteo's own files of any size see ``pipeline.etl.criteo``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from dlrm.errors import ConfigError, DataError
from embedding.jagged import Jagged
from pipeline.etl.columns import Feature, read_dense, read_labels, read_tables
from pipeline.etl.frames import Rows, read_rows
from pipeline.etl.schema import SplitRule, TableSchema, load_schema
from pipeline.etl.text_blocks import check_distinct
from pipeline.manifest import TableInfo
from pipeline.writer import DatasetWriter

CHUNK_ROWS = 1 << 17
_INT32_ROWS = 2**31

ProgressCallback = Callable[[str, int, int], None]
"""Called with the phase (``read``, ``encode`` or ``write``), how much of it is done and how much it is."""

Inputs = Mapping[str, Sequence[Path] | pl.DataFrame]


def prepare_table(
    schema: Path | TableSchema,
    inputs: Inputs,
    out: Path,
    *,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
) -> Path:
    """Prepare a table.

    Args:
        schema: what the columns are, or the YAML or JSON file that says so.
        inputs: files (or a frame) by split. With ``split.by: files`` the splits are kept and one is
            ``train``; else there is one entry, of any name, and the rule divides it.
        out: folder of the prepared data set.
        overwrite: replace a data set that is in ``out``.
        progress: called now and then.

    Returns:
        ``out``.

    Raises:
        ConfigError: the schema is wrong or does not fit the inputs.
        DataError: a file is missing or malformed, or a value does not fit its column; the message says
            file, row, column and value.
    """
    schema = schema if isinstance(schema, TableSchema) else load_schema(schema)
    report = progress or (lambda _phase, _done, _total: None)
    _check_inputs(schema.split, inputs)
    report("read", 0, 1)
    rows = read_rows(schema, inputs)
    report("read", 1, 1)
    splits = divide(rows, schema.split)
    train = np.zeros(rows.frame.height, bool)
    train[splits["train"]] = True
    labels = read_labels(rows, schema.label)
    dense, features, notes = [], [], [_split_note(schema.split, splits), _label_note(schema)]
    steps = len(schema.dense) + len(schema.tables)
    for step, spec in enumerate(schema.dense):
        report("encode", step, steps)
        dense += read_dense(rows, spec, train)
    for step, table in enumerate(schema.tables, len(schema.dense)):
        report("encode", step, steps)
        features += read_tables(rows, table, train)
    report("encode", steps, steps)
    notes += [note for _, _, note in dense] + [feature.note for feature in features]
    matrix = np.column_stack([values for _, values, _ in dense]) if dense else np.empty((len(labels), 0), np.float32)
    with _writer(out, schema, [name for name, _, _ in dense], features, overwrite) as writer:
        done = 0
        for split, numbers in splits.items():
            for start in range(0, len(numbers), CHUNK_ROWS):
                chosen = numbers[start : start + CHUNK_ROWS]
                keys = _keys(features, chosen, as_bags=schema.layout == "jagged")
                writer.write(split, labels[chosen], matrix[chosen], keys)
                done += len(chosen)
                report("write", done, len(labels))
        return writer.finish(licence=schema.licence, source=schema.source, notes=notes)


def divide(rows: Rows, rule: SplitRule) -> dict[str, Any]:
    """Row numbers [n] int64 of each split, by a rule.

    Raises:
        DataError: the rows are too few for the parts, or the column to order by has gaps.
    """
    if rule.by == "files":
        return {str(split): np.flatnonzero(rows.splits == split) for split in dict.fromkeys(rows.splits.tolist())}
    n = rows.frame.height
    num_test, num_validation = round(n * rule.test), round(n * rule.validation)
    parts = {"train": n - num_test - num_validation, "validation": num_validation, "test": num_test}
    asked = {"train": 1.0, "validation": rule.validation, "test": rule.test}
    for name, count in parts.items():
        if asked[name] and count < 1:
            raise DataError(f"split {name!r}: no row of {n} falls to it; give more rows or another fraction")
    if rule.by == "random":
        order = np.random.default_rng(rule.seed).permutation(n)
    else:
        order = np.arange(n) if rule.column is None else _order(rows, rule.column)
    ends = np.cumsum(list(parts.values()))
    divided = dict(zip(parts, np.split(order, ends[:-1]), strict=True))
    # Drawn rows go back to file order: neighbours in the file are then neighbours on the disk.
    return {name: np.sort(part) if rule.by == "random" else part for name, part in divided.items() if len(part)}


def _order(rows: Rows, column: str) -> Any:
    values = rows.column(column)
    if values.dtype == pl.String:
        numbers = values.cast(pl.Float64, strict=False)
        # Numbers by size; what is no number, such as an ISO date, by its text.
        values = values if numbers.null_count() else numbers
    if values.null_count():
        rows.refuse(column, int(values.is_null().arg_max() or 0), None, "there: rows are ordered by it")
    numbered = pl.DataFrame({"value": values}).with_row_index("row")
    return numbered.sort("value", maintain_order=True)["row"].to_numpy().astype(np.int64)


def _check_inputs(rule: SplitRule, inputs: Inputs) -> None:
    if rule.by == "files" and "train" not in inputs:
        raise ConfigError("inputs: no files of split train, and split.by is files; name some, or set random or order")
    if rule.by != "files" and len(inputs) != 1:
        raise ConfigError(
            f"inputs: splits {', '.join(inputs) or 'none'}, but split.by: {rule.by} divides one set of files; "
            "name one, or set split.by to files"
        )
    check_distinct({split: given for split, given in inputs.items() if not isinstance(given, pl.DataFrame)})


def _writer(
    out: Path, schema: TableSchema, dense_names: list[str], features: list[Feature], overwrite: bool
) -> DatasetWriter:
    tables = [
        TableInfo(
            name=feature.name,
            rows=feature.rows,
            hotness=feature.hotness,
            frequency_ordered=feature.frequency_ordered,
        )
        for feature in features
    ]
    return DatasetWriter(
        out,
        name=schema.name,
        dense_names=dense_names,
        tables=tables,
        layout=schema.layout,
        key_dtype="int64" if any(feature.rows > _INT32_ROWS for feature in features) else "int32",
        weighted=any(feature.weights is not None for feature in features),
        overwrite=overwrite,
    )


def _keys(features: list[Feature], rows: Any, *, as_bags: bool) -> Any:
    """Keys [B, T] of one-hot features, else ``Jagged``."""
    if not as_bags and all(feature.offsets is None for feature in features):
        columns = [feature.keys[rows] for feature in features]
        return np.column_stack(columns) if columns else np.empty((len(rows), 0), np.int64)
    parts = [feature.bags(rows) for feature in features]
    lengths = np.concatenate([np.zeros(1, np.int64), *(lengths for _, lengths, _ in parts)])
    weighted = any(feature.weights is not None for feature in features)
    return Jagged(
        keys=np.concatenate([keys for keys, _, _ in parts]) if parts else np.empty(0, np.int64),
        offsets=np.cumsum(lengths),
        weights=np.concatenate([weights for _, _, weights in parts]) if weighted else None,
        num_tables=len(features),
        num_rows=len(rows),
    )


def _split_note(rule: SplitRule, splits: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{name} {len(rows)}" for name, rows in splits.items())
    how = {
        "files": "by files",
        "random": f"at random, seed {rule.seed}",
        "order": f"in order of {rule.column or 'the file'}",
    }
    return f"splits {how[rule.by]}: {counts}"


def _label_note(schema: TableSchema) -> str:
    return f"label: {schema.label.column}" + (f" {schema.label.rule}" if schema.label.rule else "")
