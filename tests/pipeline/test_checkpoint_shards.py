"""Tables of any plan are saved in row order and loaded by any other plan on any number of ranks."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

from dlrm.config import OptimizerConfig
from dlrm.device import HostDevice
from dlrm.errors import CheckpointError
from embedding.hybrid import HybridEmbedding
from embedding.placement import Placement, Plan, TableSpec
from pipeline.checkpoint import open_checkpoint, save_checkpoint
from pipeline.checkpoint_shards import pieces_of_shards, read_shards

on_ranks = runpy.run_path(str(Path(__file__).with_name("thread_ranks.py")))["run_ranks"]

DIM = 8
SPECS = tuple(TableSpec(name=f"C{i}", rows=rows, dim=DIM) for i, rows in enumerate((1, 2, 13, 40)))
SHAPES = {spec.name: (spec.rows, spec.dim) for spec in SPECS}


def placement(kind, spec, ranks, threshold):
    if kind == "column_wise":
        return Placement(kind=kind, owners=tuple(part % ranks for part in range(4)))
    if kind == "hybrid" and spec.rows == 1:
        kind = "row_wise"
    limits = {"hybrid": min(threshold, spec.rows - 1), "replicated": spec.rows}
    return Placement(kind=kind, owner=ranks - 1 if kind == "table_wise" else 0, threshold=limits.get(kind, 0))


def embedding(comm, kind, optimizer, threshold, seed, dtype=np.float32):
    return HybridEmbedding(
        specs=SPECS,
        plan=Plan(
            specs=SPECS,
            placements=tuple(placement(kind, spec, comm.size, threshold) for spec in SPECS),
            ranks=comm.size,
        ),
        comm=comm,
        device=HostDevice(compiled=False),
        optimizer=OptimizerConfig(kind=optimizer),
        dtype=dtype,
        seed=seed,
        first=0,
    )


def put(shards, tables):
    """Every shard gets its part of the tables, by plain indexing."""
    for shard in shards:
        where = np.ix_(list(shard.rows), list(shard.columns))
        shard.weight[...] = tables[f"table.{shard.table}"][where]
        for key, array in shard.state.items():
            whole = tables[f"table.{shard.table}.{key}"]
            array[...] = whole[where] if array.ndim == 2 else whole[list(shard.rows)]


def some_tables(rng, optimizer, dtype=np.float32):
    states = {
        "sgd": {},
        "momentum": {"velocity": DIM},
        "adagrad": {"accumulator": DIM},
        "adam": {"m": DIM, "v": DIM},
        "rowwise_adagrad": {"accumulator": 0},
        "ftrl": {"n": DIM, "z": DIM},
    }
    tables = {}
    for name, (rows, dim) in SHAPES.items():
        tables[f"table.{name}"] = rng.normal(size=(rows, dim)).astype(dtype)
        for key, width in states[optimizer].items():
            tables[f"table.{name}.{key}"] = rng.normal(size=(rows, dim) if width else rows).astype(dtype)
    return tables


def save(directory, kind, optimizer, ranks, tables, threshold=3):
    def work(comm):
        shards = embedding(comm, kind, optimizer, threshold, seed=1).shards()
        put(shards, tables)
        pieces = pieces_of_shards(shards, SHAPES, comm.rank)
        return save_checkpoint(directory, step=1, tensors=pieces, meta={}, comm=comm)

    paths = on_ranks(ranks, work)
    assert isinstance(paths[0], Path), paths
    return paths[0]


KINDS = ["replicated", "table_wise", "row_wise", "column_wise", "hybrid"]


OPTIMIZERS = ["sgd", "momentum", "adagrad", "rowwise_adagrad", "adam", "ftrl"]
# No owner of columns sees a whole row.
CASES = [(kind, optimizer) for kind in KINDS for optimizer in OPTIMIZERS]
CASES.remove(("column_wise", "rowwise_adagrad"))


@pytest.mark.parametrize(("kind", "optimizer"), CASES)
def test_a_run_on_four_ranks_resumes_with_any_plan_on_any_number(rng, tmp_path, kind, optimizer) -> None:
    tables = some_tables(rng, optimizer)
    path = save(tmp_path, kind, optimizer, 4, tables)
    checkpoint = open_checkpoint(path)
    assert set(checkpoint.names) == set(tables)
    for name, array in tables.items():
        np.testing.assert_array_equal(checkpoint.read(name), array)

    def load(comm, other, threshold):
        shards = embedding(comm, other, optimizer, threshold, seed=2).shards()
        read_shards(checkpoint, shards, SHAPES, states=True)
        held = [(shard.weight.copy(), {key: array.copy() for key, array in shard.state.items()}) for shard in shards]
        put(shards, tables)  # the same by plain indexing
        for shard, (weight, state) in zip(shards, held, strict=True):
            np.testing.assert_array_equal(weight, shard.weight)
            assert set(state) == set(shard.state)
            for key, array in state.items():
                np.testing.assert_array_equal(array, shard.state[key])
        return sum(shard.weight.size for shard in shards)

    for ranks in (1, 2, 3, 8):
        for other in KINDS:
            if (other, optimizer) not in CASES:
                continue
            sizes = on_ranks(ranks, lambda comm, other=other: load(comm, other, int(rng.integers(1, 30))))
            assert all(isinstance(size, int) for size in sizes), sizes
            assert sum(sizes) >= sum(rows * dim for rows, dim in SHAPES.values())


def test_weights_of_another_precision_are_converted_and_states_left_out(rng, tmp_path) -> None:
    tables = some_tables(rng, "adam")
    checkpoint = open_checkpoint(save(tmp_path, "row_wise", "adam", 2, tables))

    def load(comm):
        shards = embedding(comm, "hybrid", "adam", 5, seed=2, dtype=np.float64).shards()
        read_shards(checkpoint, shards, SHAPES, states=False)
        for shard in shards:
            np.testing.assert_array_equal(shard.weight, tables[f"table.{shard.table}"][list(shard.rows)])
            assert not any(array.any() for array in shard.state.values())
        return len(shards)

    assert all(count > 0 for count in on_ranks(3, load))


def test_a_table_of_another_shape_is_named(rng, tmp_path) -> None:
    checkpoint = open_checkpoint(save(tmp_path, "row_wise", "sgd", 2, some_tables(rng, "sgd")))
    shards = on_ranks(1, lambda comm: embedding(comm, "table_wise", "sgd", 0, seed=1).shards())[0]
    shapes = {**SHAPES, "C2": (14, DIM)}
    with pytest.raises(CheckpointError, match=r"table\.C2 has shape \[13, 8\], but the model needs \[14, 8\]"):
        read_shards(checkpoint, shards, shapes, states=True)
