"""Training rate of one PyTorch form at several batch sizes and laws of keys; started by ``gpu_train.py``.

    python benchmarks/peers/torch_gpu_rate.py JOB.json

The job has the fields of ``Job``. Every measured case is one JSON line on standard output at once, so that a failure
spoils none of those before.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch_gpu_dlrm import FORMS, Batch, ModelShape, Peer, Step

TRAINED_STEPS = 40
"""After as many steps from the initial weights, every form should have the same loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to measure.

    Attributes:
        form: a key of ``FORMS``.
        shape: fields of ``ModelShape``.
        batches: sizes.
        exponents: of the keys' power law; 0: evenly.
        ring: distinct batches on the device.
        windows: of which the median is taken.
        window_s: about the seconds of one.
        forward: measure the forward pass too.
    """

    form: str
    shape: dict[str, Any]
    batches: Sequence[int]
    exponents: Sequence[float]
    half: bool = True
    lr: float = 0.1
    scale: float = 1024.0
    ring: int = 8
    windows: int = 15
    window_s: float = 0.3
    forward: bool = False
    device: str = "cuda"


def draw_keys(rows: Sequence[int], size: int, exponent: float, generator: torch.Generator) -> torch.Tensor:
    """Keys [B, T] int64: of a power law over each table's rows, most frequent first, or with exponent 0 evenly.

    The law's mass between k + 1 and k + 2 is key k's: F^-1(u) = (1 + u ((rows + 1)^(1 - a) - 1))^(1 / (1 - a)).
    """
    columns = []
    for count in rows:
        draw = torch.rand(size, generator=generator, device=generator.device, dtype=torch.float64)
        if exponent == 1.0:
            place = (count + 1.0) ** draw - 1
        elif exponent:
            power = 1.0 - exponent
            place = (1 + draw * ((count + 1.0) ** power - 1)) ** (1 / power) - 1
        else:
            place = draw * count
        columns.append(place.long().clamp_(0, count - 1))
    return torch.stack(columns, dim=1)


def make_ring(peer: Peer, job: Job, size: int, exponent: float) -> list[Batch]:
    """Distinct batches, the same in every form; labels follow dense columns, so that there is a loss to lower."""
    generator = torch.Generator(peer.device).manual_seed(2)
    ring = []
    for _ in range(job.ring):
        dense = torch.randn(size, peer.shape.num_dense, generator=generator, device=peer.device)
        chance = torch.sigmoid(dense[:, 0] - 0.5 * dense[:, -1] - 1)
        labels = (torch.rand(size, generator=generator, device=peer.device) < chance).float()
        keys = draw_keys(peer.shape.rows, size, exponent, generator)
        ring.append(Batch(dense, labels, peer.tables.arrange(keys)))
    return ring


def synchronize(peer: Peer) -> None:
    """Wait for the device."""
    if peer.device.type == "cuda":
        torch.cuda.synchronize()


def loss_after(peer: Peer, calls: Sequence[Step], steps: int) -> float:
    """Loss of the last of so many steps from the initial weights."""
    peer.draw()
    for number in range(steps):
        loss = calls[number % len(calls)]()
    return float(loss) / peer.scale


def rates(peer: Peer, job: Job, size: int, calls: Sequence[Step]) -> list[float]:
    """Samples/s of each window."""
    number = 0

    def window(steps: int) -> float:
        nonlocal number
        start = time.perf_counter()
        for _ in range(steps):
            calls[number % len(calls)]()
            number += 1
        synchronize(peer)
        return time.perf_counter() - start

    window(3)
    steps = max(3, round(job.window_s / (window(3) / 3)))
    window(steps)
    return [size * steps / window(steps) for _ in range(job.windows)]


def measure(peer: Peer, job: Job, size: int, exponent: float) -> dict[str, Any]:
    """One case."""
    start = time.perf_counter()
    ring = make_ring(peer, job, size, exponent)
    calls = peer.steps(ring)
    loss = loss_after(peer, calls, TRAINED_STEPS)
    ready = time.perf_counter() - start
    timed = rates(peer, job, size, calls)
    result = {
        "form": job.form,
        "batch": size,
        "exponent": exponent,
        "samples_per_s": statistics.median(timed),
        "windows": timed,
        "loss": loss,
        "prepare_s": ready,
        "version": f"torch {torch.__version__}",
    }
    if job.forward:

        def forward(batch: Batch) -> Step:
            return lambda: peer.forward(batch)

        passes = [forward(batch) for batch in ring]
        result["forward_samples_per_s"] = statistics.median(rates(peer, job, size, passes))
    return result


def main() -> None:
    """Every case of the job."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    peer = Peer(ModelShape(**job.shape), FORMS[job.form], half=job.half, lr=job.lr, scale=job.scale, device=job.device)
    for size in job.batches:
        for exponent in job.exponents:
            print(json.dumps(measure(peer, job, size, exponent)), flush=True)


if __name__ == "__main__":
    main()
