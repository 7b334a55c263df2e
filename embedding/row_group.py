"""Tables whose rows travel: the rank that looks rows up pools them, and sums their gradients before these travel.

Frequent rows lie on every rank and need no exchange (``replicated.py``). Each other row has one owner. A rank lists
the rows that it needs of every owner, each distinct one once where the table is de-duplicated; owners send the rows,
and later get one gradient for each row of the list. They add up what comes in the order of the ranks and update each
row once.

Shapes: W ranks, T tables of this group, B rows of this rank, G rows of the global batch, K keys of this rank, H
replicated rows, N rows that this rank asks for, M rows that it is asked for, D columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dlrm.config import OptimizerConfig
from dlrm.device import Array, Device
from dlrm.errors import ConfigError
from embedding.all_reduce import AllReduce
from embedding.all_to_all import AllToAll
from embedding.batch import check_shares, check_trains
from embedding.buffers import NO_OFFSETS, NO_WEIGHTS, Finish
from embedding.comm import Comm
from embedding.frequent_rows import FrequentRows, Homes, check_lists
from embedding.jagged import Jagged
from embedding.lookup import gather_pool
from embedding.placement import Placement, TableSpec
from embedding.reduce_way import ReduceWay
from embedding.replicated import ReplicatedRows
from embedding.row_buffers import RowBuffers
from embedding.row_layout import row_layout, rows_of
from embedding.row_route import RowRoute
from embedding.slots import ALL, ELSEWHERE, HERE, pool_slots, route_keys, slots_of_tables, sum_slots
from embedding.sparse_optim import UpdateScratch, update_rows
from embedding.table import Part, Shard, create_shards, with_touched
from embedding.topology import share_of
from embedding.wire import Wire

_HEADER = 3
"""Numbers that ranks tell each other first: rows, global rows, rows asked for."""

_MOST_SLOTS = 1 << 30
"""More replicated rows than this need 64-bit slots; as many are left for what is received."""

_PIECE_BAGS = 4096
"""Bags pooled, or summed, between two looks at what is under way: some hundred microseconds."""

_ONE_TABLE = np.zeros(1, np.int64)
_SUM = np.zeros(1, np.bool_)


class RowGroup:
    """Look-up, exchange and update of ``row_wise``, ``hybrid``, ``replicated`` and de-duplicated tables."""

    def __init__(
        self,
        *,
        specs: Sequence[TableSpec],
        placements: Sequence[Placement],
        places: Sequence[int],
        comm: Comm,
        all_to_all: AllToAll,
        device: Device,
        optimizer: OptimizerConfig,
        wire: Wire,
        seed: int | None,
        way: ReduceWay,
        all_reduce: AllReduce | None = None,
        lists: Mapping[str, Array] | None = None,
        bags_per_row: int = 1,
    ) -> None:
        """Allocate and initialise what this rank holds; collective where frequent rows are listed.

        Args:
            specs: the group's tables, of one dim.
            placements: of each.
            places: place of each in ``vectors``.
            comm: the embedding lane's ranks.
            all_to_all: how keys, rows and gradients travel among them.
            device: where everything lies.
            optimizer: of the tables.
            wire: how rows and gradients look on the way; has the tables' dtype.
            seed: of the run.
            way: how the replicated rows' gradients are summed.
            all_reduce: what sums the replicated rows' gradients; ``None``: in one step.
            lists: see ``HybridEmbedding``.
            bags_per_row: bags of each table that a row of the batch has.

        Raises:
            ConfigError: a listed table has no list that fits.
        """
        self._comm, self._all_to_all, self._device, self._wire = comm, all_to_all, device, wire
        self._optimizer, self._bags_per_row, self._dtype, self._dim = optimizer, bags_per_row, wire.dtype, specs[0].dim
        self._place = np.array(places, np.int64)
        self._mean = np.array([spec.pooling == "mean" for spec in specs], np.bool_)
        columns = range(self._dim)
        self._replicated = ReplicatedRows(
            [Part(spec, range(p.threshold), columns, True) for spec, p in zip(specs, placements, strict=True)],
            self._dim,
            comm=comm,
            device=device,
            optimizer=optimizer,
            dtype=self._dtype,
            seed=seed,
            way=way,
            all_reduce=all_reduce,
        )
        self._layout = row_layout(specs, placements, comm.size)
        self._sides = [
            HERE if p.threshold == spec.rows else ALL if p.threshold else ELSEWHERE
            for spec, p in zip(specs, placements, strict=True)
        ]
        owned = [
            Part(spec, rows_of(spec, placement, comm.size, comm.rank), columns)
            for spec, placement in zip(specs, placements, strict=True)
        ]
        self._store = create_shards(owned, self._dim, device=device, optimizer=optimizer, dtype=self._dtype, seed=seed)
        self._scratch = UpdateScratch.create(len(self._store.weight))
        self._travels = any(placement.threshold < spec.rows for spec, placement in zip(specs, placements, strict=True))
        self._slot_dtype = np.int32 if self._layout.frequent < _MOST_SLOTS else np.int64
        most = sum(spec.rows for spec in specs)  # of one owner
        self._id_dtype = np.int32 if most < 2**31 else np.int64
        rows = check_lists(specs, placements, lists or {})
        self._listed = {spec.name for spec, own in zip(specs, rows, strict=True) if own is not None}
        self._frequent = FrequentRows.create(specs, rows)
        base = self._layout.base[comm.rank]
        self._homes = Homes.create(rows, self._layout.frequent_start, base, comm.size, comm.rank)
        self.spread()

    def shards(self) -> list[Shard]:
        """What this rank holds: replicated rows, then its own; for those that are listed stand their homes."""
        own = with_touched(self._store.shards, self._scratch.touched)
        replicated = [shard for shard in self._replicated.shards() if shard.table not in self._listed]
        return [*replicated, *(shard for shard in own if len(shard.rows))]

    def settle(self) -> None:
        """See ``HybridEmbedding``."""
        if self._listed:
            own = [self._store.weight, *self._store.state.values(), self._scratch.touched]
            self._homes.settle([*self._replicated.arrays(), self._replicated.touched], own)

    def spread(self) -> None:
        """See ``HybridEmbedding``."""
        if self._listed:
            own = [self._store.weight, *self._store.state.values()]
            self._homes.spread(self._replicated.arrays(), own, self._comm)

    def track_touched(self) -> None:
        """Note from now on which rows are updated."""
        self._scratch.track_touched()
        self._replicated.track_touched()

    def clear_touched(self) -> None:
        """Forget which rows were updated."""
        self._scratch.clear_touched()
        self._replicated.clear_touched()

    def buffers(self, capacity: int, vectors: Array, grad_vectors: Array | None = None) -> RowBuffers:
        """Room for one batch in flight; arguments as for ``HybridEmbedding.buffers``."""
        return RowBuffers(capacity, vectors, grad_vectors)

    def distribute(self, keys: Jagged, buffers: RowBuffers, global_rows: int) -> None:
        """Ask the owners for rows, and find the replicated rows that the global batch touches.

        Args:
            keys: of this group's tables, already checked; used until the batch is done.
            buffers: the batch's.
            global_rows: G.

        Raises:
            CommError: the ranks disagree about the batch.
        """
        if self._listed:
            keys = self._frequent.place(keys, buffers, device=self._device)
        buffers.keys, buffers.num_rows, buffers.global_rows = keys, keys.num_rows, global_rows
        count = len(keys.keys)
        buffers.slots = buffers.room("slots", self._slot_dtype, count)
        wanted = buffers.room("wanted", self._id_dtype, count)
        asked = route_keys(
            keys.keys,
            _offsets(keys),
            keys.num_rows,
            self._layout,
            buffers.slots,
            wanted,
            buffers.room("destination", np.int32, count),
            device=self._device,
        )
        buffers.asked = asked.tolist()
        buffers.sent = {"input_dist": 0, "output_dist": 0, "grad_dist": 0, "all_reduce": 0}
        # The ranks find the touched rows while they tell each other what they ask for.
        touched = None
        if buffers.grad_vectors is not None:
            touched = self._replicated.start_touched(buffers, buffers.slots)
        if self._travels:
            self._ask(wanted[: sum(buffers.asked)], buffers)
        if touched is not None:
            buffers.touched = touched()

    def _ask(self, wanted: Array, buffers: RowBuffers) -> None:
        size, rows, total = self._comm.size, buffers.num_rows // self._bags_per_row, buffers.global_rows
        route = RowRoute(self._all_to_all, wanted, buffers.asked, self._device, note=(rows, total))
        check_shares(route.notes, [share_of(total, size, rank) for rank in range(size)], total, self._comm.rank)
        buffers.route, buffers.ids = route, route.ids
        buffers.sent["input_dist"] = self._leaving([1] * size, _HEADER * 8)
        buffers.sent["input_dist"] += self._leaving(buffers.asked, wanted.itemsize)

    def lookup(self, buffers: RowBuffers) -> None:
        """Gather the rows that the ranks asked for."""
        if not len(buffers.ids):
            return
        rows = buffers.rows("owner_rows", self._dtype, len(buffers.ids), self._dim)
        gather_pool(
            self._store.weight,
            _ONE_TABLE,
            buffers.ids,
            NO_OFFSETS,
            NO_WEIGHTS,
            _SUM,
            _ONE_TABLE,
            len(rows),
            rows[:, None],
            device=self._device,
        )

    def start_output_dist(self, buffers: RowBuffers) -> Finish:
        """Start to send the rows; what is returned waits for them and pools, first the bags that need none of them.

        The end reads the replicated rows, so that it comes before the next update.
        """
        keys = given(buffers.keys)
        received = buffers.rows("received", self._dtype, sum(buffers.asked), self._dim)
        arrive = self._fetch(buffers.rows("owner_rows", self._dtype, len(buffers.ids), self._dim), received, buffers)

        def pool(pieces: Sequence[tuple[range, int]]) -> None:
            for tables, side in pieces:
                slots, offsets, weights = slots_of_tables(
                    tables, buffers.num_rows, buffers.slots, _offsets(keys), _weights(keys)
                )
                pool_slots(
                    self._replicated.weight,
                    received,
                    slots,
                    offsets,
                    weights,
                    self._mean[tables.start : tables.stop],
                    self._place[tables.start : tables.stop],
                    buffers.num_rows,
                    buffers.vectors,
                    device=self._device,
                    side=side,
                )
                self._comm.progress()

        def finish() -> None:
            pool(self._pieces(HERE, buffers.num_rows))
            arrive()
            pool(self._pieces(ELSEWHERE, buffers.num_rows))

        return finish

    def _pieces(self, side: int, num_rows: int) -> list[tuple[range, int]]:
        """Consecutive tables of which something lies on this side, in pieces of some bags; which of their rows."""
        most = max(1, _PIECE_BAGS // max(1, num_rows))
        pieces: list[tuple[range, int]] = []
        for table, lies in enumerate(self._sides):
            if lies not in (ALL, side):
                continue
            which = side if lies == ALL else ALL  # all of a table that lies on one side
            last, same = pieces[-1] if pieces else (range(0), which)
            if pieces and last.stop == table and same == which and len(last) < most:
                pieces[-1] = range(last.start, table + 1), which
            else:
                pieces.append((range(table, table + 1), which))
        return pieces

    def start_grad_dist(self, buffers: RowBuffers) -> Finish:
        """Sum this rank's gradients by row and start to send them; what is returned waits.

        Rows that travel come first: the others are summed while these are under way.
        """
        check_trains(buffers.grad_vectors)
        keys = given(buffers.keys)
        frequent_sum, compact = self._replicated.sums(buffers.touched)
        going = buffers.rows("received", self._dtype, sum(buffers.asked), self._dim)
        frequent_sum.fill(0)
        going.fill(0)

        def add(pieces: Sequence[tuple[range, int]]) -> None:
            for tables, side in pieces:
                slots, offsets, weights = slots_of_tables(
                    tables, buffers.num_rows, buffers.slots, _offsets(keys), _weights(keys)
                )
                sum_slots(
                    buffers.grad_vectors,
                    slots,
                    offsets,
                    weights,
                    self._mean[tables.start : tables.stop],
                    self._place[tables.start : tables.stop],
                    buffers.num_rows,
                    compact,
                    self._layout.frequent,
                    frequent_sum,
                    going,
                    device=self._device,
                    side=side,
                    fresh=False,
                )
                self._comm.progress()

        add(self._pieces(ELSEWHERE, buffers.num_rows))
        coming = buffers.rows("owner_rows", self._dtype, len(buffers.ids), self._dim)
        arrive = self._send_gradients(going, coming, buffers)
        add(self._pieces(HERE, buffers.num_rows))
        event = self._replicated.start_reduce(buffers, buffers.slots, buffers.touched)

        def finish() -> None:
            arrive()
            if event is not None:
                event.wait()

        return finish

    def sparse_update(self, buffers: RowBuffers, lr: float, step: int) -> None:
        """Update the replicated rows and this rank's own that the global batch touched."""
        if len(buffers.ids):
            update_rows(
                self._optimizer,
                self._store.weight,
                self._store.state,
                _ONE_TABLE,
                buffers.ids,
                NO_OFFSETS,
                NO_WEIGHTS,
                _SUM,
                _ONE_TABLE,
                len(buffers.ids),
                buffers.rows("owner_rows", self._dtype, len(buffers.ids), self._dim)[:, None],
                lr=lr,
                step=step,
                scratch=self._scratch,
                device=self._device,
            )
        if self._layout.frequent:
            self._replicated.update(buffers.touched, lr, step)

    def _fetch(self, rows: Array, out: Array, buffers: RowBuffers) -> Finish:
        """Start to send the rows that were asked for; what is returned waits, and has this rank's in ``out``."""
        route = buffers.route
        if route is None:
            return _arrived
        buffers.sent["output_dist"] = route.num_elsewhere * self._wire.row_bytes(self._dim)
        if self._wire.plain:
            return route.start_fetch(rows, out)
        words = buffers.rows("words_send", np.uint16, len(rows), self._dim)
        arriving = buffers.rows("words_recv", np.uint16, len(out), self._dim)
        arrive = route.start_fetch(self._wire.encode(rows, words), arriving.view(np.uint8))

        def widen() -> None:
            arrive()
            self._wire.decode(arriving, out)

        return widen

    def _send_gradients(self, going: Array, coming: Array, buffers: RowBuffers) -> Finish:
        """Start to send gradients; what is returned waits, and has those of ``buffers.ids`` in ``coming``."""
        if buffers.route is None:
            return _arrived
        buffers.sent["grad_dist"] = self._leaving(buffers.asked, self._wire.row_bytes(self._dim))
        return buffers.route.start_send(going, coming, self._wire, self._wire.scale_of(buffers.global_rows))

    def _leaving(self, counts: list[int], itemsize: int) -> int:
        return (sum(counts) - counts[self._comm.rank]) * itemsize


def given(value: Any) -> Any:
    """What ``input_dist`` leaves.

    Raises:
        ConfigError: it has not been called.
    """
    if value is None:
        raise ConfigError("batch: input_dist has not been called; call it first")
    return value


def _arrived() -> None:
    """Nothing to wait for."""


def _offsets(keys: Jagged) -> Array:
    return NO_OFFSETS if keys.offsets is None else keys.offsets


def _weights(keys: Jagged) -> Array:
    return NO_WEIGHTS if keys.weights is None else keys.weights
