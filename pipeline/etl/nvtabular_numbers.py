"""NVTabular's numbers to ours: its vocabulary on disk to ``Numbered``, and a table from its ids to our numbers.

NVTabular's ids are int64: 0 padding, 1 missing, 2 rare, and from 3 on its vocabulary by descending count, equal counts
in no defined order. Ours start at 1, equal counts by value, a missing category among the others.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from dlrm.errors import DataError
from pipeline.etl.criteo_text import MISSING
from pipeline.etl.numbering import Numbered
from pipeline.etl.rules import Rules

FIRST_ID = 3
"""NVTabular's id of the first category of its vocabulary."""
_MISSING_ID = 1
_HEX = "^[0-9a-f]{8}$"


@dataclass(frozen=True, slots=True)
class Uniques:
    """NVTabular's vocabulary of one column.

    Attributes:
        values: [n] uint32, of the categories with ids from ``FIRST_ID`` on.
        counts: [n] int64, in the training rows.
        missing: how often the category was missing there.
        rare: how often it was another one.
    """

    values: Any
    counts: Any
    missing: int
    rare: int


def read_uniques(folder: Path, name: str) -> Uniques:
    """Read ``unique.<name>.parquet`` (a file, or a folder of parts) and ``meta.<name>.parquet``.

    Args:
        folder: of NVTabular's Categorify, ``categories``.
        name: of the column.

    Raises:
        DataError: a file is missing or of another form, or a category is no hexadecimal text in lower case.
    """
    path, meta = folder / f"unique.{name}.parquet", folder / f"meta.{name}.parquet"
    files = sorted(path.glob("*.parquet"), key=_part_number) if path.is_dir() else [path]
    try:
        observed = dict(pl.read_parquet(meta, glob=False).select("kind", "num_observed").fill_null(0).iter_rows())
        frames = [pl.read_parquet(file, columns=[name, f"{name}_size"], glob=False) for file in files]
        frame = pl.concat(frames).select(pl.col(name).cast(pl.String), pl.col(f"{name}_size").cast(pl.Int64))
        missing, rare = int(observed["null"]), int(observed["oov"])
    except (OSError, KeyError, pl.exceptions.PolarsError) as error:
        raise DataError(f"{path}: not a vocabulary of NVTabular 23.8 ({' '.join(str(error).split())[:200]})") from None
    categories = frame[name]
    odd = frame.filter(~pl.col(name).str.contains(_HEX) | pl.col(name).is_null())[name]
    if len(odd):
        raise DataError(
            f"column {name}: category {odd[0]!r} is not 8 hexadecimal digits in lower case; NVTabular takes categories "
            "as text, so correct the rows or use --engine crosslane"
        )
    values = categories.str.to_integer(base=16, dtype=pl.Int64).to_numpy().astype(np.uint32)
    return Uniques(values, frame[f"{name}_size"].to_numpy(), missing, rare)


def _part_number(path: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", path.name)]


def renumber(uniques: Uniques, rules: Rules, rows: int, path: Path) -> tuple[Numbered, Any]:
    """Number the categories of a column as Crosslane's own engine does.

    Args:
        uniques: NVTabular's vocabulary, n categories.
        rules: of values; the threshold and the cap on rows apply here (again).
        rows: counted.
        path: file that gets the values in the order of their numbers.

    Returns:
        The column's categories, and [n + 3] int32: our number by NVTabular's id.
    """
    values, counts = uniques.values.astype(np.int64), uniques.counts
    places = np.arange(FIRST_ID, FIRST_ID + len(values))
    if rules.missing_category == "own" and uniques.missing:
        values, counts = np.append(values, MISSING), np.append(counts, uniques.missing)
        places = np.append(places, _MISSING_ID)
    order = np.lexsort((values, -counts))
    order = order[counts[order] >= rules.frequency_threshold]
    if rules.cap_rows is not None:
        order = order[: rules.cap_rows - 1]
    kept, kept_counts = values[order], counts[order]
    numbers = np.zeros(FIRST_ID + len(uniques.values), np.int32)
    numbers[places[order]] = np.arange(1, len(order) + 1)
    np.maximum(kept, 0).astype(np.uint32).tofile(path)
    steps, sizes = np.unique(kept_counts, return_counts=True)
    numbered = Numbered(
        path=path,
        size=len(order),
        missing=int(numbers[_MISSING_ID]),
        counts=tuple(steps[::-1].tolist()),
        sizes=tuple(sizes[::-1].tolist()),
        rare=rows - int(kept_counts.sum()),
    )
    return numbered, numbers
