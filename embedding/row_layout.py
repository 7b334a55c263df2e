"""Which rows of tables whose rows travel a rank holds, and where they lie."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from embedding.placement import Placement, TableSpec
from embedding.slots import SPREAD, RowLayout


def rows_of(spec: TableSpec, placement: Placement, ranks: int, rank: int) -> range:
    """The rows that ``rank`` alone holds of a table whose rows travel."""
    if placement.kind == "table_wise":
        return range(spec.rows if placement.owner == rank else 0)
    first = rank if placement.listed else placement.threshold + rank
    return range(min(first, spec.rows), spec.rows, ranks)


def row_layout(specs: Sequence[TableSpec], placements: Sequence[Placement], ranks: int) -> RowLayout:
    """Where the rows of some tables lie: each rank's rows of table after table (``rows_of``)."""
    threshold = np.array([placement.threshold for placement in placements], np.int64)
    owner = np.array([p.owner if p.kind == "table_wise" else SPREAD for p in placements], np.int64)
    held = [
        [len(rows_of(spec, placement, ranks, rank)) for spec, placement in zip(specs, placements, strict=True)]
        for rank in range(ranks)
    ]
    counts = np.array(held, np.int64)
    return RowLayout(
        threshold=threshold,
        owner=owner,
        distinct=np.array([placement.deduplicate for placement in placements], np.bool_),
        frequent_start=np.cumsum(threshold) - threshold,
        base=np.cumsum(counts, axis=1) - counts,
        frequent=int(threshold.sum()),
    )
