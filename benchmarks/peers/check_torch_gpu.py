"""The GPU peers against the product's trainer on the CPU: the same weights, the same rows, the same losses.

    python benchmarks/peers/check_torch_gpu.py "eager" "compile" "fbgemm eager"

Needs an interpreter with PyTorch and the project's dependencies (for FBGEMM's forms also ``fbgemm-gpu-cpu``). Exits
with 1 where a loss of 30 steps differs by more than 1e-6.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch_gpu_auc import batch_of  # noqa: E402
from torch_gpu_dlrm import FORMS, ModelShape, Peer  # noqa: E402

from pipeline.dataset import load_dataset  # noqa: E402
from pipeline.progress import read_records  # noqa: E402

PATH = "synthetic:criteo-terabyte?rows=40000&seed=1&exponent=1.1&cap=2000"
STEPS, BATCH, LR, TABLE_LR, TOLERANCE = 30, 64, 0.3, 3.0, 1e-6


def product_losses(weights: dict[str, np.ndarray], folder: Path) -> list[float]:
    """Losses of the product's trainer from these weights."""
    np.savez(folder / "weights.npz", **weights)  # type: ignore[arg-type]
    config = {
        "device": "cpu",
        "model": {"embedding_dim": 16, "bottom_mlp": [32, 16], "top_mlp": [64, 32, 1]},
        "optimizer": {"kind": "sgd", "lr": LR},
        "embedding": {"optimizer": {"kind": "sgd", "lr": TABLE_LR}},
        "data": {"path": PATH, "batch_size": BATCH, "shuffle": False},
        "train": {"epochs": None, "max_steps": STEPS, "progress_every": 1},
        "run": {"directory": str(folder / "run"), "init": str(folder / "weights.npz")},
    }
    (folder / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "pipeline.train", str(folder / "config.json")]
    subprocess.run(command, check=True, cwd=HERE.parents[1])
    records = read_records(folder / "run" / "progress.jsonl")
    return [record["loss"] for record, _ in records if record["type"] == "step"]


def main() -> int:
    """Compare every form named."""
    dataset = load_dataset(PATH)
    shape = ModelShape(
        rows=[table.rows for table in dataset.tables], dim=16, num_dense=13, bottom=[32, 16], top=[64, 32, 1]
    )
    rows = torch.from_numpy(dataset.split("train").made().make(np.arange(STEPS * BATCH)))
    failed = False
    for form in sys.argv[1:] or ["eager", "compile"]:
        peer = Peer(shape, FORMS[form], half=False, lr=LR, table_lr=TABLE_LR, scale=1024.0, device="cpu")
        weights = {
            f"table.C{t + 1}": view.detach().numpy().copy() for t, view in enumerate(peer.tables.views(shape.rows))
        }
        for name, parameter in peer.dense.named_parameters():
            part, layer, kind = name.split(".")
            weights[f"{part}.{int(layer) // 2}.{kind}"] = parameter.detach().numpy().copy()
        losses = [float(peer.step(batch_of(peer, piece))) / peer.scale for piece in rows.split(BATCH)]
        with tempfile.TemporaryDirectory() as folder:
            expected = product_losses(weights, Path(folder))
        worst = float(np.abs(np.subtract(losses, expected)).max())
        print(f"{form}: {STEPS} losses from {losses[0]:.4f} to {losses[-1]:.4f}, within {worst:.1e} of the product's")
        failed |= not worst <= TOLERANCE
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
