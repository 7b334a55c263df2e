"""Launch of the row moves' CUDA kernel; reference in ``row_moves.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dlrm.errors import DeviceError
from dlrm.nvrtc import c_type, load
from embedding.row_moves import listed_rows

SOURCE = Path(__file__).with_name("row_moves.cu")
THREADS = 256
BLOCKS = 8
"""Blocks of a multiprocessor that walk the list."""


def move_rows(source: Any, source_rows: Any | None, target: Any, target_rows: Any | None, scale: float = 1.0) -> None:
    """See ``row_moves.move_rows``.

    Raises:
        DeviceError: rows are no whole number of four columns.
    """
    dim = source.shape[1]
    if dim % 4:
        raise DeviceError(f"model.embedding_dim: {dim} is no multiple of 4, which the exchange between GPUs needs")
    count = listed_rows(source, source_rows, target, target_rows)
    if count == 0:
        return
    defines = (
        ("DIM", dim), ("IN", c_type(source)), ("OUT", c_type(target)), ("FROM", int(source_rows is not None)),
        ("TO", int(target_rows is not None)), ("SCALED", int(scale != 1.0)),
    )  # fmt: skip
    kernel = load(SOURCE, "move_listed", defines)
    blocks = min(-(-count // THREADS), kernel.multiprocessors * BLOCKS)
    begin, end = (target if rows is None else rows for rows in (source_rows, target_rows))  # what is not read
    kernel(blocks, THREADS, source, begin, target, end, np.int64(count), np.float32(scale))
