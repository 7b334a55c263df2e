"""Forms of a whole training step that only a measurement can choose between, beside each other on one GPU.

    python benchmarks/gpu_step_variants.py
    python benchmarks/gpu_step_variants.py --batches 6912 --profile --only default "vectors kept"

The product's own engine, schedule and graphs run at MLPerf's shape (tables capped, fp16 activations, fp32 tables, SGD,
keys of a power law, rows on the device); the tables are made once. What stands in the modules is the first line.
With --profile every form's kernels are listed too, which needs PyTorch's profiler.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import cupy  # noqa: E402

from dlrm import gemm_cuda, interaction_cuda  # noqa: E402
from dlrm.config import RunConfig, parse_run_config  # noqa: E402
from embedding import sorted_update_cuda  # noqa: E402
from embedding.comm import SingleComm  # noqa: E402
from pipeline import engine_cuda  # noqa: E402
from pipeline.device_feed import Origin, need_resident, open_feed  # noqa: E402
from pipeline.engine import Engine, build_engine  # noqa: E402
from pipeline.overlap import choose  # noqa: E402
from pipeline.schedule import execute, ring_size  # noqa: E402
from pipeline.stages_cuda import CudaStages, Fused  # noqa: E402

Change = Callable[[Engine], Any]
"""Makes a context in which the engine's next steps take another form."""


@contextmanager
def attribute(target: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute for a while."""
    before = getattr(target, name)
    setattr(target, name, value)
    try:
        yield
    finally:
        setattr(target, name, before)


@contextmanager
def entries(settings: dict[str, int], changes: Mapping[str, int]) -> Iterator[None]:
    """Change entries of a module's settings for a while."""
    before = dict(settings)
    settings.update(changes)
    try:
        yield
    finally:
        settings.update(before)


VARIANTS: dict[str, Change] = {
    "default": lambda _: ExitStack(),
    "vectors kept": lambda engine: attribute(engine.stages, "fused", Fused()),
    "atomic": lambda engine: attribute(engine.embedding, "_deterministic", False),
    "backward BLOCKS 4": lambda _: entries(interaction_cuda.FUSED_BACKWARD, {"BLOCKS": 4}),
    "backward BATCHED 1": lambda _: entries(interaction_cuda.FUSED_BACKWARD, {"BATCHED": 1}),
    "forward BATCHED 4": lambda _: entries(interaction_cuda.FUSED_FORWARD, {"BATCHED": 4}),
    "SUM_BLOCKS 4, AHEAD 4": lambda _: entries(sorted_update_cuda.SUM, {"SUM_BLOCKS": 4, "MOST_AHEAD": 4}),
}


def make_config(options: argparse.Namespace, folder: Path) -> RunConfig:
    """A run at MLPerf's shape."""
    path = f"synthetic:criteo-terabyte?rows={options.rows}&seed=1&exponent={options.exponent:g}&cap={options.cap}"
    return parse_run_config(
        {
            "name": "gpu_step_variants",
            "device": "cuda",
            "precision": "fp16",
            "loss_scale": 1024,
            "model": {"embedding_dim": 128, "bottom_mlp": (512, 256, 128), "top_mlp": (1024, 1024, 512, 256, 1)},
            "optimizer": {"kind": "sgd", "lr": 0.1},
            "data": {"path": path, "on_device": True, "batch_size": options.batches[0], "drop_last": True},
            "train": {"epochs": None, "max_steps": 1_000_000},
            "run": {"directory": str(folder)},
        }
    )


class Steps:
    """Steps of one form: a ring of its own, captured anew.

    Args:
        engine: whose stages run.
        origin: of the rows.
        batch: rows of a step.
    """

    def __init__(self, engine: Engine, origin: Origin, batch: int) -> None:
        self._engine, self._origin, self._batch = engine, origin, batch
        stages = engine.stages
        assert isinstance(stages, CudaStages)
        self._rows = engine_cuda.guarded(choose(engine.config.overlap, "train", None), stages).rows
        self._ring = [engine.stages.flight(batch, training=True) for _ in range(ring_size(self._rows))]
        self._done = 0

    def run(self, count: int) -> float:
        """Seconds that a step takes, waiting for its loss two steps later as a training run does."""
        engine, stages, device = self._engine, self._engine.stages, self._engine.device
        issued: deque[Any] = deque()
        with open_feed(
            engine.dataset.split("train"), engine.config.data, device=device, origin=self._origin,
            batch_rows=self._batch, seed=1, shuffle=True, drop_last=True, start_step=self._done,
            stop_step=self._done + count,
        ) as batches:  # fmt: skip
            start, end, left_out = 0.0, 0.0, len(self._ring)
            steps = execute(self._rows, stages=stages, ring=self._ring, batches=batches, device=device)
            for number, flight in enumerate(steps):
                issued.append(stages.outcome(flight))
                if len(issued) > device.steps_behind:
                    issued.popleft().loss()
                if number + 1 in {left_out, count - left_out}:  # the ring fills and drains without graphs
                    device.synchronize()
                    start, end = end, time.perf_counter()
        self._done += count
        return (end - start) / (count - 2 * left_out)

    def warm_up(self) -> None:
        """Choose algorithms, compile, capture."""
        self.run(4 * len(self._ring))


def kernels(steps: Steps, count: int) -> list[tuple[str, float, float]]:
    """Name, launches and microseconds a step of every kernel, longest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        steps.run(count)
    found = []
    for event in profiler.key_averages():
        taken = getattr(event, "self_device_time_total", None) or getattr(event, "self_cuda_time_total", 0)
        if taken:
            found.append((event.key, event.count / count, taken / count))
    return sorted(found, key=lambda item: -item[2])


def compare(engine: Engine, origin: Origin, batch: int, names: Sequence[str], options: argparse.Namespace) -> None:
    """All forms at one batch size; the first once more at the end, which shows the spread."""
    print(f"\nbatch {batch}", flush=True)
    choices = gemm_cuda._choices  # noqa: SLF001
    choices.clear()  # made for another size
    count = max(40, round(options.window_rows / batch))
    for name in (*names, names[0]):
        with VARIANTS[name](engine):
            steps = Steps(engine, origin, batch)
            steps.warm_up()
            seconds = sorted(steps.run(count) for _ in range(3))[1]
            print(f"  {name:28}{1e6 * seconds:9.1f} us a step{batch / seconds / 1e6:9.2f} M/s", flush=True)
            if name == names[0]:
                for choice in choices.values():
                    forms = ", ".join(f"{form} {1000 * ms:.1f}" for form, ms in choice.data_ms.items())
                    print(f"      {choice.data}, bias apart: {choice.apart} ({forms})")
            if options.profile:
                listed = kernels(steps, 20)
                print(f"      {sum(us for _, _, us in listed):9.1f} us in {sum(n for _, n, _ in listed):.1f} kernels")
                for kernel, launches, us in listed[: options.kernels]:
                    print(f"      {us:9.1f} us {launches:5.1f} x {kernel[:100]}")
        del steps
        gc.collect()
        cupy.get_default_memory_pool().free_all_blocks()


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[65536, 6912])
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--profile", action="store_true", help="list the kernels too")
    parser.add_argument("--kernels", type=int, default=45, help="how many of them")
    parser.add_argument("--exponent", type=float, default=1.1, help="of the keys' power law; 0: evenly")
    parser.add_argument("--cap", type=int, default=4_000_000, help="most rows of a table")
    parser.add_argument("--rows", type=int, default=10_000_000, help="synthetic rows, 90 %% of them for training")
    parser.add_argument("--window-rows", type=int, default=3_000_000, help="rows of a window, of which there are three")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        engine = build_engine(make_config(options, Path(folder)), comm=SingleComm(), threads=1)
        origin = need_resident(engine.dataset.split("train"), engine.config.data, engine.device)
        print(f"{engine.device.name}: seconds are medians of three windows", flush=True)
        for batch in options.batches:
            engine.config = replace(engine.config, data=replace(engine.config.data, batch_size=batch))
            compare(engine, origin, batch, options.only, options)


if __name__ == "__main__":
    main()
