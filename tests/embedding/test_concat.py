"""Pooling concat: every key of a bag is a feature of its own, held against plain indexing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hybrid_cases as hc
import numpy as np
import pytest
from rank_threads import run_ranks

from dlrm.errors import ConfigError, DataError
from embedding.comm import SingleComm
from embedding.jagged import Jagged
from embedding.placement import TableSpec, places_of
from embedding.topology import share_of, start_of

CASE = hc.HybridCase(
    seed=0, rows=(50, 3, 40), batches=(23,), dim=6, hotness=4, kind="sgd", poolings=("concat", "mean", "concat"),
    kinds=("hybrid", "table_wise", "column_wise"), weighted=True,
)  # fmt: skip


def test_places_follow_each_other_by_the_keys_of_a_bag() -> None:
    specs = [
        TableSpec(name=name, rows=9, dim=2, hotness=hotness, pooling=pooling)  # type: ignore[arg-type]
        for name, hotness, pooling in (("a", 3, "concat"), ("b", 5, "sum"), ("c", 1, "concat"), ("d", 2, "concat"))
    ]
    assert places_of(specs, 1) == ([1, 4, 5, 6], 8)
    assert places_of([], 1) == ([], 1)
    with pytest.raises(ConfigError, match=r"table 'a': hotness 2.5 with pooling concat"):
        replace(specs[0], hotness=2.5)


@pytest.mark.parametrize("ranks", [1, 3])
def test_vectors_and_updates_are_those_of_plain_indexing(ranks: int, seed: int) -> None:
    """SGD: w -= 0.1 * the sum over keys of weight * gradient of the key's own feature."""
    case = replace(CASE, seed=seed)
    outcomes = run_ranks(ranks, lambda comm: hc.train(case, comm))
    rng = np.random.default_rng(seed)
    batch = hc.draw(case, rng, 23)
    gradient = rng.standard_normal((23, 1 + 4 + 1 + 4, 6)) / 23
    embedding = hc.build(case, SingleComm())
    start = {shard.table: shard.weight.copy() for shard in embedding.shards()}
    vectors = np.concatenate([outcome.vectors[0] for outcome in outcomes])
    assert vectors.shape == (23, 9, 6)
    tables = hc.whole_tables(case, outcomes)
    for table, place in ((0, 0), (2, 5)):
        bags = slice(int(batch.offsets[table * 23]), int(batch.offsets[(table + 1) * 23]))
        keys, weights = batch.keys[bags].reshape(23, 4), batch.weights[bags].reshape(23, 4, 1).astype(np.float64)
        first = start[f"t{table}"]
        np.testing.assert_allclose(vectors[:, place : place + 4], first[keys] * weights, rtol=1e-12, atol=1e-14)
        expected = first.copy()
        np.add.at(expected, keys, -0.1 * weights * gradient[:, 1 + place : 5 + place])
        np.testing.assert_allclose(tables[f"t{table}.weight"], expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_bag_of_another_length_is_refused_with_its_table_and_row(ranks: int) -> None:
    lengths = np.full((3, 5), 4)
    lengths[2, 4] = 3  # of the last rank

    def work(comm: Any) -> None:
        rows = share_of(5, comm.size, comm.rank)
        own = lengths[:, start_of(5, comm.size, comm.rank) :][:, :rows]
        offsets = np.concatenate([[0], np.cumsum(own)]).astype(np.int64)
        embedding = hc.build(CASE, comm)
        buffers = embedding.buffers(rows, np.zeros((rows, 10, 6)))
        embedding.input_dist(Jagged(np.zeros(offsets[-1], np.int32), offsets, None, 3, rows), buffers, 5)

    who = "^rank 1: " if ranks > 1 else "^"
    sentence = who + r"table 't2': row \d of .* holds 3 keys, but with pooling concat every row holds 4"
    with pytest.raises(DataError, match=sentence):
        run_ranks(ranks, work)
