"""Data sets of bags of several lengths, and runs on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.manifest import Layout, TableInfo
from pipeline.writer import DatasetWriter

ROWS = {"train": 400, "validation": 230}
TABLES = {"user": (50, 1), "genres": (7, 3), "items": (90, 4), "last": (31, 3), "one": (1, 2)}
"""Rows and hotness; all bags of ``last`` are full, so that its vectors may be features of their own."""
EMBEDDING: dict[str, Any] = {
    "tables": {
        "genres": {"pooling": "mean"},
        "last": {"pooling": "concat"},
    }
}
PLACED_BAGS: dict[str, Any] = {
    "placement": "table_wise",
    "tables": {
        "user": {"placement": "row_wise"},
        "genres": {"pooling": "mean", "placement": "column_wise"},
        "items": {"placement": "hybrid", "threshold": 9},
        "last": {"pooling": "concat", "placement": "hybrid", "threshold": 4},
    },
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"kind": "sgd", "lr": 0.1},
    "momentum": {"kind": "momentum", "lr": 0.03},
    "adagrad": {"kind": "adagrad", "lr": 0.05},
    "rowwise_adagrad": {"kind": "rowwise_adagrad", "lr": 0.05},
    "adam": {"kind": "adam", "lr": 0.01, "eps": 0.05},
    "ftrl": {"kind": "ftrl", "lr": 0.05},
}


def write_bags(
    folder: Path,
    seed: int,
    *,
    weighted: bool = False,
    bags: bool = True,
    layout: Layout = "raw",
    short: float = 0.0,
    ordered: bool = True,
) -> Path:
    """A set whose bags hold any number of keys up to the hotness; without ``bags`` all are full.

    Args:
        folder: of the set.
        seed: of its numbers.
        weighted: keys have weights.
        bags: some keys are missing.
        layout: of the files.
        short: part of the rows, the first ones of a split, whose bags hold one key at most.
        ordered: whether it says that rows are numbered by frequency.
    """
    rng = np.random.default_rng(seed)
    tables = [
        TableInfo(name=name, rows=rows, hotness=hotness, frequency_ordered=ordered)
        for name, (rows, hotness) in TABLES.items()
    ]
    with DatasetWriter(
        folder, name="bags", dense_names=["age", "price"], tables=tables, weighted=weighted, layout=layout
    ) as writer:
        for split, count in ROWS.items():
            columns = []
            for name, (rows, hotness) in TABLES.items():
                own = (rows * rng.random((count, hotness)) ** 2).astype(np.int64)
                if bags and name != "last":
                    lengths = rng.integers(0, hotness + 1, (count, 1))
                    lengths[: int(short * count)] = np.minimum(lengths[: int(short * count)], 1)
                    own[np.arange(hotness) >= lengths] = -1
                columns.append(own)
            keys = np.concatenate(columns, axis=1)
            labels = (keys[:, 0] + rng.integers(0, 30, count) > 25).astype(np.int32)
            dense = rng.random((count, 2)).astype(np.float32)
            weights = rng.uniform(-1, 2, keys.shape).astype(np.float32) if weighted else None
            writer.write(split, labels, dense, keys, weights)
        writer.finish()
    return folder
