"""Where every table's rows lie: the plan that embeddings, checkpoints and reports read."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from dlrm.errors import ConfigError

Pooling = Literal["sum", "mean", "concat"]
Kind = Literal["replicated", "table_wise", "row_wise", "column_wise", "hybrid"]
AllToAll = Literal["flat", "hierarchical"]
KINDS: tuple[Kind, ...] = get_args(Kind)

COLUMN_MULTIPLE = 4
"""Between GPUs rows travel, and are rounded, by so many columns."""

UPDATE_BYTES = 4
"""Of a row's memory, what the update needs for itself however few columns lie here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableSpec:
    """One embedding table, wherever it lies.

    Attributes:
        name: the feature's name in the manifest.
        rows: categories.
        dim: columns, D.
        hotness: most (or mean) keys a bag holds; only the balance of the plan depends on it, but for ``concat``: there
            every bag holds so many.
        pooling: ``sum`` or ``mean`` over the keys of a bag, or ``concat``: each key's vector is a feature of its own.
    """

    name: str
    rows: int
    dim: int
    hotness: float = 1
    pooling: Pooling = "sum"

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a size is not positive, the pooling is unknown, or ``concat`` has no whole hotness.
        """
        if self.rows < 1 or self.dim < 1 or not self.hotness > 0:
            raise ConfigError(
                f"table '{self.name}': rows {self.rows}, dim {self.dim}, hotness {self.hotness}; each must be above 0"
            )
        if self.pooling not in get_args(Pooling):
            raise ConfigError(
                f"table '{self.name}': pooling {self.pooling!r} is none of {', '.join(get_args(Pooling))}"
            )
        if self.pooling == "concat" and self.hotness != int(self.hotness):
            raise ConfigError(
                f"table '{self.name}': hotness {self.hotness} with pooling concat, whose bags hold one whole number of "
                "keys; use sum or mean"
            )

    @property
    def lookup_cost(self) -> float:
        """Numbers read per row of the batch: dim * hotness."""
        return self.dim * self.hotness

    @property
    def bag_keys(self) -> int | None:
        """Keys that every bag holds (``concat``); ``None``: bags may differ."""
        return int(self.hotness) if self.pooling == "concat" else None

    @property
    def num_vectors(self) -> int:
        """Vectors that a row of the batch gets: one, but for ``concat``."""
        return self.bag_keys or 1


def places_of(specs: Sequence[TableSpec], first: int) -> tuple[list[int], int]:
    """Where each table's (first) vector lies among a row's vectors, and how many vectors there are.

    Args:
        specs: the tables, in manifest order.
        first: place of table 0: 1 behind a bottom MLP's output, else 0.
    """
    *places, total = itertools.accumulate((spec.num_vectors for spec in specs), initial=first)
    return places, total


def tables_of_vectors(specs: Sequence[TableSpec]) -> list[int]:
    """The table of each of a row's vectors."""
    return [table for table, spec in enumerate(specs) for _ in range(spec.num_vectors)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where one table's rows lie.

    Attributes:
        kind: ``replicated``: all rows on every rank; ``table_wise``: all on ``owner``; ``row_wise``: row r on rank
            r % W; ``hybrid``: rows below ``threshold`` on every rank, row r above on rank (r - threshold) % W;
            ``column_wise``: columns cut into equal parts, part i on ``owners[i]``.
        owner: of a ``table_wise`` table.
        threshold: rows [0, threshold) are replicated: all of them (``replicated``), some (``hybrid``) or none.
        owners: of the columns' parts.
        deduplicate: rows travel, each distinct row once per pair of ranks and batch. A ``table_wise`` table sends
            pooled vectors otherwise.
        listed: of a ``hybrid`` table: ``threshold`` rows of a list are replicated, not the first ones
            (``frequent_rows``); row r has a home on rank r % W, used unless it is one of them.
    """

    kind: Kind
    owner: int = 0
    threshold: int = 0
    owners: tuple[int, ...] = ()
    deduplicate: bool = False
    listed: bool = False

    def __post_init__(self) -> None:
        """Check that only a hybrid table lists frequent rows.

        Raises:
            ConfigError: another one does.
        """
        if self.listed and self.kind != "hybrid":
            raise ConfigError(f"placement {self.kind}: lists frequent rows, which only placement hybrid has")

    @property
    def pooled(self) -> bool:
        """Whether owners pool and vectors travel, not rows."""
        return self.kind == "column_wise" or (self.kind == "table_wise" and not self.deduplicate)

    def check(self, spec: TableSpec, ranks: int) -> None:
        """Check that ``spec`` can lie so on ``ranks`` ranks.

        Raises:
            ConfigError: it cannot.
        """
        wrong = None
        if self.kind not in KINDS:
            wrong = f"placement {self.kind!r} is none of {', '.join(KINDS)}"
        elif self.kind == "table_wise" and not 0 <= self.owner < ranks:
            wrong = f"owner {self.owner} is none of {ranks} ranks"
        elif self.kind == "hybrid" and not 0 < self.threshold < spec.rows:
            wrong = (
                f"threshold {self.threshold} does not lie inside its {spec.rows} rows; "
                "0 is placement row_wise, all rows are placement replicated"
            )
        elif self.kind == "replicated" and self.threshold != spec.rows:
            wrong = f"replicated, but threshold {self.threshold} is not its {spec.rows} rows"
        elif self.kind not in ("hybrid", "replicated") and self.threshold:
            wrong = f"{self.kind}, but threshold {self.threshold}; only placement hybrid has one"
        elif self.kind == "column_wise" and (not self.owners or spec.dim % len(self.owners)):
            wrong = f"dim {spec.dim} cannot be cut into {len(self.owners)} equal parts"
        elif self.kind == "column_wise" and not all(0 <= owner < ranks for owner in self.owners):
            wrong = f"owners {self.owners} are not all among {ranks} ranks"
        elif self.kind == "column_wise" and self.deduplicate:
            wrong = "column_wise sends pooled vectors, so there are no rows to de-duplicate"
        if wrong:
            raise ConfigError(f"table '{spec.name}': {wrong}")


def owned_rows(rows: int, threshold: int, ranks: int, rank: int) -> int:
    """How many of the rows threshold, threshold + 1, ... ``rank`` owns: those with (row - threshold) % ranks = rank."""
    return max(0, -(-(rows - threshold - rank) // ranks))


def node_of_ranks(ranks: int, nodes: int) -> list[int]:
    """The node of every rank where contiguous ranks share nodes (``topology.discover``)."""
    return [rank * nodes // ranks for rank in range(ranks)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a plan expects of one table.

    Attributes:
        frequent_share: part of the look-ups that are of replicated rows.
        touched_rows: replicated rows that a step's global batch looks up.
        inside_bytes: sent between ranks of one node in a step, all ranks together.
        across_bytes: sent between nodes.
    """

    frequent_share: float = 0.0
    touched_rows: float = 0.0
    inside_bytes: float = 0.0
    across_bytes: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Placement of all tables.

    Attributes:
        specs: the tables in manifest order.
        placements: of each.
        ranks: W; some may own nothing.
        nodes: contiguous ranks share one of so many nodes.
        all_to_all: how rows and vectors travel between nodes.
        table_bytes: memory of each whole table with its optimiser state, once; left out: 4 bytes a number.
        gradient_bytes: what a replicated row of each table needs besides, for its gradient; left out: 0.
        reduce_start_bytes: what an all-reduce could send in the time that touched rows cost besides; 0: not known.
        batch_size: G of the predictions; 0: there are none.
        predictions: of each table; empty where nothing was predicted.
        step_seconds: predicted time of exchange, look-up and update in a step; ``None``: not predicted.
        seconds: its parts: keys, vectors, gradients, all_reduce, work.
        alternatives: predicted seconds of the plans that were not taken, by name.
        trials: of the plans that were tried out, this one among them: label, predicted and measured seconds.
    """

    specs: tuple[TableSpec, ...]
    placements: tuple[Placement, ...]
    ranks: int
    nodes: int = 1
    all_to_all: AllToAll = "flat"
    table_bytes: tuple[int, ...] = ()
    gradient_bytes: tuple[int, ...] = ()
    reduce_start_bytes: float = 0.0
    batch_size: int = 0
    predictions: tuple[Prediction, ...] = ()
    step_seconds: float | None = None
    seconds: tuple[tuple[str, float], ...] = ()
    alternatives: tuple[tuple[str, float], ...] = ()
    trials: tuple[tuple[str, float, float], ...] = ()

    def __post_init__(self) -> None:
        """Fill what was left out and check that every table can lie so.

        Raises:
            ConfigError: a placement does not fit its table or the ranks.
        """
        if self.ranks < 1:
            raise ConfigError(f"ranks: {self.ranks}; at least 1 is needed")
        if not 1 <= self.nodes <= self.ranks:
            raise ConfigError(f"nodes: {self.nodes}; must lie in 1 .. {self.ranks}, the number of ranks")
        if len(self.placements) != len(self.specs):
            raise ConfigError(f"plan: {len(self.placements)} placements for {len(self.specs)} tables")
        if not self.table_bytes:
            object.__setattr__(self, "table_bytes", tuple(4 * spec.rows * spec.dim for spec in self.specs))
        if not self.gradient_bytes:
            object.__setattr__(self, "gradient_bytes", (0,) * len(self.specs))
        for spec, placement in zip(self.specs, self.placements, strict=True):
            placement.check(spec, self.ranks)

    @property
    def label(self) -> str:
        """Its kinds and its exchange, such as ``16 replicated, 10 row_wise de-duplicated; flat``."""
        kinds = [p.kind + " de-duplicated" * (p.deduplicate and p.kind != "replicated") for p in self.placements]
        counted = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
        return f"{counted}; {self.all_to_all}" if self.nodes > 1 else counted

    @property
    def owners(self) -> tuple[int, ...]:
        """The owner of each table, where all are ``table_wise``."""
        return tuple(placement.owner for placement in self.placements)

    def tables_of(self, rank: int) -> list[int]:
        """Numbers of the ``table_wise`` tables that ``rank`` owns, in manifest order."""
        return [
            table
            for table, placement in enumerate(self.placements)
            if placement.kind == "table_wise" and placement.owner == rank
        ]

    def held_bytes(self, table: int, rank: int) -> int:
        """Memory of what ``rank`` holds of one table, with optimiser state and gradients of replicated rows."""
        spec, placement = self.specs[table], self.placements[table]
        row_bytes = self.table_bytes[table] // spec.rows
        match placement.kind:
            case "table_wise":
                return self.table_bytes[table] if placement.owner == rank else 0
            case "column_wise":
                part = column_part_bytes(row_bytes, len(placement.owners))
                return spec.rows * part * placement.owners.count(rank)
            case _:
                frequent = placement.threshold * (row_bytes + self.gradient_bytes[table])
                spread_from = 0 if placement.listed else placement.threshold
                return frequent + row_bytes * owned_rows(spec.rows, spread_from, self.ranks, rank)

    def rank_bytes(self, rank: int) -> int:
        """Memory of what ``rank`` holds of all tables."""
        return sum(self.held_bytes(table, rank) for table in range(len(self.specs)))

    def memory(self) -> NDArray[np.int64]:
        """[W] ``rank_bytes`` of every rank."""
        held = np.zeros(self.ranks, np.int64)
        ranks = np.arange(self.ranks)
        for table, (spec, placement) in enumerate(zip(self.specs, self.placements, strict=True)):
            row_bytes = self.table_bytes[table] // spec.rows
            if placement.kind == "table_wise":
                held[placement.owner] += self.table_bytes[table]
            elif placement.kind == "column_wise":
                part = spec.rows * column_part_bytes(row_bytes, len(placement.owners))
                held += part * np.bincount(placement.owners, minlength=self.ranks)
            else:
                held += placement.threshold * (row_bytes + self.gradient_bytes[table])
                spread_from = 0 if placement.listed else placement.threshold
                held += row_bytes * np.maximum(0, -(-(spec.rows - spread_from - ranks) // self.ranks))
        return held

    def rank_cost(self, rank: int) -> float:
        """Numbers that ``rank`` reads of ``table_wise`` tables per row of the global batch."""
        return sum(self.specs[table].lookup_cost for table in self.tables_of(rank))

    def describe(self) -> list[dict[str, str | int | float]]:
        """One row per table, in manifest order, for a printed table."""
        total = sum(spec.lookup_cost for spec in self.specs)
        rows: list[dict[str, str | int | float]] = []
        for table, (spec, placement) in enumerate(zip(self.specs, self.placements, strict=True)):
            owner: str | int = "all"
            if placement.kind == "table_wise":
                owner = placement.owner
            elif placement.kind == "column_wise":
                owner = ", ".join(map(str, placement.owners))
            row: dict[str, str | int | float] = {
                "table": spec.name,
                "rows": spec.rows,
                "dim": spec.dim,
                "hotness": spec.hotness,
                "pooling": spec.pooling,
                "placement": placement.kind
                + (" listed" if placement.listed else "")
                + (" de-duplicated" if placement.deduplicate else ""),
                "frequent_rows": placement.threshold,
                "rank": owner,
                "mib": round(self.table_bytes[table] / 2**20, 3),
                "mib_per_rank": round(max(self.held_bytes(table, r) for r in self._holders(placement)) / 2**20, 3),
                "lookup_share": round(spec.lookup_cost / total, 4),
            }
            if self.predictions:
                expected = self.predictions[table]
                row["frequent_share"] = round(expected.frequent_share, 4)
                row["inside_bytes"] = round(expected.inside_bytes)
                row["across_bytes"] = round(expected.across_bytes)
            rows.append(row)
        return rows

    def to_values(self) -> dict[str, Any]:
        """The plan as plain JSON values; ``plan_from_values`` is the way back."""
        return {
            "specs": [
                {name: getattr(spec, name) for name in ("name", "rows", "dim", "hotness", "pooling")}
                for spec in self.specs
            ],
            "placements": [
                {"kind": p.kind, "owner": p.owner, "threshold": p.threshold, "owners": list(p.owners),
                 "deduplicate": p.deduplicate, "listed": p.listed}
                for p in self.placements
            ],
            "ranks": self.ranks,
            "nodes": self.nodes,
            "all_to_all": self.all_to_all,
            "table_bytes": list(self.table_bytes),
            "gradient_bytes": list(self.gradient_bytes),
            "reduce_start_bytes": self.reduce_start_bytes,
            "batch_size": self.batch_size,
            "predictions": [asdict(prediction) for prediction in self.predictions],
            "step_seconds": self.step_seconds,
            "seconds": [list(pair) for pair in self.seconds],
            "alternatives": [list(pair) for pair in self.alternatives],
            "trials": [list(trial) for trial in self.trials],
        }  # fmt: skip

    def _holders(self, placement: Placement) -> list[int]:
        """Ranks among which is the one that holds the most of a table: owner 0 has the longest share of rows."""
        if placement.kind == "table_wise":
            return [placement.owner]
        return sorted(set(placement.owners)) or [0]


def column_part_bytes(row_bytes: int, parts: int) -> int:
    """Memory of one column part of a row: the update's own bytes are needed for each part."""
    return -(-(row_bytes - UPDATE_BYTES) // parts) + UPDATE_BYTES


def plan_from_values(values: Mapping[str, Any]) -> Plan:
    """The plan that ``Plan.to_values`` wrote.

    Raises:
        ConfigError: a placement does not fit.
    """
    return Plan(
        specs=tuple(TableSpec(**spec) for spec in values["specs"]),
        placements=tuple(Placement(**{**p, "owners": tuple(p["owners"])}) for p in values["placements"]),
        ranks=values["ranks"],
        nodes=values["nodes"],
        all_to_all=values["all_to_all"],
        table_bytes=tuple(values["table_bytes"]),
        gradient_bytes=tuple(values["gradient_bytes"]),
        reduce_start_bytes=values.get("reduce_start_bytes", 0.0),
        batch_size=values.get("batch_size", 0),
        predictions=tuple(Prediction(**p) for p in values["predictions"]),
        step_seconds=values["step_seconds"],
        seconds=tuple((name, seconds) for name, seconds in values["seconds"]),
        alternatives=tuple((name, seconds) for name, seconds in values["alternatives"]),
        trials=tuple((label, predicted, measured) for label, predicted, measured in values.get("trials", ())),
    )
