"""What one table costs in a step, by its placement: bytes and work. ``docs/plan.md`` derives the formulas.

An *asker* is a rank that needs rows for its share of the batch; an *owner* is the rank that holds them. All askers
are alike, so the traffic of a table is known from one of them.

Shapes: W ranks, N nodes, L = W / N ranks of a node, B = G / W rows of a rank, G rows of the global batch, D columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embedding.frequency import Frequency
from embedding.links import LinkRates
from embedding.placement import Placement, TableSpec
from embedding.reduce_way import dense_bytes, touched_bytes

Floats = NDArray[np.float64]

LENGTH_BYTES = 4
"""Of the length of one bag, where bags have different lengths."""
_PASSES = 3
"""Times that a row's bytes move where it is looked up and updated: read, gradient read, written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A step's size, the same for all tables.

    Attributes:
        ranks: W.
        nodes: N.
        batch_size: G.
        itemsize: bytes of a number of a table.
        exchange_itemsize: bytes of a number of a vector between ranks.
        key_itemsize: bytes of a key of pooled tables.
        id_itemsize: bytes of a row's number where rows are asked for.
        jagged: bags have different lengths.
        weighted: keys have weights.
        captured: steps of fixed sizes (``captured_exchange``): rows of all tables travel together and no keys do,
            gradients of de-duplicated rows are summed first, gradients of a node before they cross whatever their
            precision, and those of replicated rows are float32.
    """

    ranks: int
    nodes: int = 1
    batch_size: int
    itemsize: int = 4
    exchange_itemsize: int = 4
    key_itemsize: int = 4
    id_itemsize: int = 4
    jagged: bool = False
    weighted: bool = False
    captured: bool = False

    @property
    def share(self) -> float:
        """B."""
        return self.batch_size / self.ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class TableCost:
    """One table under one placement, in expectation.

    Attributes:
        keys: bytes of keys from one asker to all owners, itself included.
        vectors: bytes of vectors from all owners to one asker; flat, gradients are as many.
        node_gradients: bytes of gradients from one node to all owners, once they are summed inside the node.
        reduce_touched: bytes of the buffers that every rank hands to all-reduces, the touched way (``reduce_way``).
        reduce_dense: the same the dense way.
        touched_rows: replicated rows that the global batch looks up.
        frequent_share: part of the look-ups that are of replicated rows.
        asker_s: a rank's work as asker.
        owner_s: work of all owners together.
        beside_vectors_s: a rank's work while vectors of other tables travel.
        beside_gradients_s: the same of gradients.
    """

    keys: float = 0.0
    vectors: float = 0.0
    node_gradients: float = 0.0
    reduce_touched: float = 0.0
    reduce_dense: float = 0.0
    touched_rows: float = 0.0
    frequent_share: float = 0.0
    asker_s: float = 0.0
    owner_s: float = 0.0
    beside_vectors_s: float = 0.0
    beside_gradients_s: float = 0.0


class TableDemand:
    """What one table is asked for in a step, from which every placement's cost follows.

    Attributes:
        spec: the table.
        frequency: of its rows.
        hotness: mean keys of a bag.
    """

    def __init__(
        self, spec: TableSpec, frequency: Frequency, hotness: float, workload: Workload, links: LinkRates
    ) -> None:
        """Work out cumulative look-ups and distinct rows."""
        self.spec, self.frequency, self.hotness = spec, frequency, hotness
        self._work, self._rates = workload, links.work
        self._draws = workload.share * hotness
        self._share = frequency.shares()
        self._distinct = frequency.distinct(self._draws)
        per_node = workload.batch_size / workload.nodes * hotness
        self._node = frequency.distinct(per_node) if workload.nodes > 1 else self._distinct
        self._union = frequency.distinct(workload.batch_size * hotness)

    def cost(self, placement: Placement) -> TableCost:
        """Expected cost of a step with this placement; that of its owners does not depend on who they are."""
        if self._work.ranks == 1:
            return TableCost(asker_s=self._seconds(_PASSES * self._draws), frequent_share=0.0)
        return self._pooled(placement) if placement.pooled and not self._work.captured else self._rows(placement)

    def _pooled(self, placement: Placement) -> TableCost:
        work, rows = self._work, self._work.share * self.spec.num_vectors
        parts = len(placement.owners) or 1
        keys = self._draws * (work.key_itemsize + 4 * work.weighted)
        keys += LENGTH_BYTES * rows * (work.jagged and self.spec.bag_keys is None)
        return TableCost(
            keys=parts * keys,
            vectors=rows * self.spec.dim * work.exchange_itemsize,
            node_gradients=rows * work.ranks / work.nodes * self.spec.dim * work.exchange_itemsize,
            asker_s=self._seconds(2 * rows),
            owner_s=self._seconds(_PASSES * work.ranks * self._draws),
        )

    def _rows(self, placement: Placement) -> TableCost:
        work, threshold = self._work, placement.threshold
        frequent = self.frequency.at(self._share, threshold)
        local = self._draws * frequent
        asked = self._draws - local
        sent = asked
        # A table that lies here whole is pooled, and its gradients are summed, while those of others travel.
        beside = self._seconds(local) if placement.kind == "replicated" else 0.0
        asker = self._seconds(2 * (local + asked)) - 2 * beside
        if placement.deduplicate:
            sent = self._beyond(self._distinct, threshold)
            asker += asked * self._rates.deduplicate_s
            if work.captured:  # gradients are packed, and their sums written
                asker += self._seconds(asked + sent)
        touched, dense, union = 0.0, 0.0, 0.0
        if threshold:
            union = min(float(threshold), self.frequency.at(self._union, threshold))
            touched = touched_bytes(threshold, union, self.spec.dim, work.itemsize)
            dense = float(dense_bytes(threshold, self.spec.dim, work.itemsize))
            if work.captured:
                touched, dense = 4.0 * union * self.spec.dim, 4.0 * threshold * self.spec.dim
            asker += self._seconds(_PASSES * (threshold if work.captured else union))
        return TableCost(
            keys=0.0 if work.captured else sent * work.id_itemsize,
            vectors=sent * self.spec.dim * work.exchange_itemsize,
            node_gradients=self._beyond(self._node, threshold) * self.spec.dim * work.exchange_itemsize,
            reduce_touched=touched,
            reduce_dense=dense,
            touched_rows=union,
            frequent_share=frequent,
            asker_s=asker,
            owner_s=self._seconds(_PASSES * work.ranks * sent),
            beside_vectors_s=beside,
            beside_gradients_s=beside,
        )

    def _beyond(self, cumulative: Floats, threshold: int) -> float:
        return float(cumulative[-1]) - self.frequency.at(cumulative, threshold)

    def _seconds(self, rows: float) -> float:
        return rows * self.spec.dim * self._work.itemsize / self._rates.rows_bytes_per_s
