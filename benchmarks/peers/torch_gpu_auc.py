"""One PyTorch form trained until its AUC reaches a target; started by ``time_to_auc.py``.

    python benchmarks/peers/torch_gpu_auc.py JOB.json

The rows are those of the product's generator, made on the GPU and kept there. One JSON line for each evaluation.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch_gpu_dlrm import FORMS, Batch, ModelShape, Peer  # noqa: E402

from pipeline.dataset import load_dataset  # noqa: E402

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to train; ``eval_every`` and ``max_steps`` in steps, ``path`` a data set without files."""

    form: str
    path: str
    shape: dict[str, Any]
    batch: int
    half: bool
    lr: float
    table_lr: float
    scale: float
    target: float
    eval_every: int
    max_steps: int
    device: str = "cuda"


def make_rows(job: Job, split: str) -> torch.Tensor:
    """Rows [N, V] int32 of a split, on the device."""
    here = load_dataset(job.path).split(split)
    made = here.made()
    words = made.generator.row_words
    records = torch.empty(here.rows, words, dtype=torch.int32, device=job.device)
    if job.device == "cuda":
        import cupy

        from dlrm.cuda import CudaDevice

        rows, target = here.rows_on(CudaDevice(0)), cupy.from_dlpack(records).view(cupy.uint32)
        logits = cupy.empty(_CHUNK, cupy.float32)
        for start in range(0, here.rows, _CHUNK):
            stop = min(start + _CHUNK, here.rows)
            numbers = cupy.arange(made.first + start, made.first + stop, dtype=cupy.int64)
            rows.write(numbers, target[start:stop], logits[: stop - start])
        cupy.cuda.Device().synchronize()
        return records
    records.copy_(torch.from_numpy(made.make(np.arange(here.rows))))
    return records


def batch_of(peer: Peer, rows: torch.Tensor) -> Batch:
    """Columns of rows [B, V]."""
    first = 1 + peer.shape.num_dense
    keys = peer.tables.arrange(rows[:, first:].long())
    return Batch(rows[:, 1:first].contiguous().view(torch.float32), rows[:, 0].float(), keys)


def auc(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Area under the ROC curve, ties counted half, exact: by mean ranks."""
    _, places, counts = torch.unique(logits, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks = (last - (counts.double() - 1) / 2)[places]
    positives = labels.double().sum()
    above = (ranks * labels.double()).sum() - positives * (positives + 1) / 2
    return float(above / (positives * (len(labels) - positives)))


def score(peer: Peer, rows: torch.Tensor, size: int) -> float:
    """AUC of a split; its last rows that fill no batch are left out, as shapes are compiled in."""
    logits, labels = [], []
    for start in range(0, len(rows) - size + 1, size):
        batch = batch_of(peer, rows[start : start + size])
        logits.append(peer.forward(batch).clone())
        labels.append(batch.labels)
    return auc(torch.cat(logits), torch.cat(labels))


def main() -> None:
    """Train until the target is seen or the steps are done."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    rows, held = make_rows(job, "train"), make_rows(job, "validation")
    peer = Peer(
        ModelShape(**job.shape), FORMS[job.form], half=job.half, lr=job.lr, table_lr=job.table_lr, scale=job.scale,
        device=job.device,
    )  # fmt: skip
    per_epoch, evaluating = len(rows) // job.batch, 0.0
    for step in range(1, job.max_steps + 1):
        start = (step - 1) % per_epoch * job.batch
        loss = peer.step(batch_of(peer, rows[start : start + job.batch]))
        if step == 1 or step % job.eval_every == 0:
            mean = float(loss) / job.scale  # waits for the device
            begun = time.time()
            value = score(peer, held, job.batch) if step > 1 else None
            evaluating += time.time() - begun
            values = {"step": step, "time": time.time(), "loss": mean, "auc": value, "evaluating_s": evaluating}
            print(json.dumps(values), flush=True)
            if value is not None and value >= job.target:
                return


if __name__ == "__main__":
    main()
