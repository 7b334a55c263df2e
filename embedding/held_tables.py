"""What a rank of several GPUs holds, as checkpoints and other ranks ask for it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dlrm.device import Array, Device
from embedding.captured_placement import CapturedPlacement
from embedding.column_groups import ColumnGroup
from embedding.comm import Comm
from embedding.frequent_rows import FrequentRows, Homes, check_lists
from embedding.store_mirrors import StoreMirrors
from embedding.table import Shard


class HeldTables:
    """The rows of one group of tables; of listed frequent rows shards have the homes (``frequent_rows``).

    Attributes:
        comm: the ranks; carries buffers of the device.
    """

    def __init__(
        self, group: ColumnGroup, placed: CapturedPlacement, lists: Mapping[str, Array], comm: Comm, device: Device
    ) -> None:
        """Fill the replicas of listed rows from their homes (collective).

        Args:
            group: the tables.
            placed: what this rank holds.
            lists: the frequent rows of each table whose placement is ``listed``, ascending [threshold] int64.
            comm: the ranks.
            device: where rows lie.

        Raises:
            ConfigError: a listed table has no list, or one that does not fit.
        """
        plan, self.comm = group.plan, comm
        self._group, self._placed, self._device = group, placed, device
        self._mirrors = StoreMirrors(device, placed.shards())
        self._touched: Array | None = None
        rows = check_lists(plan.specs, plan.placements, lists)
        self._with_lists = {spec.name for spec, own in zip(plan.specs, rows, strict=True) if own is not None}
        self._frequent = FrequentRows.create(plan.specs, rows).on(device, group.part_of_feature)
        self._homes = Homes.create(rows, placed.frequent_start, placed.own_start, comm.size, comm.rank, device)
        self._fill()

    def shards(self) -> list[Shard]:
        """See ``ExchangedEmbedding``, in the order of the group."""
        return self._shown(self._mirrors.all(self._touched))

    def resident(self) -> list[Shard]:
        """See ``ExchangedEmbedding``, in the order of the group."""
        self._gather()
        return self._shown(self._mirrors.resident(self._touched))

    def _shown(self, shards: list[Shard]) -> list[Shard]:
        return [shard for shard in shards if not (shard.replicated and shard.table in self._with_lists)]

    def settle(self) -> None:
        """See ``ExchangedEmbedding``."""
        self._gather()
        self._mirrors.settle()

    def spread(self) -> None:
        """See ``ExchangedEmbedding``."""
        self._mirrors.spread()
        self._fill()

    def spread_resident(self) -> None:
        """See ``ExchangedEmbedding``."""
        self._fill()

    def track_touched(self) -> None:
        """See ``ExchangedEmbedding``."""
        if self._touched is None:
            self._touched = self._device.zeros(len(self._placed.store.weight), np.bool_)

    def clear_touched(self) -> None:
        """See ``ExchangedEmbedding``."""
        if self._touched is not None:
            self._touched.fill(0)

    def _arrays(self) -> list[Array]:
        return [self._placed.store.weight, *self._placed.store.state.values()]

    def _gather(self) -> None:
        """Bring listed rows home."""
        if self._with_lists:
            arrays = [*self._arrays(), self._touched]
            self._homes.settle(arrays, arrays)

    def _fill(self) -> None:
        """Fill the replicas of listed rows."""
        if self._with_lists:
            self._homes.spread(self._arrays(), self._arrays(), self.comm)
