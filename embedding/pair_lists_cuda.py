"""Launches of the pair lists' CUDA kernels; references in ``pair_lists.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dlrm.nvrtc import c_type, load
from embedding.pair_lists import PairLayout, PairLists, tiles_of
from embedding.topology import share_of

SOURCE = Path(__file__).with_name("pair_lists.cu")
THREADS = 256
_WARPS = THREADS // 32


def count_pairs(keys: Any, global_rows: int, layout: PairLayout, lists: PairLists) -> None:
    """See ``pair_lists.count_pairs``."""
    tables, chunks, blocks = _grid(global_rows, layout)
    if blocks == 0:
        lists.totals.fill(0)
        lists.flag.fill(0)
        return
    ranks, defines = layout.ranks, (("KEY", c_type(keys)),)
    load(SOURCE, "count_owners", defines)(
        blocks, THREADS, keys, layout.keys_of, layout.threshold, layout.owner, np.int32(ranks), _bits(ranks),
        np.int32(tables), np.uint32(global_rows), np.uint32(chunks), lists.counts, lists.flag,
        shared_bytes=4 * _WARPS * ranks,
    )  # fmt: skip
    load(SOURCE, "add_tiles", defines)(
        ranks * ranks, THREADS, lists.counts, np.uint32(tables * chunks), np.int32(ranks), lists.capacity,
        lists.totals, lists.flag,
    )  # fmt: skip


def list_pairs(keys: Any, global_rows: int, layout: PairLayout, lists: PairLists) -> None:
    """See ``pair_lists.list_pairs``."""
    tables, chunks, blocks = _grid(global_rows, layout)
    if blocks == 0:
        lists.asked.fill(-1)
        lists.given.fill(layout.own_pad)
        lists.replicated.fill(0)
        return
    ranks = layout.ranks
    load(SOURCE, "list_owners", (("KEY", c_type(keys)),))(
        blocks, THREADS, keys, layout.keys_of, layout.threshold, layout.owner, layout.frequent_start,
        layout.own_start, layout.place, layout.frequent_pad, np.int32(layout.num_places), np.int32(ranks),
        _bits(ranks), np.int32(layout.rank), np.int32(layout.own_pad), np.int32(tables), np.uint32(global_rows),
        np.uint32(chunks), lists.capacity, lists.asked_start, layout.chunk_of, lists.counts, lists.totals,
        lists.asked, lists.given, lists.local, lists.sources, lists.slots, np.int32(len(lists.sources) > 0),
        lists.frequent, lists.replicated, lists.own, np.int32(len(lists.own) > 0), lists.touched,
        layout.relay_row_start, lists.relay_start, lists.relay, np.int32(len(lists.relay) > 0),
        shared_bytes=4 * _WARPS * ranks,
    )  # fmt: skip


def _grid(global_rows: int, layout: PairLayout) -> tuple[int, int, int]:
    """Tables, tiles of a table and a rank, and blocks."""
    tables, chunks = len(layout.threshold), tiles_of(share_of(global_rows, layout.ranks, 0))
    return tables, chunks, -(-layout.ranks * tables * chunks // _WARPS)


def _bits(ranks: int) -> Any:
    """Of 0 .. W."""
    return np.int32(ranks.bit_length())
