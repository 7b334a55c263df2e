"""Launches of the kernels that give keys of bags their places; references in ``bag_lists.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dlrm.nvrtc import c_type, load
from embedding.bag_lists import BagLayout, GlobalBags, Pooling
from embedding.topology import share_of, start_of

SOURCE = Path(__file__).with_name("bag_lists.cu")
THREADS = 256


def spread_keys(bags: GlobalBags, global_rows: int, layout: BagLayout, spread: Any, over: Any) -> None:
    """See ``bag_lists.spread_keys``."""
    places = len(spread) // (layout.features * layout.ranks)
    over.fill(0)
    load(SOURCE, "spread_keys", (("KEY", c_type(bags.keys)),))(
        -(-places // THREADS) * layout.features * layout.ranks, THREADS, bags.keys, bags.offsets,
        np.uint32(global_rows), layout.first_feature, layout.table, np.uint32(layout.ranks), np.uint32(places), spread,
        over,
    )  # fmt: skip


def list_bags(
    bags: GlobalBags, global_rows: int, layout: BagLayout, places: int, pooled: Pooling, shares: Pooling | None
) -> None:
    """See ``bag_lists.list_bags``."""
    tables, rows = len(layout.mean), share_of(global_rows, layout.ranks, layout.rank)
    batch = (bags.offsets, np.uint32(global_rows), np.uint32(start_of(global_rows, layout.ranks, layout.rank)))
    shape = (np.uint32(rows), np.int32(tables), layout.vector)
    defines = (("KEY", c_type(bags.keys)),)
    load(SOURCE, "end_bags", defines)(
        -(-(rows * layout.vectors + 1) // THREADS), THREADS, *batch, *shape,
        np.int64(layout.features * places), pooled.offsets, shared_bytes=8 * tables,
    )  # fmt: skip
    weighted, trains = np.int32(len(bags.weights) > 0), np.int32(shares is not None)
    back = pooled if shares is None else shares
    load(SOURCE, "list_bags", defines)(
        -(-places // THREADS) * layout.features, THREADS, *batch, *shape, layout.first_feature, layout.table,
        layout.mean, np.uint32(layout.features), np.uint32(places), np.uint32(layout.first),
        np.uint32(layout.first + layout.vectors), bags.weights, weighted, pooled.keys, pooled.weights, back.keys,
        back.weights, trains, shared_bytes=8 * tables,
    )  # fmt: skip
