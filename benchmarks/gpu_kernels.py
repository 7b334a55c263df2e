"""Every kernel of a training step on one GPU: time, bytes, operations, and how near it comes to what the chip allows.

    python benchmarks/gpu_kernels.py --batches 65536 6912 --json figures.json
    python benchmarks/gpu_kernels.py --only step

Embeddings are timed beside FBGEMM's where fbgemm_gpu can be imported. A case is captured into a CUDA graph and launched
alone; between launches the second-level cache is overwritten. The figure is the median. Floors come from this GPU's own
rates, measured first: a device copy and a plain product. How to read it: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cupy
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "peers")]

from exchange_kernels import exchange_cases  # noqa: E402
from step_operations import DenseStep, Operation  # noqa: E402

from dlrm import interaction_cuda, loss_cuda, optim, optim_cuda  # noqa: E402
from dlrm.config import ModelConfig, OptimizerConfig  # noqa: E402
from dlrm.cuda import CudaDevice  # noqa: E402
from dlrm.errors import CrosslaneError  # noqa: E402
from dlrm.model import DenseModel  # noqa: E402
from dlrm.scalars import SIZE, write_guard, write_scalars  # noqa: E402
from embedding import lookup_cuda, row_sort_cuda, sorted_update_cuda, sparse_optim  # noqa: E402
from embedding.row_sort import RowSort  # noqa: E402
from embedding.sparse_optim_cuda import sgd_bags, sgd_one_hot  # noqa: E402
from pipeline.generated import SHAPES  # noqa: E402

DIM, DENSE = 128, 13
BOTTOM, TOP = (512, 256, 128), (1024, 1024, 512, 256, 1)
DCN_HOTNESS = (3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1)
FLUSH_BYTES = 256 << 20
PARTS = ["step", "dense", "embedding", "exchange"]
FAST = "look-up and sgd, atomic additions"
HALF, FLOAT = np.float16, np.float32


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to time.

    Attributes:
        name: what it is.
        run: issues it on the current stream.
        bytes: that have to cross the memory's pins once, whatever the order.
        flop: operations of its products.
    """

    name: str
    run: Callable[[], None]
    bytes: float
    flop: float = 0.0


@dataclass(frozen=True, slots=True)
class Figure:
    """A case's result; ``floor_us`` is the longer of the times that bytes and operations need at the GPU's rates."""

    group: str
    name: str
    us: float
    megabytes: float
    gigaflop: float
    floor_us: float

    @property
    def share(self) -> float:
        """Floor over time."""
        return self.floor_us / self.us


class Clock:
    """Times captured work on one GPU.

    Args:
        device: the GPU.
        repetitions: launches of which the median is taken.
    """

    def __init__(self, device: CudaDevice, repetitions: int) -> None:
        self.device, self.repetitions = device, repetitions
        self._flush = cupy.empty(FLUSH_BYTES, np.uint8)
        self.bytes_per_us = self.flop_per_us = 1.0
        self.bytes_per_us = self._copy_rate(1 << 30)
        self.flop_per_us = self._product_rate(8192)

    def _copy_rate(self, size: int) -> float:
        source, target = cupy.zeros(size // 4, FLOAT), cupy.empty(size // 4, FLOAT)
        return 2 * size / self.median_us(lambda: cupy.copyto(target, source))

    def _product_rate(self, width: int) -> float:
        a = cupy.ones((width, width), HALF)
        out = cupy.empty_like(a)
        return 2 * width**3 / self.median_us(lambda: cupy.matmul(a, a, out=out), capture=False)

    def median_us(self, run: Callable[[], Any], *, capture: bool = True) -> float:
        """Microseconds on the GPU, each launch behind an emptied second-level cache."""
        for _ in range(3):
            run()  # compiles, chooses algorithms
        self.device.synchronize()
        launch = self.device.capture("main", run).launch if capture else run
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        times = []
        for _ in range(self.repetitions):
            self._flush.fill(0)
            begin.record()
            launch()
            end.record()
            end.synchronize()
            times.append(1000 * cupy.cuda.get_elapsed_time(begin, end))
        return statistics.median(times)

    def figure(self, group: str, case: Case) -> Figure:
        """Time a case."""
        floor = max(case.bytes / self.bytes_per_us, case.flop / self.flop_per_us)
        return Figure(group, case.name, self.median_us(case.run), case.bytes / 1e6, case.flop / 1e9, floor)


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


def dense_cases(batch: int, device: CudaDevice) -> Iterator[Case]:
    """The dense model's passes, loss and optimisers."""
    config = ModelConfig(embedding_dim=DIM, bottom_mlp=BOTTOM, top_mlp=TOP)
    model = DenseModel(model=config, num_dense=DENSE, num_tables=26, dtype=HALF, device=device, seed=1)
    work = model.workspace(batch)
    work.vectors.fill(0.01)
    dense = cupy.zeros((batch, model.dense_columns), HALF)

    def flop(widths: Sequence[int]) -> float:
        return 2.0 * batch * sum(a * b for a, b in itertools.pairwise(widths))

    bottom, top = flop((DENSE, *BOTTOM)), flop((DIM + 351, *TOP))
    crossing = 2.0 * batch * 27 * DIM
    yield Case("bottom forward", lambda: model.bottom_forward(dense, work), 2.0 * batch * sum(BOTTOM), bottom)
    yield Case("interaction + top forward", lambda: model.top_forward(work, batch), crossing, top)
    scalars = cupy.asarray(make_scalars(batch, dense=[0.9, 0.1, 0.999, 0.001, 1e-8, 0.1, 0.001]))
    guard = cupy.asarray(write_guard(np.empty(SIZE, FLOAT), 1024.0))
    partials = cupy.empty(loss_cuda.partials_of(batch))
    logits, labels, loss = cupy.zeros(batch, FLOAT), cupy.zeros(batch, FLOAT), cupy.zeros(1)

    def run_loss() -> None:
        loss_cuda.loss_and_gradient(logits, labels, work.grad_logits, loss, scalars, guard, partials)

    yield Case("loss", run_loss, 10.0 * batch)
    yield Case("top + interaction, data backward", lambda: model.top_data_backward(work, batch), 3 * crossing, top)
    yield Case("top, weight backward", lambda: model.top_weight_backward(work, batch), 2.0 * batch * sum(TOP), top)
    yield Case(
        "bottom backward", lambda: model.bottom_backward(dense, work, batch), 4.0 * batch * sum(BOTTOM), 2 * bottom
    )
    count, parameters, gradients = len(model.flat_parameters), model.flat_parameters, model.flat_gradients
    for kind, names in optim.STATE_NAMES.items():
        state = [cupy.full(count, 0.1, FLOAT) for _ in names]
        run = getattr(optim_cuda, kind)

        def step(run: Any = run, state: list[Any] = state) -> None:
            run(parameters, gradients, *state, model.flat_weights, scalars, guard)

        yield Case(f"dense {kind}", step, count * (4 + 8 + 2 + 8.0 * len(names)))
    yield Case("gradients finite?", lambda: optim_cuda.check_finite(gradients, guard), 4.0 * count)


def show(figures: Sequence[Figure]) -> None:
    """Print figures as a table."""
    for item in figures:
        rate = item.megabytes * 1e3 / item.us
        print(
            f"{item.name:44}{item.us:10.1f}{item.megabytes:10.1f}{item.gigaflop:10.1f}{item.floor_us:10.1f}"
            f"{item.share:8.0%}{rate:8.0f}",
            flush=True,
        )


def time_cases(clock: Clock, group: str, cases: Iterator[Case]) -> list[Figure]:
    """Time cases one after the other; one that the project refuses is said so and left out."""
    print(f"\n{group}\n{'':44}{'us':>10}{'MB':>10}{'GFLOP':>10}{'floor us':>10}{'share':>8}{'GB/s':>8}", flush=True)
    figures = []
    while True:
        try:
            case = next(cases, None)
            if case is None:
                break
            figures.append(clock.figure(group, case))
            show(figures[-1:])
        except CrosslaneError as error:
            print(f"  left out: {error}", flush=True)
    return figures


def run_all(options: argparse.Namespace) -> list[Figure]:
    """All groups that were asked for."""
    device = CudaDevice(0)
    clock = Clock(device, options.repetitions)
    print(
        f"{device.name}: copies {clock.bytes_per_us / 1e6:.2f} TB/s, products {clock.flop_per_us / 1e6:.0f} TFLOP/s; "
        f"tables of at most {options.cap} rows, medians of {options.repetitions}"
    )
    rows = [min(size, options.cap) for size in SHAPES["criteo-terabyte"]]
    figures = []
    for batch in options.batches:
        if "dense" in options.only:
            figures += time_cases(clock, f"dense, batch {batch}", dense_cases(batch, device))
        for exponent in options.exponents:
            law = f"power law {exponent}" if exponent else "uniform"
            if "step" in options.only:
                figures += time_step(clock, rows, batch, exponent, law)
                gc.collect()
                cupy.get_default_memory_pool().free_all_blocks()
            if "exchange" in options.only:
                keys = draw_keys(np.random.default_rng(1), rows, [2 * batch] * len(rows), exponent)
                cases = (Case(*timed) for timed in exchange_cases(rows, keys, batch, device))
                figures += time_cases(clock, f"exchange of two ranks, batch {batch} each, {law}", cases)
                del keys, cases
                gc.collect()
                cupy.get_default_memory_pool().free_all_blocks()
            shapes = {"one-hot": (1,) * 26, "DCNv2": DCN_HOTNESS}
            for name, hotness in shapes.items() if "embedding" in options.only else ():
                tables = Tables(rows, hotness, batch, exponent, FLOAT)
                kinds = ["rowwise_adagrad", "sgd"] if name == "DCNv2" else options.kinds
                group = f"{name}, batch {batch}, {law}, float32 tables"
                figures += time_cases(clock, group, embedding_cases(tables, kinds, device))
                if name == "one-hot":
                    figures += time_cases(clock, f"interaction, batch {batch}, {law}", interaction_cases(tables))
                if options.fbgemm:
                    kind = "sgd" if name == "one-hot" else "rowwise_adagrad"
                    own = {figure.name: figure.us for figure in figures if figure.group == group}
                    figures += peer(tables, group, kind, own, clock)
                del tables
                gc.collect()
                cupy.get_default_memory_pool().free_all_blocks()
                if name == "one-hot":
                    tables = Tables(rows, hotness, batch, exponent, HALF)
                    group = f"{name}, batch {batch}, {law}, float16 tables"
                    figures += time_cases(clock, group, embedding_cases(tables, ["sgd"], device))
                    del tables
                    gc.collect()
                    cupy.get_default_memory_pool().free_all_blocks()
    return figures


def peer(tables: Tables, group: str, kind: str, own: dict[str, float], clock: Clock) -> list[Figure]:
    """FBGEMM's forms on the same keys, and how many times as long its best one takes.

    The memory of this project's tables is given back first.
    """
    import fbgemm_tables

    tables.weight = None
    gc.collect()
    cupy.get_default_memory_pool().free_all_blocks()
    figures = [
        Figure(f"FBGEMM: {group}", name, us, 0.0, 0.0, 0.0)
        for name, us in fbgemm_tables.measure(
            tables.rows, DIM, tables.host_keys, tables.host_offsets, tables.batch, kind, clock.repetitions
        )
    ]
    print(f"\nFBGEMM: {group}")
    for figure in figures:
        print(f"{figure.name:44}{figure.us:10.1f}", flush=True)
    forward = min(figure.us for figure in figures if figure.name.endswith("forward"))
    step = min(figure.us for figure in figures if figure.name.endswith("update"))
    for name, theirs in (("look-up", forward), (FAST, step), (f"{kind}: look-up, sort and update", step)):
        if name in own and (name != FAST or kind == "sgd"):
            print(f"{name:44}{theirs / own[name]:9.2f}x as fast as FBGEMM's best", flush=True)
    return figures


def fbgemm_is_here() -> bool:
    """Whether FBGEMM can be imported; says so if not."""
    try:
        import fbgemm_tables  # noqa: F401
    except (ImportError, OSError) as error:
        print(f"FBGEMM is left out: {error}")
        return False
    return True


def step_cases(rows: Sequence[int], batch: int, exponent: float) -> Iterator[Case]:
    """Every operation of a training step, in order: one-hot, float32 tables, SGD by atomic additions."""
    tables = Tables(rows, (1,) * len(rows), batch, exponent, FLOAT)
    scalars = cupy.asarray(make_scalars(batch, sparse=[1e-3]))
    guard = cupy.asarray(write_guard(np.empty(SIZE, FLOAT), 1.0))
    config = ModelConfig(embedding_dim=DIM, bottom_mlp=BOTTOM, top_mlp=TOP)
    dense = DenseStep(batch, len(rows), config, DENSE, scalars, guard)
    tables.vectors, tables.gradients = dense.work.vectors, dense.work.grad_vectors
    look_up, update = tables.lookup(), tables.atomic_sgd(scalars, guard)
    for item in dense.operations([_as_operation(look_up)], [_as_operation(update)]):
        yield Case(item.name, item.run, item.bytes, item.flop)


def _as_operation(case: Case) -> Operation:
    return Operation(f"embeddings: {case.name}", case.run, case.bytes, case.flop)


def time_step(clock: Clock, rows: Sequence[int], batch: int, exponent: float, law: str) -> list[Figure]:
    """The table of a whole step, with the sum of its lines."""
    figures = time_cases(clock, f"whole step, batch {batch}, {law}", step_cases(rows, batch, exponent))
    parts = figures[:-1]
    total = sum(figure.us for figure in parts)
    floor = sum(figure.floor_us for figure in parts)
    print(f"{'sum of all but the last line':44}{total:10.1f}{'':20}{floor:10.1f}{floor / total:8.0%}", flush=True)
    return figures


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[65536, 6912])
    parser.add_argument("--exponents", type=float, nargs="+", default=[1.1, 0.0], help="0: uniform keys")
    parser.add_argument("--cap", type=int, default=4_000_000, help="most rows of a table")
    parser.add_argument("--kinds", nargs="+", default=list(sparse_optim.KINDS), help="optimisers of one-hot tables")
    parser.add_argument("--only", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--no-fbgemm", dest="fbgemm", action="store_false", help="leave FBGEMM out where it is")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.fbgemm = options.fbgemm and "embedding" in options.only and fbgemm_is_here()
    figures = run_all(options)
    if options.json:
        options.json.write_text(json.dumps([asdict(figure) for figure in figures], indent=1))


if __name__ == "__main__":
    main()
