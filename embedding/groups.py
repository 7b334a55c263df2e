"""Tables of an embedding go in groups that travel in the same way.

Shapes: T tables of all groups, B rows of this rank, K keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from dlrm.device import Array, Device
from embedding.buffers import BatchBuffers, Finish
from embedding.exchange import copy_pieces
from embedding.jagged import Jagged
from embedding.placement import TableSpec
from embedding.table import Shard


class Group(Protocol):
    """Tables that travel in the same way."""

    def shards(self) -> list[Shard]:
        """What this rank holds."""

    def settle(self) -> None:
        """See ``HybridEmbedding``."""

    def spread(self) -> None:
        """See ``HybridEmbedding``."""

    def track_touched(self) -> None:
        """See ``HybridEmbedding``."""

    def clear_touched(self) -> None:
        """See ``HybridEmbedding``."""

    def buffers(self, capacity: int, vectors: Array, grad_vectors: Array | None = None) -> Any:
        """Room for one batch in flight."""

    def distribute(self, keys: Jagged, buffers: Any, global_rows: int) -> None:
        """``input_dist`` of the group's keys."""

    def lookup(self, buffers: Any) -> None:
        """See ``HybridEmbedding``, as for what follows."""

    def start_output_dist(self, buffers: Any) -> Finish:
        """Starts ``output_dist``; what is returned ends it."""

    def start_grad_dist(self, buffers: Any) -> Finish:
        """Starts ``grad_dist``; what is returned ends it."""

    def sparse_update(self, buffers: Any, lr: float, step: int) -> None:
        """Updates what the global batch touched."""


@dataclass(frozen=True, slots=True)
class Owners:
    """Tables that each lie whole on one rank.

    Attributes:
        specs: the tables.
        owners: the rank of each.
        ranks: W.
    """

    specs: tuple[TableSpec, ...]
    owners: tuple[int, ...]
    ranks: int

    def tables_of(self, rank: int) -> list[int]:
        """Numbers of the tables that ``rank`` owns."""
        return [table for table, owner in enumerate(self.owners) if owner == rank]


def select_tables(keys: Jagged, tables: Sequence[int], buffers: BatchBuffers, *, device: Device) -> Jagged:
    """The keys of some tables, in that order; a table may come several times.

    Args:
        keys: of all tables.
        tables: numbers of those to take; all of them give ``keys`` as they are.
        buffers: what the copies belong to.
        device: where the keys lie.
    """
    if list(tables) == list(range(keys.num_tables)):
        return keys
    rows = keys.num_rows
    chosen = np.array(tables, np.int64)
    if keys.offsets is None:
        starts, counts, offsets = chosen * rows, np.full(len(chosen), rows), None
    else:
        lengths = np.diff(keys.offsets).reshape(keys.num_tables, rows)[chosen]
        starts, counts = keys.offsets[chosen * rows], lengths.sum(axis=1)
        offsets = buffers.room("chosen_offsets", np.int64, len(chosen) * rows + 1)
        offsets[0] = 0
        np.cumsum(lengths, out=offsets[1:])
    targets = np.cumsum(counts) - counts
    copies: list[Array | None] = []
    for name, source in (("chosen_keys", keys.keys), ("chosen_weights", keys.weights)):
        if source is None:
            copies.append(None)
            continue
        out = buffers.room(name, source.dtype, int(counts.sum()))
        copy_pieces(source, starts, out, targets, counts, device=device)
        copies.append(out)
    return Jagged(copies[0], offsets, copies[1], len(chosen), rows)
