"""Launches of the kernels that list touched rows; reference in ``touched_rows.py``."""

from __future__ import annotations

from typing import Any

import numpy as np

from dlrm.nvrtc import load
from embedding.pair_lists import tiles_of
from embedding.pair_lists_cuda import SOURCE, THREADS
from embedding.touched_rows import TouchedRows

_DEFINES = (("KEY", "int"),)


def list_touched(touched: Any, rows: TouchedRows, flag: Any) -> None:
    """See ``touched_rows.list_touched``."""
    size, chunks = np.uint32(len(touched)), tiles_of(len(touched))
    if chunks == 0:
        return
    blocks = -(-chunks // (THREADS // 32))
    load(SOURCE, "count_touched", _DEFINES)(blocks, THREADS, touched, size, rows.counts)
    load(SOURCE, "add_tiles", _DEFINES)(
        1, THREADS, rows.counts, np.uint32(chunks), np.int32(1), rows.room, rows.total, flag
    )
    load(SOURCE, "list_touched", _DEFINES)(
        blocks, THREADS, touched, size, rows.counts, rows.total, np.uint32(len(rows.rows)), rows.rows
    )
