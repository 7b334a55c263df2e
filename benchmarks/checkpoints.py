"""What checkpoints cost: standstill, slower steps meanwhile, bytes of increments, memory of a synchronous save.

    python benchmarks/checkpoints.py --rows 18800000 --dim 128 --json figures.json

One rank trains one table with SGD (look-up, gradient, update of the embedding lane; no dense lane), saves behind the
training (into memory that was touched behind it, too), and goes on. A process of its own saves synchronously (peak
memory), touches the rows of a part of a power-law epoch, no more, and saves an increment.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pipeline.threads import settle_threads

settle_threads()

import numpy as np  # noqa: E402

from dlrm.config import OptimizerConfig  # noqa: E402
from dlrm.device import HostDevice  # noqa: E402
from embedding.comm import SingleComm  # noqa: E402
from embedding.hybrid import HybridEmbedding  # noqa: E402
from embedding.jagged import Jagged  # noqa: E402
from embedding.placement import Placement, Plan, TableSpec  # noqa: E402
from pipeline.checkpoint import save_checkpoint  # noqa: E402
from pipeline.checkpoint_async import AsyncSaver  # noqa: E402
from pipeline.checkpoint_shards import pieces_of_shards, touched_of_shards  # noqa: E402

PERIOD_S = 1800
"""One checkpoint in 30 minutes."""


class Lane:
    """One table's embedding lane on one rank."""

    def __init__(self, rows: int, dim: int, batch: int, exponent: float, seed: int = 1) -> None:
        self.rng, self.exponent, self.rows, self.batch = np.random.default_rng(seed), exponent, rows, batch
        spec = TableSpec(name="t", rows=rows, dim=dim)
        self.embedding = HybridEmbedding(
            specs=(spec,), plan=Plan(specs=(spec,), placements=(Placement(kind="table_wise"),), ranks=1),
            comm=SingleComm(), device=HostDevice(2), optimizer=OptimizerConfig(kind="sgd"), dtype=np.float32,
            seed=seed, first=0,
        )  # fmt: skip
        self.embedding.track_touched()
        vectors, gradients = (np.full((batch, 1, dim), value, np.float32) for value in (0, 1e-3))
        self.buffers = self.embedding.buffers(batch, vectors, gradients)
        self.shapes = {"t": (rows, dim)}
        self.steps = 0

    def keys(self) -> np.ndarray:
        """Keys of a batch by a power law with rows in frequency order."""
        power = 1 - self.exponent
        u = self.rng.random(self.batch)
        x = ((self.rows + 1) ** power * u + 1 - u) ** (1 / power) if power else (self.rows + 1) ** u
        return np.minimum(x.astype(np.int64) - 1, self.rows - 1).astype(np.int32)

    def step(self) -> None:
        """One step."""
        self.steps += 1
        self.embedding.input_dist(Jagged(self.keys(), None, None, 1, self.batch), self.buffers, self.batch)
        for stage in (self.embedding.lookup, self.embedding.output_dist, self.embedding.grad_dist):
            stage(self.buffers)
        self.embedding.sparse_update(self.buffers, 0.1, self.steps)

    def rate(self, seconds: float) -> float:
        """Steps a second over some time."""
        began, first = time.perf_counter(), self.steps
        while time.perf_counter() - began < seconds:
            self.step()
        return (self.steps - first) / (time.perf_counter() - began)

    def tensors(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return pieces_of_shards(self.embedding.shards(), self.shapes, 0)


def num_bytes(folder: Path) -> int:
    """Of all files in a checkpoint."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def memory_kib(field: str, *, forget_peak: bool = False) -> int:
    """Resident memory of this process now (VmRSS) or at its peak (VmHWM), which may be made to start anew (Linux)."""
    if forget_peak:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def behind_training(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Standstill, rate before and while writing, and what both cost at one checkpoint in 30 minutes."""
    lane = Lane(options.rows, options.dim, options.batch, options.exponent)
    lane.rate(2)
    free = lane.rate(5)
    saver = AsyncSaver(folder, SingleComm())
    began, first = time.perf_counter(), lane.steps
    if options.touch:
        saver.prepare(lane.tensors())
        while saver.room.touching:
            lane.step()
    touching = time.perf_counter() - began
    lost_once = touching - (lane.steps - first) / free
    full = saver.save(step=lane.steps, tensors=lane.tensors(), meta={})
    began, first = time.perf_counter(), lane.steps
    while not full.exists():
        lane.step()
    writing, made = time.perf_counter() - began, lane.steps - first
    stall = saver.snapshot_seconds
    saver.wait()
    lost = stall + writing - made / free
    return {
        "table_gb": options.rows * options.dim * 4 / 1e9,
        "steps_per_s": free,
        "touching_s": touching,
        "lost_once_s": lost_once,
        "stall_s": stall,
        "writing_s": writing,
        "steps_per_s_while_writing": made / writing,
        "lost_s": lost,
        "cost_of_30_minutes_percent": 100 * lost / PERIOD_S,
        "of_the_first_30_minutes_percent": 100 * (lost + lost_once) / PERIOD_S,
    }


def synchronous(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds and peak extra memory of a save without a copy; then an increment after a part of an epoch."""
    lane = Lane(options.rows, options.dim, options.batch, options.exponent)
    lane.rate(1)
    before = memory_kib("VmRSS", forget_peak=True)
    began = time.perf_counter()
    full = save_checkpoint(folder, step=lane.steps, tensors=lane.tensors(), meta={}, comm=SingleComm())
    seconds = time.perf_counter() - began
    extra = memory_kib("VmHWM") - before
    lane.embedding.clear_touched()
    steps = round(options.part * options.epoch_samples / options.batch)
    for _ in range(steps):
        lane.step()
    touched = touched_of_shards(lane.embedding.shards(), 0)
    increment = save_checkpoint(
        folder, step=lane.steps, tensors=lane.tensors(), meta={}, comm=SingleComm(), base=full, touched=touched
    )
    return {
        "synchronous_s": seconds,
        "extra_mib": extra / 1024,
        "full_mb": num_bytes(full) / 1e6,
        "steps_before_increment": steps,
        "increment_mb": num_bytes(increment) / 1e6,
        "fewer_bytes": num_bytes(full) / num_bytes(increment),
    }


def main() -> None:
    """Measure, print, and leave nothing behind."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--exponent", type=float, default=1.1)
    parser.add_argument(
        "--epoch-samples", type=int, help="look-ups of an epoch; left out: 105 a row, as in Terabyte's largest tables"
    )
    parser.add_argument("--part", type=float, default=0.05, help="of an epoch, before the increment")
    parser.add_argument("--no-touch", dest="touch", action="store_false", help="copy into memory never used before")
    parser.add_argument("--directory", help="where to write; left out: the system's temporary folder")
    parser.add_argument("--json", help="file that gets the figures")
    parser.add_argument("--only", choices=["behind", "synchronous"], help="this part alone, as JSON")
    options = parser.parse_args()
    options.epoch_samples = options.epoch_samples or 105 * options.rows
    figures: dict[str, Any] = {}
    if options.only:
        with tempfile.TemporaryDirectory(dir=options.directory) as folder:
            measure = behind_training if options.only == "behind" else synchronous
            print(json.dumps(measure(options, Path(folder) / "checkpoints")))
        return
    for part in ("behind", "synchronous"):
        command = [sys.executable, __file__, *sys.argv[1:], "--only", part]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        figures |= json.loads(done.stdout)
    for name, value in figures.items():
        print(f"{name:28} {value:12.3f}")
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
