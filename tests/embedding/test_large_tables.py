"""Tables of more than 2^31 numbers, in sparse files: what lies beyond is reached as in a small table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dlrm.config import OptimizerConfig
from dlrm.device import HostDevice
from dlrm.philox import uniform_rows
from embedding.lookup import gather_pool
from embedding.sparse_optim import KINDS, UpdateScratch, state_specs, update_rows
from pipeline.checkpoint_parts import parts_of, write_part

DIM = 500  # does not divide 2^31: a row lies on both sides of it
EDGE = 2**31 // DIM
ROWS = EDGE + 1000
FAR = np.array([0, 1, EDGE - 1, EDGE, EDGE + 1, ROWS - 2, ROWS - 1])
NO_OFFSETS, NO_WEIGHTS = np.empty(0, np.int64), np.empty(0, np.float32)
ONE = np.zeros(1, np.int64)


def sparse(path: Path, columns: int = DIM) -> np.ndarray:
    """[ROWS, columns] zeros that take no room until they are written."""
    array = np.memmap(path, np.float32, "w+", shape=(ROWS, columns))
    assert ROWS * DIM > 2**31 > EDGE * DIM
    return array


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_far_rows_are_looked_up_and_updated_as_near_ones(
    kind: str, threads: int, tmp_path: Path, rng: np.random.Generator
) -> None:
    device, optimizer = HostDevice(threads), OptimizerConfig(kind=kind)  # type: ignore[arg-type]
    large = {"weight": sparse(tmp_path / "weight")}
    for spec in state_specs(optimizer):
        large[spec.name] = sparse(tmp_path / spec.name, 1 if spec.per_row else DIM)
    small = {name: rng.random((len(FAR), array.shape[1]), np.float32) for name, array in large.items()}
    for name, array in large.items():
        array[FAR] = small[name]
    places = rng.integers(0, len(FAR), 64)
    places[: len(FAR)] = np.arange(len(FAR))
    found = {}
    for size, tables, keys in (("large", large, FAR[places]), ("small", small, places)):
        vectors, gradients = np.empty((64, 1, DIM), np.float32), np.ones((64, 1, DIM), np.float32)
        gradients *= np.linspace(-1, 1, 64, dtype=np.float32)[:, None, None]
        rows = len(tables["weight"])
        arguments = (ONE, keys, NO_OFFSETS, NO_WEIGHTS, np.zeros(1, bool), ONE, 64)
        gather_pool(tables["weight"], *arguments, vectors, device=device)
        state = {name: array for name, array in tables.items() if name != "weight"}
        update_rows(
            optimizer, tables["weight"], state, *arguments, gradients, lr=0.1, step=3,
            scratch=UpdateScratch.create(rows), device=device,
        )  # fmt: skip
        found[size] = vectors
    np.testing.assert_array_equal(found["large"], found["small"])
    assert (found["small"][:, 0] > 0).any(axis=1).all()
    for name, array in large.items():
        np.testing.assert_array_equal(array[FAR], small[name])
    assert not np.asarray(large["weight"][[2, EDGE - 2, EDGE + 2, ROWS - 3]]).any()


def test_far_rows_start_from_their_numbers(tmp_path: Path, seed: int) -> None:
    table, first = sparse(tmp_path / "weight"), EDGE - 20
    uniform_rows(seed, "table.t", ROWS - first, DIM, np.float32, start=first, out=table[first:])
    for row in (first, EDGE, ROWS - 1):
        alone = uniform_rows(seed, "table.t", 1, DIM, np.float32, start=row)[0]
        np.testing.assert_array_equal(table[row], alone)
        assert alone.any()


def test_far_rows_are_saved(tmp_path: Path, rng: np.random.Generator) -> None:
    table = sparse(tmp_path / "weight")
    table[FAR] = rng.random((len(FAR), DIM), np.float32)
    (part,) = parts_of("table.t", table, FAR, {})
    folder = tmp_path / "rank-0000"
    folder.mkdir()
    entry = write_part(folder, part, {})
    assert entry.count == len(FAR)
    assert entry.numbers is not None
    np.testing.assert_array_equal(np.load(tmp_path / entry.numbers.file), FAR)
    np.testing.assert_array_equal(np.load(tmp_path / entry.stored.file), table[FAR])
