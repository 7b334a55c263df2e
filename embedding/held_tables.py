"""What a rank of several GPUs holds, as checkpoints and other ranks ask for it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dlrm.device import Array, Device
from embedding.captured_placement import CapturedPlacement
from embedding.comm import Comm
from embedding.frequent_rows import FrequentRows, Homes, check_lists
from embedding.placement import Plan
from embedding.store_mirrors import StoreMirrors
from embedding.table import Shard


class HeldTables:
    """The rows of one rank. Of tables that list their frequent rows, shards are the rows' homes (``frequent_rows``).

    Attributes:
        specs: the tables, in manifest order.
        plan: where they lie.
        comm: the ranks; carries buffers of the device.
    """

    def __init__(
        self, plan: Plan, placed: CapturedPlacement, lists: Mapping[str, Array], comm: Comm, device: Device
    ) -> None:
        """Fill the replicas of listed rows from their homes (collective).

        Args:
            plan: placements of all tables.
            placed: what this rank holds.
            lists: the frequent rows of each table whose placement is ``listed``, ascending [threshold] int64.
            comm: the ranks.
            device: where rows lie.

        Raises:
            ConfigError: a listed table has no list, or one that does not fit.
        """
        self.specs, self.plan, self.comm = plan.specs, plan, comm
        self._placed, self._device = placed, device
        self._mirrors = StoreMirrors(device, placed.shards())
        self._touched: Array | None = None
        rows = check_lists(plan.specs, plan.placements, lists)
        self._with_lists = {spec.name for spec, own in zip(plan.specs, rows, strict=True) if own is not None}
        self._frequent = FrequentRows.create(plan.specs, rows).on(device, placed.features)
        self._homes = Homes.create(rows, placed.frequent_start, placed.own_start, comm.size, comm.rank, device)
        self._fill()

    def shards(self) -> list[Shard]:
        """What this rank holds as arrays of the host, in manifest order; of one table, replicated rows first.

        Call ``settle`` before reading and ``spread`` after writing them; ``touched`` is that of the moment.
        """
        return self._in_order(self._mirrors.all(self._touched))

    def resident(self) -> list[Shard]:
        """As ``shards``, but where the rows lie, and up to date; call ``spread_resident`` after writing them."""
        self._gather()
        return self._in_order(self._mirrors.resident(self._touched))

    def _in_order(self, shards: list[Shard]) -> list[Shard]:
        order = {spec.name: place for place, spec in enumerate(self.specs)}
        shown = [shard for shard in shards if not (shard.replicated and shard.table in self._with_lists)]
        return sorted(shown, key=lambda shard: order[shard.table])

    def settle(self) -> None:
        """Bring the arrays of ``shards`` up to date."""
        self._gather()
        self._mirrors.settle()

    def spread(self) -> None:
        """Take over what was written into the arrays of ``shards`` (collective)."""
        self._mirrors.spread()
        self._fill()

    def spread_resident(self) -> None:
        """Take over what was written into the arrays of ``resident`` (collective)."""
        self._fill()

    def track_touched(self) -> None:
        """Note from now on which rows are updated; before anything is captured."""
        if self._touched is None:
            self._touched = self._device.zeros(len(self._placed.store.weight), np.bool_)

    def clear_touched(self) -> None:
        """Forget which rows were updated."""
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
