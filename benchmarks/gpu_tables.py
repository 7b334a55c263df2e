"""Cases of look-up, update and interaction for the clock of GPU benchmarks: tables with a batch's bags on the GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import cupy
import numpy as np
from gpu_clock import FLOAT, HALF, Case

from dlrm import interaction_cuda
from dlrm.config import OptimizerConfig
from dlrm.cuda import CudaDevice
from dlrm.scalars import SIZE, write_guard, write_scalars
from embedding import lookup_cuda, row_sort_cuda, sorted_update_cuda, sparse_optim
from embedding.row_sort import RowSort
from embedding.sparse_optim_cuda import sgd_bags, sgd_one_hot

DIM = 128
FAST = "look-up and sgd, atomic additions"


def draw_keys(rng: np.random.Generator, rows: Sequence[int], counts: Sequence[int], exponent: float) -> list[Any]:
    """Row numbers of each table: a power law of that exponent over its rows, or with 0 evenly."""
    keys = []
    for size, count in zip(rows, counts, strict=True):
        draw = rng.random(count)
        if exponent:
            power = 1.0 - exponent
            draw = ((1 + draw * ((size + 1.0) ** power - 1)) ** (1 / power) - 1) / size
        keys.append(np.minimum((draw * size).astype(np.int64), size - 1).astype(np.int32))
    return keys


class Tables:
    """MLPerf's tables with a batch's bags, on the GPU.

    Args:
        rows: of each table.
        hotness: keys a bag of each table.
        batch: B.
        exponent: of the keys' power law; 0: evenly.
        dtype: of the weights.
    """

    def __init__(self, rows: Sequence[int], hotness: Sequence[int], batch: int, exponent: float, dtype: Any) -> None:
        rng = np.random.default_rng(1)
        self.batch, self.hotness, self.rows = batch, hotness, rows
        self.row_start = cupy.asarray(np.cumsum(rows) - np.asarray(rows))
        drawn = draw_keys(rng, rows, [batch * hot for hot in hotness], exponent)
        self.distinct = sum(len(np.unique(own)) for own in drawn)
        self.host_keys = np.concatenate(drawn)
        self.keys = cupy.asarray(self.host_keys)
        lengths = np.repeat(np.asarray(hotness), batch)
        self.host_offsets = np.concatenate([[0], np.cumsum(lengths)])
        one_hot = max(hotness) == 1
        self.offsets = cupy.asarray(np.empty(0, np.int64) if one_hot else self.host_offsets)
        self.no_weights = cupy.empty(0, FLOAT)
        self.mean, self.place = cupy.zeros(len(rows), bool), cupy.arange(1, len(rows) + 1)
        self.weight = cupy.zeros((int(np.sum(rows)), DIM), dtype)
        self.vectors = cupy.zeros((batch, len(rows) + 1, DIM), HALF)
        self.gradients = cupy.full((batch, len(rows) + 1, DIM), 1e-3, HALF)
        origins = [(table, 0, 1, 0, int(np.sum(rows[:table]))) for table in range(len(rows))]
        self.origins = cupy.asarray(np.array(origins, np.int64))

    @property
    def bags_bytes(self) -> float:
        """Pooled vectors or their gradients, in half precision."""
        return 2.0 * self.batch * len(self.rows) * DIM

    @property
    def rows_bytes(self) -> float:
        """Rows that the batch names, each once."""
        return float(self.distinct * DIM * self.weight.dtype.itemsize)

    def lookup(self) -> Case:
        """Gather and pool."""

        def run() -> None:
            lookup_cuda.gather_pool(
                self.weight, self.row_start, self.keys, self.offsets, self.no_weights, self.mean, self.place,
                self.batch, self.vectors,
            )  # fmt: skip

        return Case("look-up", run, self.rows_bytes + self.bags_bytes + self.keys.nbytes)

    def atomic_sgd(self, scalars: Any, guard: Any) -> Case:
        """The update by atomic additions."""

        def run() -> None:
            rest = (self.place, self.batch, self.gradients, scalars, guard)
            if len(self.offsets) == 0:
                sgd_one_hot(self.weight, self.row_start, self.keys, *rest)
            else:
                bags = (self.keys, self.offsets, self.no_weights, self.mean)
                sgd_bags(self.weight, self.row_start, *bags, *rest)

        return Case("sgd, atomic additions", run, 2 * self.rows_bytes + self.bags_bytes + self.keys.nbytes)

    def sorted_update(self, kind: str, guard: Any, device: CudaDevice) -> Iterator[Case]:
        """The sort, and the update in its order."""
        optimizer = OptimizerConfig(kind=kind)  # type: ignore[arg-type]
        numbers = sparse_optim.constants(optimizer, 1e-3, 1).tolist()
        scalars = cupy.asarray(make_scalars(self.batch, sparse=numbers))
        total = len(self.weight)
        sort = RowSort.create(device, len(self.keys), total, DIM, weighted=False)
        state = [
            cupy.full((total, 1 if item.per_row else DIM), 0.1, FLOAT) for item in sparse_optim.state_specs(optimizer)
        ]
        state_bytes = sum(2.0 * 4 * self.distinct * array.shape[1] for array in state)
        named = (self.row_start, self.keys, self.offsets, self.no_weights)

        def sort_rows() -> None:
            row_sort_cuda.sort_rows(*named, self.batch, total, sort)

        def both() -> None:
            sort_rows()
            sorted_update_cuda.update_sorted(
                kind, self.weight, state, *named, self.mean, self.place, self.batch, self.gradients, self.origins,
                scalars, guard, sort,
            )  # fmt: skip

        look_up = self.lookup()

        def all_three() -> None:
            look_up.run()
            both()

        size = 2 * self.rows_bytes + state_bytes + self.bags_bytes + self.keys.nbytes
        yield Case(f"{kind}: sort", sort_rows, 3.0 * self.keys.nbytes)
        yield Case(f"{kind}: sort and update", both, size)
        yield Case(f"{kind}: look-up, sort and update", all_three, size + look_up.bytes)


def make_scalars(batch: int, **values: Any) -> np.ndarray:
    """The host's block of scalars for one step."""
    return write_scalars(
        np.empty(SIZE, FLOAT), lr=1e-3, global_rows=batch, valid_rows=batch, step=1, seed=1, **values
    )  # fmt: skip


def embedding_cases(tables: Tables, kinds: Sequence[str], device: CudaDevice) -> Iterator[Case]:
    """Look-up and updates."""
    guard = cupy.asarray(write_guard(np.empty(SIZE, FLOAT), 1.0))
    look_up = tables.lookup()
    yield look_up
    if tables.weight.dtype == FLOAT:
        atomic = tables.atomic_sgd(cupy.asarray(make_scalars(tables.batch, sparse=[1e-3])), guard)
        yield atomic

        def both() -> None:
            look_up.run()
            atomic.run()

        yield Case(FAST, both, look_up.bytes + atomic.bytes)
    for kind in kinds:
        yield from tables.sorted_update(kind, guard, device)


def interaction_cases(tables: Tables) -> Iterator[Case]:
    """The interaction alone, and fused with the look-up."""
    vectors, batch = tables.vectors.shape[1], tables.batch
    width = DIM + vectors * (vectors - 1) // 2
    out = cupy.zeros((batch, -(-width // 8) * 8), HALF)
    view, gradient = out[:, :width], cupy.empty_like(tables.vectors)
    flop = 2.0 * batch * vectors * vectors * DIM
    size, crossed = float(tables.vectors.nbytes), float(out.nbytes)
    yield Case(
        "interaction forward",
        lambda: interaction_cuda.interaction_forward(tables.vectors, view, 1),
        size + crossed,
        flop,
    )
    yield Case(
        "interaction backward",
        lambda: interaction_cuda.interaction_backward(tables.vectors, view, gradient, 1),
        2 * size + crossed,
        2 * flop,
    )
    bottom = tables.vectors[:, 0]

    def fused() -> None:
        interaction_cuda.gather_interaction(bottom, tables.weight, tables.row_start, tables.keys, batch, view, 1)

    yield Case("look-up + interaction", fused, tables.rows_bytes + crossed + tables.keys.nbytes, flop)
