"""Tables over several GPUs, looked up, exchanged and updated by steps that are captured into CUDA graphs.

Every rank has the keys of the whole global batch, so that owners and those who ask make the same lists of what travels
(``pair_lists``) and no key is exchanged. What is frequent lies on every rank: looked up where it is needed, its
gradients summed here and then over all ranks. All sizes are fixed, and nothing waits for the host. A batch for which a
list is too short is noted in the guard before anything is written, by all ranks alike; whoever reads that there runs
the batch again with ``exact`` buffers.

Tables that are cut into as many parts of their columns are a group with lists and messages of its own; most runs have
one, of whole tables.

Shapes: T tables, U features of one key a row, W ranks, G rows of the global batch, B of this rank, F = first + U
places, D columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dlrm.config import OptimizerConfig
from dlrm.device import Array, Device
from dlrm.errors import ConfigError
from dlrm.scalars import OVERFLOW
from embedding.batch import check_arrays
from embedding.captured_group import ExchangedGroup, ExchangeForm
from embedding.captured_placement import SIGMAS, MostRows
from embedding.column_groups import column_groups
from embedding.comm import Comm
from embedding.exchange_buffers import ExchangeBuffers, GroupBuffers
from embedding.placement import Plan
from embedding.reduce_way import ReduceWay
from embedding.table import Shard
from embedding.topology import Topology
from embedding.wire import Precision


class ExchangedEmbedding:
    """All tables, over the GPUs of a run.

    Attributes:
        specs: the tables, in manifest order.
        plan: where they lie.
        comm: the ranks; carries buffers of the device.
        topology: of ``comm``.
        first: place of table 0 in the vectors.
        listed_forward: whether forward buffers that are made from now on have rows listed and not in the vectors.
    """

    def __init__(
        self,
        *,
        plan: Plan,
        comm: Comm,
        topology: Topology | None,
        device: Device,
        optimizer: OptimizerConfig,
        table_dtype: Any,
        seed: int | None,
        first: int,
        deterministic: bool,
        exchange_precision: Precision = "fp32",
        shares: Array | None = None,
        sigmas: float = SIGMAS,
        hierarchical: bool = False,
        most: MostRows | None = None,
        listed: bool = False,
        listed_forward: bool = False,
        sends: bool = False,
        features: Sequence[int] | None = None,
        lists: Mapping[str, Array] | None = None,
    ) -> None:
        """Allocate and initialise what this rank holds (collective).

        Args:
            plan: placements of all tables on ``comm.size`` ranks.
            comm: the ranks.
            topology: their nodes; ``None``: not known.
            device: holds this rank's part.
            optimizer: of the tables.
            table_dtype: float32, float16 or bfloat16 (uint16).
            seed: of the run; ``None``: tables of zeros, for timing.
            first: place of table 0 in the vectors: 1 behind a bottom MLP's output, else 0.
            deterministic: no sums in an order of their own making.
            exchange_precision: how rows and gradients travel, where the vectors are not narrower.
            shares: [T, W] part of each table's look-ups that goes to each owner (``captured_placement.owner_shares``),
                the same on all ranks; ``None``: lists have room for whatever keys there may be.
            sigmas: standard deviations that lists have room for above what is expected.
            hierarchical: rows and gradients go by node (``node_route``); ``topology`` has groups of the device then.
            most: rows of tables that are not cut that batches ask for: decides room for distinct rows, and whether the
                gradients of touched replicated rows alone are summed over the ranks, where the plan predicts that to
                be faster; ``None``: room for as many as lists have, and those of all.
            listed: in training rows are not put into the vectors: whoever reads them finds them by ``lists.sources`` in
                ``weight`` and among what has come (``FlatRoute.come``); not with ``hierarchical``, nor where tables
                are cut by columns or rows de-duplicated.
            listed_forward: the same in forward passes.
            sends: with ``listed``: gradients of rows that travel, and without sums as they come those of this rank's
                own rows, are written where ``lists.slots`` says, and not to ``grad_vectors``.
            features: the table of each feature, which has one key a row; ``None``: every table is one.
            lists: the frequent rows of each table whose placement is ``listed``, ascending [threshold] int64.

        Raises:
            ConfigError: the plan is for other ranks, has placements that GPUs do not do, or lacks a list.
            DeviceError: there are too many rows.
        """
        if plan.ranks != comm.size:
            raise ConfigError(f"plan: made for {plan.ranks} ranks, but there are {comm.size}; plan again")
        self.specs, self.plan, self.comm, self.topology, self.first = plan.specs, plan, comm, topology, first
        self._device = device
        self._listed, self.listed_forward = listed, listed_forward
        self._features = list(range(len(plan.specs)) if features is None else features)
        groups = column_groups(plan, self._features, first)
        form = ExchangeForm(
            comm=comm, topology=topology, device=device, optimizer=optimizer, table_dtype=table_dtype, seed=seed,
            deterministic=deterministic, precision=exchange_precision, sigmas=sigmas, hierarchical=hierarchical,
            sends=sends, way=ReduceWay.of(plan, range(len(plan.specs))),
        )  # fmt: skip
        self._groups = [
            ExchangedGroup(
                group, form, None if shares is None else shares[list(group.tables)],
                (most if group.parts == 1 else None) or MostRows(), lists or {},
            )
            for group in groups
        ]  # fmt: skip

    @property
    def weight(self) -> Array:
        """[R, D], the rows that lie here, where no table is cut by columns."""
        return self._groups[0].weight

    @property
    def room(self) -> float:
        """How many times as long lists of whole tables are made as is expected to be enough."""
        return self._groups[0].room

    def slots(self, buffers: ExchangeBuffers) -> Array | None:
        """``lists.slots`` of a batch, if gradients are to be written there."""
        return self._groups[0].slots(buffers.groups[0])

    # --- what checkpoints ask for

    def shards(self) -> list[Shard]:
        """What this rank holds as arrays of the host, in manifest order; of one table, replicated rows first.

        Call ``settle`` before reading and ``spread`` after writing them; ``touched`` is that of the moment.
        """
        return self._in_order([shard for group in self._groups for shard in group.shards()])

    def resident(self) -> list[Shard]:
        """As ``shards``, but where the rows lie, and up to date; call ``spread_resident`` after writing them."""
        return self._in_order([shard for group in self._groups for shard in group.resident()])

    def _in_order(self, shards: list[Shard]) -> list[Shard]:
        order = {spec.name: place for place, spec in enumerate(self.specs)}
        return sorted(shards, key=lambda shard: order[shard.table])

    def settle(self) -> None:
        """Bring the arrays of ``shards`` up to date."""
        for group in self._groups:
            group.settle()

    def spread(self) -> None:
        """Take over what was written into the arrays of ``shards`` (collective)."""
        for group in self._groups:
            group.spread()

    def spread_resident(self) -> None:
        """Take over what was written into the arrays of ``resident`` (collective)."""
        for group in self._groups:
            group.spread_resident()

    def track_touched(self) -> None:
        """Note from now on which rows are updated; before anything is captured."""
        for group in self._groups:
            group.track_touched()

    def clear_touched(self) -> None:
        """Forget which rows were updated."""
        for group in self._groups:
            group.clear_touched()

    # --- batches

    def buffers(
        self,
        capacity: int,
        vectors: Array,
        grad_vectors: Array | None = None,
        capacities: tuple[int, ...] | None = None,
    ) -> ExchangeBuffers:
        """Room for one batch in flight, of one key a bag.

        Args:
            capacity: most rows of any rank: a whole batch over the ranks, rounded up; the same on every rank.
            vectors: [capacity or more, F, D] C-contiguous; the output.
            grad_vectors: the same shape; its gradients. ``None``: forward only.
            capacities: most rows of whole tables that each rank sends to one other; ``None``: as ``shares`` tells.

        Raises:
            ConfigError: an array has another shape, dtype or layout.
        """
        shape = (self.first + len(self._features), self.specs[0].dim)
        check_arrays(vectors, grad_vectors, capacity, shape, vectors.dtype)
        keys = self._device.zeros(max(1, len(self._features) * capacity * self.comm.size), np.int32)
        listed = len(self._groups) == 1 and (self.listed_forward if grad_vectors is None else self._listed)
        made = [
            group.buffers(
                capacity, vectors, grad_vectors, keys, capacities=capacities if group.whole else None, listed=listed
            )
            for group in self._groups
        ]
        return ExchangeBuffers(
            capacity=capacity, vectors=vectors, grad_vectors=grad_vectors, keys=keys, groups=tuple(made)
        )

    def make_room(self, buffers: ExchangeBuffers) -> None:
        """Have the lists of buffers that are made from now on hold a quarter more than this batch needs.

        Args:
            buffers: after ``input_dist``; they stay as they are.
        """
        self._each(buffers, lambda group, own: group.make_room(own))

    def exact(self, buffers: ExchangeBuffers, rows: int, global_rows: int) -> ExchangeBuffers:
        """The same batch with lists of the length that it needs, after ``input_dist``; the host waits for counts.

        Args:
            buffers: the batch's, whose lists may have run over.
            rows: B.
            global_rows: G.
        """
        made = ExchangeBuffers(
            capacity=buffers.capacity, vectors=buffers.vectors, grad_vectors=buffers.grad_vectors, keys=buffers.keys,
            groups=tuple(
                group.exact(own, rows, global_rows) for group, own in zip(self._groups, buffers.groups, strict=True)
            ),
        )  # fmt: skip
        made.begin(rows, global_rows)
        return made

    def input_dist(self, buffers: ExchangeBuffers, rows: int, global_rows: int) -> None:
        """Find out from the keys in ``buffers`` what travels, and bring it into order where an update needs it.

        Args:
            buffers: the batch's.
            rows: B.
            global_rows: G.

        Raises:
            ConfigError: the batch is larger than the buffers.
        """
        buffers.begin(rows, global_rows)
        for group, own in zip(self._groups, buffers.groups, strict=True):
            own.keys = buffers.keys
            group.input_dist(own, rows, global_rows)

    def lookup(self, buffers: ExchangeBuffers, *, local: bool = True) -> None:
        """Put the rows that others ask for side by side, and with ``local`` those that lie here into the vectors."""
        self._each(buffers, lambda group, own: group.lookup(own, local=local))

    def lookup_local(self, buffers: ExchangeBuffers) -> None:
        """Put the rows that lie here into the vectors; other rows may be on their way meanwhile."""
        self._each(buffers, lambda group, own: group.lookup_local(own))

    def output_dist(self, buffers: ExchangeBuffers) -> None:
        """Bring the rows to the ranks that ask for them."""
        self._each(buffers, lambda group, own: group.output_dist(own))
        flag = buffers.lists.flag
        for other in buffers.groups[1:]:
            self._device.xp.bitwise_or(flag, other.lists.flag, out=flag)

    def sum_replicated(self, buffers: ExchangeBuffers) -> None:
        """Sum this rank's gradients of replicated rows; ``grad_dist`` may be under way meanwhile.

        Raises:
            ConfigError: the buffers are forward only.
        """
        self._each(buffers, lambda group, own: group.sum_replicated(own))

    def grad_dist(self, buffers: ExchangeBuffers) -> None:
        """Send the gradients ``grad_vectors`` to the owners.

        Raises:
            ConfigError: the buffers are forward only.
        """
        self._each(buffers, lambda group, own: group.grad_dist(own))

    def reduce_replicated(self, buffers: ExchangeBuffers) -> None:
        """Sum what ``sum_replicated`` has summed over the ranks (collective)."""
        self._each(buffers, lambda group, own: group.reduce_replicated(own))

    def sparse_update(self, buffers: ExchangeBuffers, scalars: Array, guard: Array) -> None:
        """Update the rows that the global batch looked up, from gradients times the loss scale.

        Args:
            buffers: after ``grad_dist`` and ``reduce_replicated``.
            scalars: see ``dlrm.scalars``.
            guard: see ``dlrm.scalars``; ``raise_overflow`` has been called for this batch.
        """
        self._each(buffers, lambda group, own: group.sparse_update(own, scalars, guard))

    def raise_overflow(self, buffers: ExchangeBuffers, guard: Array) -> None:
        """Note in the guard that a list of this batch ran over; once a step, before anything is written.

        The note stays until ``clear_overflow``; ``buffers.lists.flag`` says of which batch it is.
        """
        word = guard.view(np.int32)[OVERFLOW : OVERFLOW + 1]
        self._device.xp.bitwise_or(word, buffers.lists.flag, out=word)

    def clear_overflow(self, guard: Array) -> None:
        """Forget what ``raise_overflow`` noted."""
        guard.view(np.int32)[OVERFLOW : OVERFLOW + 1].fill(0)

    def bytes_sent(self, buffers: ExchangeBuffers) -> dict[str, int]:
        """Bytes that a batch hands to the carrier for other ranks, inside nodes and between (``capacity_bytes``)."""
        sent = [group.bytes_sent(own) for group, own in zip(self._groups, buffers.groups, strict=True)]
        return {name: sum(own[name] for own in sent) for name in sent[0]}

    def _each(self, buffers: ExchangeBuffers, work: Callable[[ExchangedGroup, GroupBuffers], None]) -> None:
        for group, own in zip(self._groups, buffers.groups, strict=True):
            work(group, own)
