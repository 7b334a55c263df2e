"""How often each row is looked up in the training rows, as preparation counted it: ``encoding/statistics.json``.

Rows are numbered by descending count, so that "so many rows of this count, so many of that" is all there is to know
of a table of any size; row 0 (rare and unseen values) stands apart. ``share`` is for people: the part of all look-ups
that the most frequent rows take together, by how many of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dlrm.errors import DataError
from embedding.frequency import Frequency
from pipeline.etl.criteo_text import TABLE_NAMES
from pipeline.etl.job import Job
from pipeline.etl.numbering import Numbered
from pipeline.etl.vocabulary import ENCODING_FOLDER
from pipeline.manifest import Manifest

STATISTICS_NAME = "statistics.json"
_WHERE = f"{ENCODING_FOLDER}/{STATISTICS_NAME}"


def write_statistics(job: Job, rows: int, numbered: Sequence[Numbered]) -> None:
    """Write them into the working folder.

    Args:
        job: working folder.
        rows: counted.
        numbered: by column.
    """
    tables = [
        {
            "name": name,
            "rows": one.size + 1,
            "lookups_of_row_0": one.rare,
            "counts": list(one.counts),
            "rows_of_count": list(one.sizes),
            "share": cumulative_share(one.counts, one.sizes, rows),
        }
        for name, one in zip(TABLE_NAMES, numbered, strict=True)
    ]
    job.mark(_WHERE, {"format": "crosslane-statistics", "version": 1, "rows": rows, "tables": tables})


def cumulative_share(counts: Sequence[int], sizes: Sequence[int], lookups: int) -> list[list[float]]:
    """Part of all look-ups that the most frequent 1, 2, 4, ... rows take together, and all of them; row 0 left out.

    Args:
        counts: every count that occurs, descending.
        sizes: rows of each.
        lookups: in all.
    """
    ends = np.cumsum([0, *sizes], dtype=np.int64)
    taken = np.cumsum([0.0, *(count * size for count, size in zip(counts, sizes, strict=True))])
    last = int(ends[-1])
    ranks = sorted({*(1 << power for power in range(last.bit_length())), last} - {0})
    return [[rank, round(float(np.interp(rank, ends, taken)) / lookups, 9)] for rank in ranks]


def stamp_statistics(job: Job, manifest: Manifest) -> None:
    """Note which training rows they are of."""
    job.mark(_WHERE, {**job.read(_WHERE), "train": _train_digest(manifest)})


def _train_digest(manifest: Manifest) -> str:
    digests = [file.sha256 or "" for file in manifest.splits["train"].files] if "train" in manifest.splits else []
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def read_frequencies(directory: Path, manifest: Manifest) -> dict[str, Frequency] | None:
    """Look-ups of every table's rows, by table; ``None`` where a set has none, or those of other rows.

    Args:
        directory: of the set.
        manifest: its.

    Raises:
        DataError: the file is damaged.
    """
    path = directory / _WHERE
    try:
        values: Any = json.loads(path.read_bytes())
        if values["train"] != _train_digest(manifest):
            return None
        found = {
            table["name"]: Frequency.from_steps(
                [table["lookups_of_row_0"], *table["counts"]], [1, *table["rows_of_count"]], table["rows"]
            )
            for table in values["tables"]
        }
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged ({type(error).__name__}: {error}); remove it or prepare again") from None
    rows = {table.name: table.rows for table in manifest.tables}
    return found if {name: one.rows for name, one in found.items()} == rows else None
