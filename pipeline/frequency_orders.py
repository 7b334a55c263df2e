"""Which rows are frequent in data that is not numbered by frequency: counted, shared by all ranks, saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from dlrm.config import RunConfig
from embedding.comm import Comm
from embedding.frequent_rows import most_frequent
from embedding.placement import Plan
from pipeline.checkpoint import Checkpoint
from pipeline.dataset import Dataset
from pipeline.manifest import TableInfo
from pipeline.planning import Calibration, forced_placements

FrequentLists = dict[str, NDArray[np.int64]]
"""By table, the rows that are replicated where these are not the first ones: ascending."""


class FrequencyOrders:
    """The most frequent rows of some tables, for several plans with thresholds of their own."""

    def __init__(self) -> None:
        """None yet."""
        self._lists: dict[tuple[str, int], NDArray[np.int64]] = {}

    def mark(self, plans: Sequence[Plan], tables: Sequence[TableInfo], known: Calibration | None) -> list[Plan]:
        """Find the rows and mark the placements that need their lists (rank 0).

        Args:
            plans: to choose from.
            tables: of the data.
            known: what was counted.
        """
        if known is None or known.counts is None:
            return list(plans)
        marked = []
        for plan in plans:
            placements = list(plan.placements)
            for table, info in enumerate(tables):
                if placements[table].kind != "hybrid" or info.frequency_ordered:
                    continue
                rows = most_frequent(known.counts.counts[table], info.rows, placements[table].threshold)
                if int(rows[-1]) >= len(rows):  # else they are the first ones
                    self._lists[info.name, len(rows)] = rows
                    placements[table] = replace(placements[table], listed=True)
            marked.append(replace(plan, placements=tuple(placements)))
        return marked

    def share(self, plans: Sequence[Plan], comm: Comm) -> None:
        """Bring rank 0's lists to every rank; collective.

        Args:
            plans: as marked.
            comm: all ranks.
        """
        wanted = {name: None for plan in plans for name in _listed(plan)}
        for name, threshold in wanted:
            rows = self._lists.setdefault((name, threshold), np.empty(threshold, np.int64))
            comm.broadcast(rows).wait()

    def lists_of(self, plan: Plan) -> FrequentLists:
        """The lists of one of the plans."""
        return {name: self._lists[name, threshold] for name, threshold in _listed(plan)}


def _listed(plan: Plan) -> list[tuple[str, int]]:
    pairs = zip(plan.specs, plan.placements, strict=True)
    return [(spec.name, placement.threshold) for spec, placement in pairs if placement.listed]


def list_name(table: str) -> str:
    """Name in checkpoints of a table's list of frequent rows, [threshold] int64."""
    return f"frequent.{table}"


def saved_lists(checkpoint: Checkpoint, plan: Plan) -> FrequentLists:
    """The lists that a checkpoint has for its plan.

    Raises:
        CheckpointError: one is missing or damaged.
    """
    return {name: checkpoint.read(list_name(name)) for name, _ in _listed(plan)}


def may_list(config: RunConfig, dataset: Dataset) -> bool:
    """Whether a forced hybrid table is not numbered by frequency, so that its rows must be counted."""
    forced = forced_placements(config, dataset.tables)
    return any(
        table.name in forced and forced[table.name].kind == "hybrid" and not table.frequency_ordered
        for table in dataset.tables
    )
