"""Launch of the kernel that takes records apart; reference in ``split_records.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dlrm.nvrtc import c_type, load
from pipeline.formats.record_files import RecordLayout

SOURCE = Path(__file__).with_name("split_records.cu")
THREADS = 256
SHARED_BYTES = 32 * 1024
"""Of a block's records, about."""
MOST_ROWS = 64


def split_records(
    records: Any,
    index: Any | None,
    num_rows: int,
    own: slice,
    layout: RecordLayout,
    table_rows: Any,
    labels: Any,
    dense: Any,
    keys: Any,
    fault: Any,
) -> None:
    """See ``split_records.split_records``."""
    pitch = layout.words | 1
    rows = max(1, min(MOST_ROWS, SHARED_BYTES // (4 * pitch)))
    defines = (
        ("NUMBER", c_type(dense)),
        ("INDEXED", int(index is not None)),
        ("WIDE", int(layout.key_words == 2)),
        ("LOG", int(layout.dense_transform == "log1p_at_read")),
        ("LABEL_ONE", layout.label_one),
        ("ROWS", rows),
    )
    kernel = load(SOURCE, "split_records", defines)
    shape = (np.int64(num_rows), np.int64(own.start), np.int64(own.stop - own.start), np.int32(layout.words))
    widths = (np.int32(layout.num_dense), np.int32(dense.shape[1]), np.int32(len(layout.table_rows)))
    kernel(
        -(-num_rows // rows), THREADS, records, records if index is None else index, *shape, *widths, table_rows,
        labels, dense, keys, fault, shared_bytes=rows * pitch * 4,
    )  # fmt: skip
