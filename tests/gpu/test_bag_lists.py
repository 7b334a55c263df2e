"""Where keys of bags come to lie among features, and what their vectors and gradients are made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dlrm.device import HostDevice
from embedding import bag_lists_cuda
from embedding.bag_lists import BagLayout, GlobalBags, Pooling, list_bags, spread_keys
from embedding.placement import TableSpec
from embedding.topology import share_of

HOTNESS, POOLING, FEATURES = (1, 4, 3, 40), ("sum", "mean", "concat", "mean"), (1, 3, 3, 22)


class Host:
    array = staticmethod(np.array)
    host = staticmethod(np.asarray)


def layout_on(machine: Any, ranks: int, rank: int) -> BagLayout:
    specs = [
        TableSpec(name=str(t), rows=500, dim=4, hotness=HOTNESS[t], pooling=POOLING[t])  # type: ignore[arg-type]
        for t in range(len(HOTNESS))
    ]
    host = BagLayout.create(specs, FEATURES, first=1, ranks=ranks, rank=rank, device=HostDevice())
    moved = {name: machine.array(getattr(host, name)) for name in ("first_feature", "table", "vector", "mean")}
    numbers = {name: getattr(host, name) for name in ("features", "vectors", "first", "ranks", "rank")}
    return BagLayout(**moved, **numbers)


@pytest.mark.parametrize(
    ("ranks", "rank", "rows", "key_dtype", "weighted", "trains", "room"),
    [(2, 1, 300, np.int32, True, True, 2), (3, 0, 100, np.int64, False, True, 2), (2, 0, 40, np.int32, True, False, 2),
     (4, 3, 3, np.int32, False, True, 2), (2, 1, 90, np.int32, True, True, 0.5)],
)  # fmt: skip
def test_keys_are_where_the_reference_has_them(
    machine: Any, ranks: int, rank: int, rows: int, key_dtype: Any, weighted: bool, trains: bool, room: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    lengths = [
        np.full(rows, hotness) if pooling == "concat" else rng.integers(0, hotness + 1, rows)
        for hotness, pooling in zip(HOTNESS, POOLING, strict=True)
    ]
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    keys = rng.integers(0, 500, int(offsets[-1]) + 5).astype(key_dtype)
    weights = rng.standard_normal(len(keys) if weighted else 0).astype(np.float32)
    places = int(room * share_of(rows, ranks, 0)) + 1
    found = []
    for where in (machine, Host):
        layout = layout_on(where, ranks, rank)
        bags = GlobalBags(where.array(keys), where.array(offsets), where.array(weights))
        size, own = places * layout.features, share_of(rows, ranks, rank)
        spread = where.array(np.full(size * ranks, 77, key_dtype))
        pooled = Pooling(
            where.array(np.full(size, -7, np.int32)), where.array(np.full(layout.vectors * own + 1, -7, np.int64)),
            where.array(np.full(size if weighted else 0, np.nan, np.float32)),
        )  # fmt: skip
        shares = Pooling(
            where.array(np.full(size, -7, np.int32)), where.array(np.arange(size + 1)),
            where.array(np.full(size, np.nan, np.float32)),
        )  # fmt: skip
        module: Any = bag_lists_cuda if where is machine else None
        spreading, listing = (module.spread_keys, module.list_bags) if module else (spread_keys, list_bags)
        over = where.array(np.full(1, 5, np.int32))
        spreading(bags, rows, layout, spread, over)
        listing(bags, rows, layout, places, pooled, shares if trains else None)
        arrays = (spread, pooled.keys, pooled.offsets, pooled.weights, shares.keys, shares.weights, over)
        found.append([where.host(array) for array in arrays])
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)
    assert found[0][-1][0] == (room < 1)
    if room < 1:
        return
    count = int(found[0][2][-1])
    assert sorted(set(found[0][1][:count])) == sorted(found[0][1][:count])  # every key has a place of its own
    assert (found[0][0] >= 0).sum() == offsets[-1]
