"""Launches of the CUDA kernels that sort rows into groups; references in ``score_groups.py``.

Scores are float32, counts int32, and there are fewer than 2^31 rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dlrm.nvrtc import Defines, c_type, load
from embedding import row_sort_cuda
from embedding.row_sort import TILE
from pipeline.score_groups import KEY_BITS, KEY_DIGITS, Room

SOURCE = Path(__file__).with_name("score_groups.cu")
THREADS = 256
WAVES = 8
"""Blocks that a multiprocessor gets where every block goes through many rows."""


def check_rows(scores: Any, labels: Any, found: Any) -> None:
    """See ``score_groups.check_rows``."""
    if scores.size == 0:
        return
    kernel = load(SOURCE, "check_rows", (("SCORE", c_type(scores)), ("LABEL", c_type(labels)), ("MERGED", 0)))
    blocks = min(-(-scores.size // THREADS), WAVES * kernel.multiprocessors)
    kernel(blocks, THREADS, scores, labels, np.int64(scores.size), found)


def group_rows(
    scores: Any, labels: Any, out_scores: Any, rows_below: Any, positives_below: Any, count: Any, room: Room
) -> None:
    """See ``score_groups.group_rows``."""
    defines = (("SCORE", "float"), ("LABEL", c_type(labels)), ("MERGED", 0))
    number = np.uint32(len(scores))
    keyed = (-(-len(scores) // THREADS), THREADS, scores, labels, number, room.keys, room.named, room.info)
    load(SOURCE, "key_rows", defines)(*keyed)
    _sort_and_join((scores, scores), out_scores, rows_below, positives_below, count, room, defines)


def merge_groups(
    scores: Any,
    rows: Any,
    positives: Any,
    run_counts: Sequence[int],  # noqa: ARG001 a sort needs no runs
    out_scores: Any,
    rows_below: Any,
    positives_below: Any,
    count: Any,
    room: Room,
) -> None:
    """See ``score_groups.merge_groups``."""
    defines = (("SCORE", "float"), ("LABEL", "float"), ("MERGED", 1))
    number = np.uint32(len(scores))
    keyed = (-(-len(scores) // THREADS), THREADS, scores, number, room.keys, room.named, room.info)
    load(SOURCE, "key_groups", defines)(*keyed)
    _sort_and_join((rows, positives), out_scores, rows_below, positives_below, count, room, defines)


def _sort_and_join(
    weights: tuple[Any, Any],
    out_scores: Any,
    rows_below: Any,
    positives_below: Any,
    count: Any,
    room: Room,
    defines: Defines,
) -> None:
    """Sort the pairs in ``room`` and write their groups; ``weights``: rows and positives of what the pairs name."""
    size = len(out_scores)
    tiles = -(-size // TILE)
    # The other half of the sort's room is where the groups will lie: an even number of digits leaves it free.
    assert KEY_DIGITS % 2 == 0
    keys = (room.keys, out_scores.view(np.uint32))
    named = (room.named, rows_below.view(np.uint32))
    sorting = (("KEY", "int"), ("BAGS", 0), ("WEIGHTED", 0), ("BITS", KEY_BITS))
    row_sort_cuda.sort_pairs(keys, named, size, KEY_DIGITS, room.counts, room.totals, room.info, sorting)
    pairs = (room.keys, room.named, *weights, np.uint32(size), np.uint32(tiles), room.counts)
    load(SOURCE, "count_groups", defines)(tiles, THREADS, *pairs)
    row_sort_cuda.add_counts(3, tiles, room.counts, room.totals, sorting)
    groups = (out_scores, rows_below, positives_below, count)
    load(SOURCE, "write_groups", defines)(tiles, THREADS, *pairs, room.totals, *groups)
