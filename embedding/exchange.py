"""What crosses ranks: keys to the owners of tables, pooled vectors back, gradients to the owners.

Everything is laid out so that one side of each exchange needs no packing. Shapes: W ranks, T tables, O tables that
this rank owns, B rows of this rank, G rows of the global batch (rank-major, so in global order), D columns, K keys.

- keys: rank r sends owner o the keys of o's tables, table-major; the owner sorts the pieces of all ranks into
  table-major bags of the global batch.
- vectors: the owner's pooled vectors [G, O, D] are the send buffer as they stand; rank r receives, owner after
  owner, [B, O, D], and scatters that into ``vectors[B, F, D]``.
- gradients: the same the other way round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dlrm.device import Array, Device
from embedding.batch import check_shares
from embedding.buffers import BatchBuffers, Finish
from embedding.comm import Comm
from embedding.jagged import Jagged
from embedding.topology import share_of
from embedding.wire import Wire

_HEADER = 5
"""Numbers that ranks tell each other first: jagged?, weighted?, rows, global rows, keys to come."""


@dataclass(slots=True)
class EmbeddingBuffers(BatchBuffers):
    """One batch of tables that lie whole on their owners.

    Attributes:
        owned: keys of this rank's tables for the global batch.
        owner_rows: [G * O or more, D] vectors, later gradients, on the owner's side.
        rank_rows: [capacity * T, D] the same on the receiving rank's side.
    """

    owned: Jagged | None = None
    owner_rows: Array | None = None
    rank_rows: Array | None = None


class Exchange:
    """The three exchanges of table-wise placement over one ``Comm``."""

    def __init__(
        self,
        owned_by: Sequence[Sequence[int]],
        comm: Comm,
        device: Device,
        places: Array,
        wire: Wire,
        bags_per_row: int = 1,
    ) -> None:
        """Lay out the index arithmetic that does not depend on the batch.

        Args:
            owned_by: the tables of each rank.
            comm: the embedding lane's ranks.
            device: where the arrays lie.
            places: [T] int64, place of each table in ``vectors``.
            wire: how vectors and gradients travel.
            bags_per_row: bags that a row of the batch has in each table.
        """
        self._comm = comm
        self._device = device
        self._wire = wire
        self._bags_per_row = bags_per_row
        self._order = np.array([table for tables in owned_by for table in tables], np.int64)
        self._owned = np.array([len(tables) for tables in owned_by], np.int64)
        before = np.cumsum(self._owned) - self._owned
        self._before = np.repeat(before, self._owned)
        self._count = np.repeat(self._owned, self._owned)
        self._place = places[self._order]
        self._mine = int(self._owned[comm.rank])

    def input_dist(self, keys: Jagged, buffers: EmbeddingBuffers) -> Jagged:
        """Send this rank's keys to the owners.

        Args:
            keys: of all tables for this rank's rows, already checked.
            buffers: ``num_rows`` and ``global_rows`` are set; gets its ``sent["input_dist"]``.

        Returns:
            Keys of this rank's tables for the global batch; its arrays belong to ``buffers``.

        Raises:
            CommError: the ranks disagree about the batch.
        """
        comm, rows = self._comm, keys.num_rows
        shares = self._shares(buffers)
        starts = keys.offsets[::rows] if keys.offsets is not None and rows else np.arange(keys.num_tables + 1) * rows
        key_counts = np.diff(starts)[: keys.num_tables]
        to_owner = np.array([int(part.sum()) for part in self._by_owner(key_counts[self._order])], np.int64)
        header = self._swap_headers(keys, to_owner, buffers, shares)
        jagged, weighted = bool(header[:, 0].any()), bool(header[:, 1].any())
        offsets = self._swap_lengths(keys, buffers, shares) if jagged else None
        mine = np.array(shares, np.int64)[:, None]  # keys of (rank, own table)
        bags = buffers.global_rows * self._bags_per_row
        target = np.cumsum(mine, axis=0) - mine + np.arange(self._mine) * bags
        lengths = np.broadcast_to(mine, (comm.size, self._mine))
        if offsets is not None:
            lengths = offsets[target + mine] - offsets[target]
            target = offsets[target]
        route = _Route(starts[self._order], key_counts[self._order], to_owner, lengths.sum(axis=1), target, lengths)
        weights = None
        if weighted:
            own = np.ones(len(keys.keys), np.float32) if keys.weights is None else keys.weights
            weights = self._send("weights", own, route, buffers)
        return Jagged(self._send("keys", keys.keys, route, buffers), offsets, weights, self._mine, bags)

    def output_dist(self, buffers: EmbeddingBuffers) -> Finish:
        """Start to send pooled vectors, ``owner_rows``, to the ranks whose rows they are; the end puts them into
        ``vectors``.
        """  # noqa: D205
        finish = self._swap_vectors("output_dist", buffers, to_owners=False)

        def scatter() -> None:
            finish()
            scatter_vectors(
                buffers.rank_rows, self._before, self._count, self._place, buffers.num_rows, buffers.vectors,
                device=self._device,
            )  # fmt: skip

        return scatter

    def grad_dist(self, buffers: EmbeddingBuffers) -> Finish:
        """Start to send the gradients in ``grad_vectors`` to the owners; the end has them in ``owner_rows``."""
        rows = buffers.num_rows
        gather_vectors(
            buffers.grad_vectors, self._before, self._count, self._place, rows, buffers.rank_rows, device=self._device
        )
        return self._swap_vectors("grad_dist", buffers, to_owners=True)

    def _swap_vectors(self, name: str, buffers: EmbeddingBuffers, *, to_owners: bool) -> Finish:
        comm = self._comm
        assert buffers.owner_rows is not None
        assert buffers.rank_rows is not None
        dim = buffers.rank_rows.shape[1]
        at_owner = [share * self._mine for share in self._shares(buffers)]
        at_rank = [buffers.num_rows * int(owned) for owned in self._owned]
        send, sent = (buffers.rank_rows, at_rank) if to_owners else (buffers.owner_rows, at_owner)
        recv, received = (buffers.owner_rows, at_owner) if to_owners else (buffers.rank_rows, at_rank)
        buffers.sent[name] = self._bytes(sent, self._wire.row_bytes(dim))
        if self._wire.plain:
            return comm.all_to_all_v(send, sent, recv, received).wait
        scale = self._wire.scale_of(buffers.global_rows) if to_owners else 1.0
        words = buffers.room("words_send", np.uint16, sum(sent) * dim).reshape(-1, dim)
        arriving = buffers.room("words_recv", np.uint16, sum(received) * dim).reshape(-1, dim)
        encoded = self._wire.encode(send[: sum(sent)], words, scale)
        event = comm.all_to_all_v(encoded, sent, arriving.view(np.uint8), received)

        def widen() -> None:
            event.wait()
            self._wire.decode(arriving, recv[: len(arriving)], scale)

        return widen

    def _shares(self, buffers: EmbeddingBuffers) -> list[int]:
        """Bags of each rank in a table; the ranks' bags follow each other in their order."""
        size, total = self._comm.size, buffers.global_rows
        return [share_of(total, size, rank) * self._bags_per_row for rank in range(size)]

    def _by_owner(self, values: Array) -> list[Array]:
        return np.split(values, np.cumsum(self._owned)[:-1])

    def _bytes(self, counts: Sequence[int], itemsize: int) -> int:
        return (int(sum(counts)) - int(counts[self._comm.rank])) * itemsize

    def _swap_headers(self, keys: Jagged, to_owner: Array, buffers: EmbeddingBuffers, shares: Sequence[int]) -> Array:
        size, bags = self._comm.size, self._bags_per_row
        header = np.empty((size, _HEADER), np.int64)
        header[:, :4] = keys.offsets is not None, keys.weights is not None, keys.num_rows // bags, buffers.global_rows
        header[:, 4] = to_owner
        others = np.empty_like(header)
        self._comm.all_to_all(header, others).wait()
        buffers.sent["input_dist"] = self._bytes([1] * size, _HEADER * 8)
        check_shares(others[:, 2:4], [share // bags for share in shares], buffers.global_rows, self._comm.rank)
        return others

    def _swap_lengths(self, keys: Jagged, buffers: EmbeddingBuffers, shares: Sequence[int]) -> Array:
        """Send the lengths of bags to the owners; returns the offsets [O * G + 1] of the global batch's bags."""
        rows, total = keys.num_rows, buffers.global_rows * self._bags_per_row
        own = buffers.room("lengths_own", np.int32, keys.num_tables * rows)
        if keys.offsets is None:
            own.fill(1)
        else:
            np.subtract(keys.offsets[1:], keys.offsets[:-1], out=own, casting="unsafe")
        each = np.array(shares, np.int64)[:, None]
        first = np.cumsum(each, axis=0) - each
        lengths = np.broadcast_to(each, (len(shares), self._mine))
        target = first + np.arange(self._mine) * total
        route = _Route(
            self._order * rows, np.full(len(self._order), rows), self._owned * rows, each[:, 0] * self._mine,
            target, lengths,
        )  # fmt: skip
        bags = self._send("lengths", own, route, buffers)
        offsets = buffers.room("offsets", np.int64, self._mine * total + 1)
        offsets[0] = 0
        np.cumsum(bags, out=offsets[1:])
        return offsets

    def _send(self, name: str, source: Array, route: _Route, buffers: EmbeddingBuffers) -> Array:
        """Pack pieces of ``source`` by owner, exchange them, and put what comes into its place."""
        send = buffers.room(f"{name}_send", source.dtype, int(route.send_counts.sum()))
        recv = buffers.room(f"{name}_recv", source.dtype, int(route.recv_counts.sum()))
        out = buffers.room(f"{name}_out", source.dtype, len(recv))
        packed = np.cumsum(route.piece_lengths) - route.piece_lengths
        copy_pieces(source, route.piece_starts, send, packed, route.piece_lengths, device=self._device)
        send_counts, recv_counts = route.send_counts.tolist(), route.recv_counts.tolist()
        self._comm.all_to_all_v(send, send_counts, recv, recv_counts).wait()
        buffers.sent["input_dist"] += self._bytes(send_counts, source.itemsize)
        lengths = np.ascontiguousarray(route.out_lengths).reshape(-1)
        arrived = np.cumsum(lengths) - lengths
        copy_pieces(recv, arrived, out, route.out_starts.reshape(-1), lengths, device=self._device)
        return out


@dataclass(frozen=True, slots=True)
class _Route:
    """How numbers of [T] tables travel.

    Attributes:
        piece_starts, piece_lengths: [T] pieces of the source, owner after owner.
        send_counts, recv_counts: [W].
        out_starts, out_lengths: [W, O] where the piece of (rank, own table) goes.
    """

    piece_starts: Array
    piece_lengths: Array
    send_counts: Array
    recv_counts: Array
    out_starts: Array
    out_lengths: Array


def copy_pieces(
    source: Array, source_starts: Array, out: Array, out_starts: Array, lengths: Array, *, device: Device
) -> None:
    """Copy many pieces of one flat array into another.

    Args:
        source: flat.
        source_starts: [n] int64.
        out: flat, same dtype; its pieces do not overlap.
        out_starts: [n] int64.
        lengths: [n] int64.
        device: where the arrays lie.
    """
    kernel = device.kernel(__name__, "copy_pieces")
    if kernel is not None:
        kernel(source, source_starts, out, out_starts, lengths)
        return
    for begin, target, length in zip(source_starts.tolist(), out_starts.tolist(), lengths.tolist(), strict=True):
        out[target : target + length] = source[begin : begin + length]


def scatter_vectors(
    rows: Array, before: Array, count: Array, place: Array, num_rows: int, vectors: Array, *, device: Device
) -> None:
    """Put what the owners sent, [B, O, D] owner after owner, into its places.

    Args:
        rows: [B * T or more, D].
        before: [T] int64, tables of the owners before this table's owner; tables are in owner order.
        count: [T] int64, tables of this table's owner.
        place: [T] int64, places in ``vectors``.
        num_rows: B.
        vectors: [B or more, F, D] C-contiguous; other places are left alone.
        device: where the arrays lie.
    """
    kernel = device.kernel(__name__, "scatter_vectors")
    if kernel is not None:
        kernel(rows, before, count, place, num_rows, vectors)
        return
    for table, position in enumerate(place.tolist()):
        vectors[:num_rows, position] = rows[_lines(before, count, table, num_rows)]


def gather_vectors(
    vectors: Array, before: Array, count: Array, place: Array, num_rows: int, rows: Array, *, device: Device
) -> None:
    """The reverse of ``scatter_vectors``: pack ``vectors`` into ``rows``, owner after owner."""
    kernel = device.kernel(__name__, "gather_vectors")
    if kernel is not None:
        kernel(vectors, before, count, place, num_rows, rows)
        return
    for table, position in enumerate(place.tolist()):
        rows[_lines(before, count, table, num_rows)] = vectors[:num_rows, position]


def _lines(before: Array, count: Array, table: int, num_rows: int) -> Array:
    return before[table] * num_rows + np.arange(num_rows) * count[table] + (table - before[table])
