"""How much room bags of keys need over several GPUs, from some rows of the data.

Shapes: T tables, W ranks, N rows looked at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dlrm.device import Array
from embedding.captured_placement import SIGMAS, MostRows, most_distinct
from embedding.column_groups import uncut
from embedding.jagged import Jagged
from embedding.placement import Plan
from embedding.topology import start_of


@dataclass(slots=True)
class BagSample:
    """Bags of some rows.

    Attributes:
        keys: of each table, those of all rows.
        lengths: of each table [N], keys of a row.
    """

    keys: list[Array]
    lengths: list[Array]

    @classmethod
    def join(cls, batches: Sequence[Jagged], num_tables: int) -> BagSample:
        """The rows of whole batches, one after the other."""
        keys: list[list[Array]] = [[] for _ in range(num_tables)]
        lengths: list[list[Array]] = [[] for _ in range(num_tables)]
        for batch in batches:
            ends = offsets_of(batch)
            for table in range(num_tables):
                own = ends[table * batch.num_rows : (table + 1) * batch.num_rows + 1]
                keys[table].append(batch.keys[own[0] : own[-1]])
                lengths[table].append(np.diff(own))
        nothing = np.empty(0, np.int64)
        return cls([np.concatenate([nothing, *k]) for k in keys], [np.concatenate([nothing, *n]) for n in lengths])

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.lengths[0])

    def by_node(self, nodes: Sequence[Sequence[int]], ranks: int, rows: int) -> list[list[Array]]:
        """The keys of each table that each node's ranks have of the first ``rows`` rows, which are a batch."""
        rank_of = np.searchsorted([start_of(rows, ranks, rank) for rank in range(ranks)], np.arange(rows), "right") - 1
        parts = []
        for members in nodes:
            mine = np.isin(rank_of, members)
            chosen = [np.repeat(np.pad(mine, (0, self.num_rows - rows)), lengths) for lengths in self.lengths]
            parts.append([keys[own] for keys, own in zip(self.keys, chosen, strict=True)])
        return parts


def offsets_of(keys: Jagged) -> Array:
    """[T * B + 1] int64, also of one key a bag."""
    return np.arange(keys.num_tables * keys.num_rows + 1) if keys.offsets is None else keys.offsets


@dataclass(frozen=True, slots=True)
class BagRoom:
    """What decides how long lists are where rows have bags, the same on every rank.

    Attributes:
        features: of each table, how many features of one key a row its keys are spread over.
        mean: [W] rows of each owner that a row of the batch takes.
        variance: [W] of that.
        lengths: [T] keys of a table that a row of the batch has.
        spread: [T] variance of that.
        most: rows that a batch asks for; ``None``: not known.
        sigmas: standard deviations above what is expected.
    """

    features: tuple[int, ...]
    mean: Array
    variance: Array
    lengths: Array
    spread: Array
    most: MostRows | None = None
    sigmas: float = SIGMAS

    @classmethod
    def measure(
        cls, plan: Plan, sample: BagSample, batch: int, nodes: Sequence[Sequence[int]] | None, sigmas: float = SIGMAS
    ) -> BagRoom:
        """Look at some rows.

        Args:
            plan: placements of all tables.
            sample: the rows.
            batch: rows of the largest global batch.
            nodes: the ranks of each node, where rows go by node.
            sigmas: standard deviations above what is expected.
        """
        features, lengths = [], np.zeros((2, len(plan.specs)))
        for table, (spec, own) in enumerate(zip(plan.specs, sample.lengths, strict=True)):
            lengths[:, table] = (own.mean(), own.var()) if len(own) else (1, 0)
            features.append(spec.bag_keys or max(1, math.ceil(lengths[0, table])))
        taken = _rows_taken(plan, sample)
        most = None
        if sample.num_rows >= batch:

            def distinct_of(groups: Sequence[Sequence[int]]) -> tuple[int, ...]:
                return most_distinct(plan, sample.by_node(groups, plan.ranks, batch), sigmas)

            most = MostRows.measure(plan, sample.keys, nodes, distinct_of, sigmas)
        return cls(tuple(features), taken.mean(axis=0), taken.var(axis=0), lengths[0], lengths[1], most, sigmas)

    def slots(self, rows: int) -> int:
        """Places of each feature for ``rows`` rows of a rank: as many as these have where all bags are full."""
        keys = rows * self.lengths + self.sigmas * np.sqrt(rows * self.spread)
        return max(1, int(np.ceil(keys / self.features - 1e-6).max()))

    def capacities(self, rows: int, factor: float) -> tuple[int, ...]:
        """How many rows each rank can send to one other in a batch.

        Args:
            rows: most rows of one rank.
            factor: how many times as much there is to be.
        """
        most = rows * self.mean + self.sigmas * np.sqrt(rows * self.variance)
        return tuple(max(0, math.ceil(factor * own - 1e-6)) for own in most.tolist())


def _rows_taken(plan: Plan, sample: BagSample) -> Array:
    """[N, W] rows of each owner that each row of the sample takes; at least one row of zeros."""
    rows, ranks = sample.num_rows, plan.ranks
    taken = np.zeros((max(1, rows), ranks))
    for placed, keys, lengths in zip(plan.placements, sample.keys, sample.lengths, strict=True):
        if (placement := uncut(placed)) is None:
            continue  # its lists have room for all features
        beyond = np.asarray(keys, np.int64) - placement.threshold
        owner = np.full(len(beyond), placement.owner) if placement.kind == "table_wise" else beyond % ranks
        cell = np.repeat(np.arange(rows), lengths) * ranks + owner
        taken += np.bincount(cell[beyond >= 0], minlength=taken.size).reshape(taken.shape)
    return taken
