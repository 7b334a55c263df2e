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
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cupy
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "peers")]

from exchange_kernels import exchange_cases  # noqa: E402
from gpu_clock import FLOAT, HALF, Case, Clock, Figure, time_cases  # noqa: E402
from gpu_tables import (  # noqa: E402
    DIM,
    FAST,
    Tables,
    draw_keys,
    embedding_cases,
    interaction_cases,
    make_scalars,
)
from step_operations import DenseStep, Operation  # noqa: E402

from dlrm import loss_cuda, optim, optim_cuda  # noqa: E402
from dlrm.config import ModelConfig  # noqa: E402
from dlrm.cuda import CudaDevice  # noqa: E402
from dlrm.model import DenseModel  # noqa: E402
from dlrm.scalars import SIZE, write_guard  # noqa: E402
from embedding import sparse_optim  # noqa: E402
from pipeline.generated import SHAPES  # noqa: E402

DENSE = 13
BOTTOM, TOP = (512, 256, 128), (1024, 1024, 512, 256, 1)
DCN_HOTNESS = (3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1)
PARTS = ["step", "dense", "embedding", "exchange"]


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
