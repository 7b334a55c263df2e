"""How often each row is looked up in the counted rows (``Rules.count``): ``encoding/statistics.json``.

Rows are numbered by descending count, so that "so many rows of this count, so many of that" is all there is to know
of a table of any size; row 0 (rare and unseen values) stands apart. ``share`` is for people: the part of all look-ups
that the most frequent rows take together, by how many of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.etl.criteo_text import TABLE_NAMES
from pipeline.etl.job import Job
from pipeline.etl.numbering import Numbered
from pipeline.manifest import Manifest
from pipeline.statistics import STATISTICS, train_digest


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
    job.mark(STATISTICS, {"format": "crosslane-statistics", "version": 1, "rows": rows, "tables": tables})


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
    job.mark(STATISTICS, {**job.read(STATISTICS), "train": train_digest(manifest)})
