"""Tables over several GPUs: the time of every part of the embedding lane, and a GPU's rate beside one alone.

    mpirun -np 2 --bind-to none python -m mpi4py benchmarks/gpu_exchange.py --batch 65536 6912

Every part is captured into a CUDA graph and launched by all ranks at once; figures are medians of the slowest rank.
"Alone" is the same program over one rank's batch on every GPU by itself, in the same run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.threads import launched_ranks, settle_threads

settle_threads()

import cupy  # noqa: E402
import numpy as np  # noqa: E402

from dlrm.config import OptimizerConfig  # noqa: E402
from dlrm.cuda import CudaDevice  # noqa: E402
from dlrm.scalars import SIZE, write_guard, write_scalars  # noqa: E402
from embedding.captured_exchange import ExchangedEmbedding  # noqa: E402
from embedding.captured_placement import owner_shares  # noqa: E402
from embedding.comm import Comm, SingleComm  # noqa: E402
from embedding.comm_mpi import world  # noqa: E402
from embedding.comm_nccl import NcclComm  # noqa: E402
from embedding.exchange_buffers import ExchangeBuffers  # noqa: E402
from embedding.frequency import Frequency  # noqa: E402
from embedding.links import PUBLISHED  # noqa: E402
from embedding.placement import Plan, TableSpec  # noqa: E402
from embedding.plan import make_plans  # noqa: E402
from embedding.sparse_optim import constants  # noqa: E402
from embedding.topology import discover  # noqa: E402
from pipeline.generated import SHAPES  # noqa: E402

DIM, FIRST = 128, 1


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[65536, 6912], help="rows of every GPU")
    parser.add_argument("--cap", type=int, default=4_000_000, help="most rows of a table")
    parser.add_argument("--exponent", type=float, default=1.1, help="of the power law of the keys")
    parser.add_argument("--precision", default="fp16", choices=["fp32", "fp16"], help="of the vectors")
    parser.add_argument("--optimizer", default="sgd")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--placement", default="auto", choices=["auto", "table_wise", "row_wise"], help="auto: what a plan picks"
    )
    return parser.parse_args()


def make_plan(options: argparse.Namespace, ranks: int, global_rows: int) -> Plan:
    """The tables' placements on the published rates of an H100's links."""
    rows = [min(size, options.cap) for size in SHAPES["criteo-terabyte"]]
    specs = tuple(TableSpec(name=f"c{i}", rows=size, dim=DIM) for i, size in enumerate(rows))
    forced: Any = {} if options.placement == "auto" else {spec.name: options.placement for spec in specs}
    plans = make_plans(
        specs, ranks, batch_size=global_rows, optimizer=OptimizerConfig(kind=options.optimizer), placements=forced,
        frequencies={spec.name: Frequency.power_law(spec.rows, options.exponent) for spec in specs},
        exchange_itemsize=2 if options.precision == "fp16" else 4, links=PUBLISHED["h100"], deduplicate=False,
    )  # fmt: skip
    return plans[0]


def draw(rng: np.random.Generator, plan: Plan, global_rows: int, exponent: float) -> np.ndarray:
    """[T, G] int32 keys of a power law."""
    keys = np.empty((len(plan.specs), global_rows), np.int32)
    for table, spec in enumerate(plan.specs):
        u, end = rng.random(global_rows), np.log(spec.rows + 1.0)
        x = np.exp(u * end) if exponent == 1.0 else np.log1p(u * np.expm1((1 - exponent) * end)) / (1 - exponent)
        value = x if exponent == 1.0 else np.exp(x)
        keys[table] = np.clip(value.astype(np.int64) - 1, 0, spec.rows - 1)
    return keys


class Lane:
    """The embedding lane of one rank with one batch."""

    def __init__(self, options: argparse.Namespace, plan: Plan, comm: Comm, device: CudaDevice, rows: int) -> None:
        self.rows, self.total, self.device = rows, rows * comm.size, device
        keys = draw(np.random.default_rng(1), plan, self.total, options.exponent)
        optimizer = OptimizerConfig(kind=options.optimizer)
        self.embedding = ExchangedEmbedding(
            plan=plan, comm=comm, topology=None, device=device, optimizer=optimizer, table_dtype=np.float32, seed=None,
            first=FIRST, deterministic=options.deterministic, shares=owner_shares(plan, list(keys)),
        )  # fmt: skip
        shape = (rows, FIRST + len(plan.specs), DIM)
        dtype = np.float16 if options.precision == "fp16" else np.float32
        vectors, gradients = device.zeros(shape, dtype), device.empty(shape, dtype)
        gradients.fill(1e-3)
        self.buffers: ExchangeBuffers = self.embedding.buffers(rows, vectors, gradients)
        device.upload(keys.reshape(-1), self.buffers.keys)
        self.scalars = cupy.asarray(
            write_scalars(
                np.empty(SIZE, np.float32), lr=0.1, global_rows=self.total, valid_rows=rows, step=1, seed=1,
                sparse=constants(optimizer, 0.1, 1).tolist(),
            )
        )  # fmt: skip
        self.guard = cupy.asarray(write_guard(np.empty(SIZE, np.float32), 1024.0))

    def parts(self) -> dict[str, Callable[[], None]]:
        """What a step does, and all of it."""
        one, own = self.embedding, self.buffers
        stages: dict[str, Callable[[], None]] = {
            "input_dist": lambda: one.input_dist(own, self.rows, self.total),
            "lookup": lambda: one.lookup(own),
            "output_dist": lambda: one.output_dist(own),
            "sum_replicated": lambda: one.sum_replicated(own),
            "grad_dist": lambda: one.grad_dist(own),
            "reduce_replicated": lambda: one.reduce_replicated(own),
            "sparse_update": lambda: one.sparse_update(own, self.scalars, self.guard),
        }

        def everything() -> None:
            for stage in stages.values():
                stage()

        return {**stages, "all of it": everything}


def measure(lane: Lane, host: Comm, repeats: int) -> dict[str, float]:
    """Microseconds of every part: median over launches, of the slowest rank."""
    parts = lane.parts()
    parts["all of it"]()  # kernels are compiled
    lane.device.synchronize()
    figures = {}
    for name, run in parts.items():
        graph = lane.device.capture("main", run)
        times = []
        for _ in range(repeats + 3):
            lane.device.synchronize()
            host.barrier()
            start, end = cupy.cuda.Event(), cupy.cuda.Event()
            start.record()
            graph.launch()
            end.record()
            end.synchronize()
            times.append(1e3 * cupy.cuda.get_elapsed_time(start, end))
        slowest = np.array(times[3:])
        host.all_reduce(slowest, "max").wait()
        figures[name] = float(np.median(slowest))
    assert not bool(lane.buffers.lists.flag[0]), "a list ran over"
    return figures


def main() -> None:
    """Run all batches."""
    options, host = parse(), world(launched_ranks())
    device = CudaDevice(discover(host).local_rank)
    comm = NcclComm(host, device.index)
    for rows in options.batch:
        plan = make_plan(options, host.size, rows * host.size)
        lane = Lane(options, plan, comm, device, rows)
        together, sent = measure(lane, host, options.repeats), lane.embedding.bytes_sent(lane.buffers)
        frequent = sum(placement.threshold for placement in plan.placements)
        del lane
        cupy.get_default_memory_pool().free_all_blocks()
        alone = measure(Lane(options, make_plan(options, 1, rows), SingleComm(), device, rows), host, options.repeats)
        cupy.get_default_memory_pool().free_all_blocks()
        if host.rank:
            continue
        print(
            f"\n{device.name}, {host.size} ranks, {rows} rows a GPU, {options.precision} vectors, {options.optimizer}"
        )
        print(f"plan: {plan.label}; {frequent} replicated rows")
        for name, microseconds in together.items():
            moved = sent["all_reduce"] if name == "reduce_replicated" else sent.get(name, 0)
            rate = f"  {moved / 1e6:8.1f} MB out, {moved / microseconds / 1e3:6.1f} GB/s" if moved else ""
            print(f"  {name:17} {microseconds:9.1f} us   alone {alone[name]:9.1f} us{rate}")
        share = alone["all of it"] / together["all of it"]
        print(f"  rate of a GPU: {rows / together['all of it']:.2f} M samples/s, {share:.1%} of one alone")
    comm.close()


if __name__ == "__main__":
    main()
