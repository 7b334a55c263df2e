"""One column of a table at a time: label, dense values, or the keys of an embedding table.

Whatever is learnt from data (counts, means, standard deviations) comes from the training rows alone.
Shapes: n rows of all splits together, K keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl

from dlrm.errors import ConfigError, DataError
from pipeline.etl.frames import Rows
from pipeline.etl.schema import DenseColumns, LabelColumn, MultiHot, TableColumns

_INT32_ROWS = 2**31


@dataclass(frozen=True, slots=True)
class Feature:
    """Keys of one embedding table.

    Attributes:
        name: of the table.
        keys: [n] int64, -1 = no key; with ``offsets`` [K] int64.
        offsets: [n + 1] int64, first key of each row; ``None``: one key a row.
        weights: [K] float32 beside ``offsets``, or ``None``.
        rows: of the table; every key is below.
        frequency_ordered: whether the keys are numbered by training frequency.
        note: how the keys came about.
    """

    name: str
    keys: Any
    offsets: Any | None
    weights: Any | None
    rows: int
    frequency_ordered: bool
    note: str

    @property
    def hotness(self) -> int:
        """Keys of the longest row, at least 1."""
        return 1 if self.offsets is None else max(1, int(np.diff(self.offsets).max(initial=0)))

    def bags(self, rows: Any) -> tuple[Any, Any, Any]:
        """Keys [K] int64, lengths [B] int64 and weights [K] float32 of rows [B]; no key is -1."""
        if self.offsets is None:
            keys = self.keys[rows]
            there = keys >= 0
            return keys[there], there.astype(np.int64), np.ones(int(there.sum()), np.float32)
        first, lengths = self.offsets[rows], self.offsets[rows + 1] - self.offsets[rows]
        ends = np.cumsum(lengths)
        place = np.arange(ends[-1] if len(ends) else 0) + np.repeat(first - (ends - lengths), lengths)
        weights = np.ones(len(place), np.float32) if self.weights is None else self.weights[place]
        return self.keys[place], lengths, weights


def read_labels(rows: Rows, label: LabelColumn) -> Any:
    """Labels [n] int32.

    Raises:
        DataError: a label is missing, no number, or (without a rule) neither 0 nor 1.
    """
    values = _numbers(rows, label.column, rows.column(label.column))
    if (missing := np.isnan(values)).any():
        rows.refuse(label.column, int(np.argmax(missing)), None, "there: a row without a label teaches nothing")
    if comparison := label.comparison():
        function, number = comparison
        return function(values, number).astype(np.int32)
    wrong = (values != 0) & (values != 1)
    if wrong.any():
        row = int(np.argmax(wrong))
        rows.refuse(label.column, row, values[row].item(), "0 or 1; set label.rule, such as '>= 4', for other values")
    return values.astype(np.int32)


def read_dense(rows: Rows, spec: DenseColumns, train: Any) -> list[tuple[str, Any, str]]:
    """The columns of one entry of ``dense``: name, values [n] float32 and a note each.

    Args:
        rows: of all splits.
        spec: which columns, and what to do with them.
        train: [n] bool, the training rows.

    Raises:
        DataError: a value is no number, infinite, or missing where the schema has no rule for it.
    """
    return [(name, *_dense_column(rows, name, spec, train)) for name in rows.matching(spec.column)]


def _dense_column(rows: Rows, name: str, spec: DenseColumns, train: Any) -> tuple[Any, str]:
    values = _numbers(rows, name, rows.column(name))
    missing = np.isnan(values)
    rule = "missing refused"
    if spec.missing == "refuse":
        if missing.any():
            rows.refuse(name, int(np.argmax(missing)), None, "there; set its `missing` to a number or to mean")
    elif spec.missing == "mean":
        known = values[train & ~missing]
        if not len(known):
            raise DataError(f"column {name!r}: no training row has a value, so that there is no mean; set a number")
        fill = float(known.mean())
        values[missing] = fill
        rule = f"missing = mean of the training rows ({fill:.9g})"
    else:
        values[missing] = spec.missing
        rule = f"missing = {spec.missing:g}"
    transform = "as is"
    if spec.transform == "log1p":
        values = np.log1p(np.maximum(values, 0))
        transform = "log(1 + max(x, 0))"
    elif spec.transform == "standardise":
        mean, deviation = float(values[train].mean()), float(values[train].std())
        # A constant column stays 0 instead of dividing by nothing.
        values = (values - mean) / (deviation or 1.0)
        transform = f"(x - {mean:.9g}) / {deviation or 1.0:.9g}, from the training rows"
    with np.errstate(over="ignore"):
        result = values.astype(np.float32)
    if not np.isfinite(result).all():
        row = int(np.argmin(np.isfinite(result)))
        rows.refuse(name, row, values[row].item(), "within float32; transform it, such as by log1p")
    return result, f"dense {name}: {transform}; {rule}"


def read_tables(rows: Rows, spec: TableColumns, train: Any) -> list[Feature]:
    """The features of one entry of ``tables``.

    Args:
        rows: of all splits.
        spec: which columns, and how they become keys.
        train: [n] bool, the training rows.

    Raises:
        ConfigError: the entry does not go with the column's type.
        DataError: a value is no key, or lies outside its table.
    """
    features = []
    for column in rows.matching(spec.column):
        series = rows.column(column)
        if spec.multi_hot is None:
            values, offsets, weights = series, None, None
        else:
            values, offsets, weights = _flatten(rows, series, spec.multi_hot)
        named = replace(spec, column=column, name=spec.name or column)
        if spec.encoding == "identity":
            feature = _identity(rows, named, values, offsets, weights)
        else:
            counted = train if offsets is None else np.repeat(train, np.diff(offsets))
            feature = _by_frequency(named, values, offsets, weights, counted)
        features.append(_shortened(feature, spec.multi_hot.max if spec.multi_hot else None))
    return features


def _by_frequency(spec: TableColumns, values: pl.Series, offsets: Any, weights: Any, counted: Any) -> Feature:
    """Number values by descending count over the rows ``counted``; null is a value like any other."""
    values = _categories(spec.column, values)
    numbered = (
        pl.DataFrame({"value": values.filter(pl.Series(counted, dtype=pl.Boolean))})
        .group_by("value")
        .len("count")
        .filter(pl.col("count") >= spec.threshold)
        .sort(["count", "value"], descending=[True, False], nulls_last=False)
        .with_columns(pl.int_range(1, pl.len() + 1, dtype=pl.Int64).alias("key"))
    )
    missing = numbered.filter(pl.col("value").is_null())["key"]
    missing_key = int(missing[0]) if len(missing) else 0
    joined = pl.DataFrame({"value": values}).join(numbered, on="value", how="left", maintain_order="left")
    # A join matches no null, so that the missing value's number is set apart.
    keys = joined.select(
        pl.when(pl.col("value").is_null()).then(missing_key).otherwise(pl.col("key")).fill_null(0)
    ).to_series()
    rare = f"seen fewer than {spec.threshold} times" if spec.threshold > 1 else "never seen"
    note = (
        f"table {spec.name}: numbered from 1 by descending count over the training rows, equal counts by value; "
        f"0: {rare} there"
    )
    return Feature(str(spec.name), keys.to_numpy().astype(np.int64), offsets, weights, numbered.height + 1, True, note)


def _categories(column: str, values: pl.Series) -> pl.Series:
    """Values that can be counted and sorted: integers, truth values or text, an empty text being missing."""
    dtype = values.dtype
    if dtype.is_nested() or dtype.is_float() or dtype == pl.Binary:
        remedy = "set multi_hot for lists" if dtype.is_nested() else "use text or integers, or make the column dense"
        raise ConfigError(f"column {column!r}: {dtype} values cannot be categories; {remedy}")
    if dtype.is_integer() or dtype == pl.Boolean:
        return values
    text = values.cast(pl.String)
    return text.set(text == "", None)


def _identity(rows: Rows, spec: TableColumns, values: pl.Series, offsets: Any, weights: Any) -> Feature:
    """Keep keys as they are; null and -1 are no key."""
    dtype = values.dtype
    if not (dtype.is_integer() or dtype in (pl.String, pl.Null)):
        raise ConfigError(f"column {spec.column!r}: {dtype} values, but encoding identity needs integers")
    numbers = values.cast(pl.Int64, strict=False)
    missing = values.is_null() | (values == "") if dtype == pl.String else values.is_null()
    wrong = (numbers.is_null() & ~missing).to_numpy()
    keys = numbers.fill_null(-1).to_numpy().astype(np.int64)
    table_rows = spec.rows or max(1, int(keys.max(initial=0)) + 1)
    wrong = wrong | (keys < -1) | (keys >= table_rows)
    if wrong.any():
        place = int(np.argmax(wrong))
        row = place if offsets is None else int(np.searchsorted(offsets, place, side="right")) - 1
        wanted = "a key from 0" if spec.rows is None else f"a key from 0 to {spec.rows - 1}"
        rows.refuse(spec.column, row, values[place], f"{wanted}, or -1 for none")
    if offsets is not None and (keys < 0).any():
        keys, offsets, weights = _kept(keys >= 0, keys, offsets, weights)
    return Feature(str(spec.name), keys, offsets, weights, table_rows, False, f"table {spec.name}: keys as they are")


def _flatten(rows: Rows, series: pl.Series, multi_hot: MultiHot) -> tuple[pl.Series, Any, Any]:
    """Values [K], offsets [n + 1] and weights [K] of a multi-hot column."""
    lists = _as_lists(rows, series, multi_hot.separator)
    if multi_hot.weights is None and lists.dtype.inner == pl.String:  # type: ignore[attr-defined]
        lists = lists.list.eval(pl.element().filter(pl.element() != ""))
    lengths = lists.list.len().fill_null(0)
    values = lists.filter(lengths > 0).explode()
    offsets = np.concatenate([[0], np.cumsum(lengths.to_numpy().astype(np.int64))])
    if values.null_count():
        row = int(np.searchsorted(offsets, int(values.is_null().arg_max() or 0), side="right")) - 1
        rows.refuse(series.name, row, None, "lists without nulls")
    if multi_hot.weights is None:
        return values, offsets, None
    factors = _as_lists(rows, rows.column(multi_hot.weights), multi_hot.separator)
    counts = factors.list.len().fill_null(0)
    if (different := counts != lengths).any():
        row = int(different.arg_max() or 0)
        rows.refuse(multi_hot.weights, row, f"{counts[row]} weights", f"as many as the {lengths[row]} keys")
    weights = _numbers(rows, multi_hot.weights, factors.filter(counts > 0).explode(), offsets).astype(np.float32)
    if np.isnan(weights).any():
        row = int(np.searchsorted(offsets, int(np.argmax(np.isnan(weights))), side="right")) - 1
        rows.refuse(multi_hot.weights, row, None, "a number for each key")
    return values, offsets, weights


def _as_lists(rows: Rows, series: pl.Series, separator: str | None) -> pl.Series:
    if series.dtype == pl.String:
        if not separator:
            raise ConfigError(f"column {series.name!r}: text, which multi_hot.separator must split; set it")
        return series.set(series == "", None).str.split(separator)
    if isinstance(series.dtype, pl.Array):
        return series.arr.to_list()
    if not isinstance(series.dtype, pl.List):
        raise ConfigError(
            f"column {series.name!r}: {series.dtype} in {rows.where(0)}, but multi_hot needs lists or text"
        )
    return series


def _kept(kept: Any, keys: Any, offsets: Any, weights: Any) -> tuple[Any, Any, Any]:
    """Keys, offsets and weights without those not ``kept`` [K]."""
    before = np.concatenate([[0], np.cumsum(kept)])
    return keys[kept], before[offsets], None if weights is None else weights[kept]


def _shortened(feature: Feature, most: int | None) -> Feature:
    """At most the first ``most`` keys of each row; the note says how many rows had more."""
    if feature.rows > _INT32_ROWS:
        feature = replace(feature, note=feature.note + "; 64-bit keys")
    if feature.offsets is None or most is None or feature.hotness <= most:
        return feature
    lengths = np.diff(feature.offsets)
    place = np.arange(len(feature.keys)) - np.repeat(feature.offsets[:-1], lengths)
    keys, offsets, weights = _kept(place < most, feature.keys, feature.offsets, feature.weights)
    note = f"{feature.note}; the first {most} keys of {int((lengths > most).sum())} rows that had more"
    return replace(feature, keys=keys, offsets=offsets, weights=weights, note=note)


def _numbers(rows: Rows, name: str, series: pl.Series, offsets: Any | None = None) -> Any:
    """Values [n] float64, NaN where missing."""
    if not (series.dtype.is_numeric() or series.dtype in (pl.Boolean, pl.String, pl.Null)):
        raise ConfigError(f"column {name!r}: {series.dtype} values, but numbers are needed")
    numbers = series.cast(pl.Float64, strict=False)
    wrong = numbers.is_infinite().fill_null(value=False)
    if series.dtype == pl.String:
        wrong = wrong | (numbers.is_null() & series.is_not_null() & (series != "").fill_null(value=False))
    if wrong.any():
        place = int(wrong.arg_max() or 0)
        row = place if offsets is None else int(np.searchsorted(offsets, place, side="right")) - 1
        rows.refuse(name, row, series[place], "a finite number")
    return numbers.fill_null(float("nan")).to_numpy().astype(np.float64)
