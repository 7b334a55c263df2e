"""Tables over several GPUs by the columns that travel: whole rows, and parts of rows where tables are cut by columns.

What is cut into P parts travels like P tables, each on the rank of its part, whose keys are the table's; their vectors
lie side by side in the table's. Tables cut into as many parts make up a group, whose rows have the same columns.

Shapes: T tables, U features of one key a row, F = first + U places of the vectors, D columns, V parts of features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dlrm.device import Array
from dlrm.errors import ConfigError
from embedding.placement import COLUMN_MULTIPLE, Placement, Plan, TableSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnGroup:
    """The parts that are cut alike.

    Attributes:
        parts: P; 1: whole tables.
        plan: of the parts, each a table of its own.
        tables: the table of each part.
        columns: of the table, of each part.
        features: [V] int64, the part that each vector is of.
        keys_of: [V] int32, the feature of the batch whose keys it has.
        batch_features: U.
        place: [V] int64, where it lies, in vectors of D / P columns.
        num_places: F * P.
    """

    parts: int
    plan: Plan
    tables: tuple[int, ...]
    columns: tuple[range, ...]
    features: Array
    keys_of: Array
    batch_features: int
    place: Array
    num_places: int

    @property
    def dim(self) -> int:
        """D / P."""
        return self.plan.specs[0].dim

    @property
    def deduplicates(self) -> bool:
        """See ``deduplicates``."""
        return deduplicates(self.plan)

    @property
    def part_of_feature(self) -> Array:
        """[U] int64, the (first) part that has each feature's keys; -1: it is of another group."""
        parts = np.full(self.batch_features, -1, np.int64)
        parts[self.keys_of[::-1]] = self.features[::-1]
        return parts


def column_parts(placement: Placement) -> int:
    """P of one table."""
    return len(placement.owners) if placement.kind == "column_wise" else 1


def deduplicates(plan: Plan) -> bool:
    """Whether rows travel once for each pair of ranks and batch; between GPUs those of all whole tables, or none."""
    return any(placement.deduplicate for placement in plan.placements)


def uncut(placement: Placement) -> Placement | None:
    """The placement of a table whose rows are whole, ``table_wise`` where it is in one part; ``None``: it is cut."""
    if placement.kind != "column_wise":
        return placement
    return Placement(kind="table_wise", owner=placement.owners[0]) if column_parts(placement) == 1 else None


def check_placements(specs: Sequence[TableSpec], placements: Sequence[Placement]) -> None:
    """Refuse what captured steps do not do.

    Raises:
        ConfigError: dims differ, or parts of columns are too narrow.
    """
    if len({spec.dim for spec in specs}) > 1:
        raise ConfigError(f"tables: dims {sorted({spec.dim for spec in specs})} differ; give all tables one dim")
    for spec, placement in zip(specs, placements, strict=True):
        parts = column_parts(placement)
        if parts > 1 and spec.dim // parts % COLUMN_MULTIPLE:
            raise ConfigError(
                f"table '{spec.name}': column_wise in {parts} parts of {spec.dim // parts} columns, but between GPUs "
                f"these are multiples of {COLUMN_MULTIPLE}; use row_wise, or a larger dim"
            )


def column_groups(plan: Plan, features: Sequence[int], first: int) -> list[ColumnGroup]:
    """The groups of a plan, those of few parts first.

    Args:
        plan: placements of all tables.
        features: [U] the table of each feature.
        first: place of feature 0.

    Raises:
        ConfigError: see ``check_placements``.
    """
    check_placements(plan.specs, plan.placements)
    cut = [column_parts(placement) for placement in plan.placements]
    return [_group(plan, cut, features, first, parts) for parts in sorted(set(cut))]


def _group(plan: Plan, cut: Sequence[int], features: Sequence[int], first: int, parts: int) -> ColumnGroup:
    specs: list[TableSpec] = []
    placements: list[Placement] = []
    columns: list[range] = []
    begin: dict[int, int] = {}
    tables = [table for table, own in enumerate(cut) if own == parts]
    for table in tables:
        spec, placement = plan.specs[table], plan.placements[table]
        begin[table] = len(specs)
        dim = spec.dim // parts
        specs += [replace(spec, dim=dim)] * parts
        columns += [range(part * dim, (part + 1) * dim) for part in range(parts)]
        whole = uncut(placement)
        owners = placement.owners if whole is None else ()
        placements += [whole] if whole else [Placement(kind="table_wise", owner=owner) for owner in owners]
    named = [(feature, table) for feature, table in enumerate(features) if table in begin]
    every = range(parts)
    return ColumnGroup(
        parts=parts,
        plan=Plan(
            specs=tuple(specs), placements=tuple(placements), ranks=plan.ranks, nodes=plan.nodes,
            all_to_all=plan.all_to_all,
        ),
        tables=tuple(table for table in tables for _ in every),
        columns=tuple(columns),
        features=np.array([begin[table] + part for _, table in named for part in every], np.int64),
        keys_of=np.array([feature for feature, _ in named for _ in every], np.int32),
        batch_features=len(features),
        place=np.array([(first + feature) * parts + part for feature, _ in named for part in every], np.int64),
        num_places=(first + len(features)) * parts,
    )  # fmt: skip
