"""Forms of the embedding kernels that only a measurement can choose between, beside each other on one GPU.

    python benchmarks/gpu_variants.py
    python benchmarks/gpu_variants.py --batches 6912 --exponents 0

Cases, keys and clock are those of gpu_kernels.py. What stands in the kernels' modules is the first line of each table.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable

import cupy
import numpy as np
from gpu_clock import Clock
from gpu_kernels import DCN_HOTNESS, SHAPES
from gpu_tables import Tables

from dlrm.cuda import CudaDevice
from dlrm.scalars import SIZE, write_guard
from embedding import lookup_cuda, sorted_update_cuda

POOL = [
    {},
    {"POOL_THREADS": 384},
    {"POOL_THREADS": 256, "POOL_BLOCKS": 3},
    {"POOL_THREADS": 512},
    {"POOL_THREADS": 512, "AHEAD": 4},
    {"POOL_THREADS": 256, "AHEAD": 16},
    {"PREFETCH": 1},
    {"POOL_THREADS": 512, "AHEAD": 4, "PREFETCH": 1},
    {"TASK": 64},
    {"TASK": 256},
    {"TASK": 1024},
]
"""Changes of ``lookup_cuda.POOL``."""
SUM = [
    {},
    {"CACHED": 0},
    {"SUM_BLOCKS": 2},
    {"SUM_BLOCKS": 4},
    {"MOST_AHEAD": 4, "SUM_BLOCKS": 4},
    {"MOST_AHEAD": 16, "SUM_BLOCKS": 2},
]
"""Changes of ``sorted_update_cuda.SUM``."""


def compare(title: str, settings: dict[str, int], changes: list[dict[str, int]], time: Callable[[], float]) -> None:
    """Time every change of a module's settings, which are put back."""
    print(f"\n{title}", flush=True)
    default = dict(settings)
    for change in changes:
        settings.update(default | change)
        print(f"  {' '.join(f'{name}={value}' for name, value in settings.items()):60}{time():10.1f} us", flush=True)
    settings.update(default)


def updates(tables: Tables, kind: str, title: str, clock: Clock) -> None:
    """Sort, and sort and update."""
    guard = cupy.asarray(write_guard(np.empty(SIZE, np.float32), 1.0))
    sort, both, _ = tables.sorted_update(kind, guard, clock.device)
    floor, of_sort = both.bytes / clock.bytes_per_us, sort.bytes / clock.bytes_per_us
    print(f"\n{title}: sort alone {clock.median_us(sort.run):.1f} us (floor {of_sort:.0f})")
    compare(
        f"{title}: sort and update (floor {floor:.0f} us)",
        sorted_update_cuda.SUM,
        SUM,
        lambda: clock.median_us(both.run),
    )


def pooled_look_ups(rows: list[int], batch: int, law: float, clock: Clock) -> None:
    """The DCNv2 shape."""
    for dtype in (np.float32, np.float16):
        tables = Tables(rows, DCN_HOTNESS, batch, law, dtype)
        case = tables.lookup()
        floor = case.bytes / clock.bytes_per_us
        title = f"pooled look-up, batch {batch}, law {law}, {np.dtype(dtype).name} tables (floor {floor:.0f} us)"
        compare(title, lookup_cuda.POOL, POOL, lambda case=case: clock.median_us(case.run))
        if dtype == np.float32:
            updates(tables, "rowwise_adagrad", f"DCNv2, batch {batch}, law {law}, row-wise Adagrad", clock)
        del tables, case
        free()


def one_hot_look_ups(rows: list[int], batch: int, law: float, clock: Clock) -> None:
    """Rows copied, and the same through the kernel for bags."""
    for dtype in (np.float32, np.float16):
        tables = Tables(rows, (1,) * len(rows), batch, law, dtype)
        case = tables.lookup()
        floor = case.bytes / clock.bytes_per_us
        print(f"\none-hot look-up, batch {batch}, law {law}, {np.dtype(dtype).name} tables (floor {floor:.0f} us)")
        print(f"  {'copy':60}{clock.median_us(case.run):10.1f} us")
        none, tables.offsets = tables.offsets, cupy.asarray(tables.host_offsets)
        print(f"  {'as bags':60}{clock.median_us(case.run):10.1f} us", flush=True)
        tables.offsets = none
        for kind in ("sgd", "rowwise_adagrad") if dtype == np.float32 else ("sgd",):
            updates(tables, kind, f"one-hot, batch {batch}, law {law}, {np.dtype(dtype).name} tables, {kind}", clock)
        del tables, case
        free()


def free() -> None:
    """Give memory back before the next tables."""
    gc.collect()
    cupy.get_default_memory_pool().free_all_blocks()


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[65536, 6912])
    parser.add_argument("--exponents", type=float, nargs="+", default=[1.1, 0.0], help="0: uniform keys")
    parser.add_argument("--cap", type=int, default=4_000_000, help="most rows of a table")
    parser.add_argument("--repetitions", type=int, default=20)
    options = parser.parse_args()
    device = CudaDevice(0)
    clock = Clock(device, options.repetitions)
    print(f"{device.name}: copies {clock.bytes_per_us / 1e6:.2f} TB/s, medians of {options.repetitions}")
    rows = [min(size, options.cap) for size in SHAPES["criteo-terabyte"]]
    for batch in options.batches:
        for law in options.exponents:
            pooled_look_ups(rows, batch, law, clock)
            one_hot_look_ups(rows, batch, law, clock)


if __name__ == "__main__":
    main()
