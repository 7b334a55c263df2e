"""Launches of the kernels that take records apart; reference in ``split_records.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dlrm.nvrtc import c_type, load
from embedding.row_sort_cuda import add_counts
from pipeline.formats.record_files import RecordLayout
from pipeline.split_records import KeyColumns, SplitKeys, rows_of_block

SOURCE = Path(__file__).with_name("split_records.cu")
THREADS = 256
ONE_KEY, ALL_KEYS, SOME_KEYS = range(3)
"""Of a bag; see ``BAGS`` of the source."""
_ADDING = (("KEY", "int"), ("BAGS", 0), ("WEIGHTED", 0), ("BITS", 1))
"""Macros of ``row_sort.cu``, of which sums over tiles need none."""


def split_records(
    records: Any,
    index: Any | None,
    num_rows: int,
    own: slice,
    layout: RecordLayout,
    columns: KeyColumns,
    labels: Any,
    dense: Any,
    out: SplitKeys,
    fault: Any,
) -> None:
    """See ``split_records.split_records``."""
    if num_rows == 0:
        out.offsets.fill(0)
        return
    tables, rows, pitch = len(layout.table_rows), rows_of_block(layout), layout.words | 1
    blocks = -(-num_rows // rows)
    bags = SOME_KEYS if layout.missing else ONE_KEY if layout.plain else ALL_KEYS
    defines = (
        ("NUMBER", c_type(dense)),
        ("INDEXED", int(index is not None)),
        ("WIDE", int(layout.key_words == 2)),
        ("LOG", int(layout.dense_transform == "log1p_at_read")),
        ("LABEL_ONE", layout.label_one),
        ("ROWS", rows),
        ("BAGS", bags),
        ("WEIGHTED", int(layout.weighted)),
    )
    source = (records, records if index is None else index, np.int64(num_rows))
    place = (np.int32(layout.words), np.int32(layout.first_key), np.int32(tables), columns.column, columns.full)
    shared = 4 * rows * (pitch + tables * layout.missing)
    counts, totals = out.room[: tables * blocks], out.room[tables * blocks :]
    if layout.missing:
        load(SOURCE, "count_keys", defines)(blocks, THREADS, *source, *place, counts, shared_bytes=shared)
        add_counts(tables, blocks, counts, totals, _ADDING)
    shape = (
        np.int64(own.start),
        np.int64(own.stop - own.start),
        np.int32(layout.num_dense),
        np.int32(dense.shape[1]),
        columns.vector,
    )
    load(SOURCE, "split_records", defines)(
        blocks, THREADS, *source, *place, *shape, columns.table_rows, counts, totals, labels, dense, out.keys,
        out.offsets, np.int32(len(out.offsets) > 0), out.weights, fault, shared_bytes=shared,
    )  # fmt: skip
