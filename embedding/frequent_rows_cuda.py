"""Launch of the kernel that turns keys into places; reference in ``frequent_rows.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dlrm.nvrtc import c_type, load
from embedding.frequent_rows import FrequentRows

SOURCE = Path(__file__).with_name("frequent_rows.cu")
THREADS = 256


def place_features(keys: Any, rows: int, frequent: FrequentRows, out: Any) -> None:
    """See ``frequent_rows.place_features``."""
    tables, chunks = len(frequent.word_start), -(-rows // THREADS)
    if tables * chunks:
        load(SOURCE, "place_features", (("KEY", c_type(keys)), ("PLACE", c_type(out))))(
            tables * chunks, THREADS, keys, np.uint32(rows), np.uint32(chunks), frequent.word_start, frequent.words,
            frequent.before, frequent.threshold, out,
        )  # fmt: skip
