"""From process start to a target AUC: the product's trainer on GPUs against compiled PyTorch on the same rows.

    python benchmarks/time_to_auc.py --target 0.75 --json figures.json

The set has Criteo's shape and a planted teacher, and is made on the device. Every run is started twice: up to its first
evaluation, which fills the caches of compilers and tuning, then for the figure. How to read it: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PEERS = HERE / "peers"
sys.path[:0] = [str(HERE.parent), str(PEERS)]

from gpu_runs import last_line, running  # noqa: E402
from gpu_train import MODEL, SMALL_MODEL  # noqa: E402

from pipeline.generated import describe_synthetic, write_recipe  # noqa: E402
from pipeline.manifest import Manifest, SplitInfo  # noqa: E402
from pipeline.progress import read_records  # noqa: E402
from service.launchers.mpi import engine_command, engine_environment  # noqa: E402

OURS = {
    "fp32": ("fp32", 1),
    "fp16": ("fp16", 1),
    **{f"fp16, {count} GPUs": ("fp16", count) for count in (2, 4, 8)},
}


def make_set(options: argparse.Namespace, folder: Path) -> tuple[Path, Manifest]:
    """The data set's manifest: its rows are made where they are read."""
    manifest = describe_synthetic("criteo-terabyte", rows=20, seed=options.seed, cap=options.cap)
    counts = {"train": options.samples, "validation": options.held_out}
    manifest = replace(manifest, splits={name: SplitInfo(rows=rows, files=()) for name, rows in counts.items()})
    return write_recipe(folder / "set", manifest), manifest


def watch_ours(config: Mapping[str, Any], ranks: int, folder: Path, options: argparse.Namespace, *, warm: bool) -> Any:
    """Run the trainer until the target is seen (``warm``: until its first evaluation is done), then kill it."""
    directory = Path(tempfile.mkdtemp(dir=folder))
    file = directory / "config.json"
    file.write_text(json.dumps({**config, "run": {"directory": str(directory / "out")}}))
    log, progress = directory / "log", directory / "out" / "progress.jsonl"
    begun = time.time()
    with running(engine_command(file, ranks), engine_environment(os.environ), log) as process:
        ended = False
        while True:
            records = [record for record, _ in read_records(progress)]
            steps = [record for record in records if record["type"] == "step"]
            evals = [record for record in records if record["type"] == "eval"]
            seen = next((record for record in evals if (record["metrics"]["auc"] or 0) >= options.target), None)
            if (warm and evals) or seen or ended or time.time() - begun > options.timeout:
                break
            ended = process.poll() is not None
            time.sleep(0.05)
    if warm:
        return None
    if seen is None:
        reached = max((record["metrics"]["auc"] or 0 for record in evals), default=0.0)
        return {"error": f"best AUC {reached:.4f} of {len(evals)} evaluations; {last_line(log)}"}
    seconds = seen["time"] - begun
    return {
        "seconds": seconds,
        "samples": seen["step"] * config["data"]["batch_size"],
        "auc": seen["metrics"]["auc"],
        "start_up_s": steps[0]["time"] - begun,
        "evaluation_share": sum(record["seconds"] for record in evals if record["step"] <= seen["step"]) / seconds,
        "checkpoint_share": sum(r["stall_s"] for r in records if r["type"] == "save") / seconds,
        "curve": [[record["step"], record["metrics"]["auc"]] for record in evals],
        "evaluations_s": [record["seconds"] for record in evals],
    }


def watch_peer(job: Mapping[str, Any], folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run a PyTorch form until it ends."""
    directory = Path(tempfile.mkdtemp(dir=folder))
    file, log = directory / "job.json", directory / "log"
    file.write_text(json.dumps(job))
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    begun = time.time()
    command = [options.torch_python, str(PEERS / "torch_gpu_auc.py"), str(file)]
    with running(command, environment, log) as process:
        while process.poll() is None and time.time() - begun < options.timeout:
            time.sleep(0.05)
    found = [json.loads(line) for line in log.read_text(errors="replace").splitlines() if line.startswith('{"step"')]
    if not found or (found[-1]["auc"] or 0) < job["target"]:
        reached = max((record["auc"] or 0 for record in found), default=0.0)
        return {"error": f"best AUC {reached:.4f} of {len(found)} evaluations; {last_line(log)}"}
    seconds = found[-1]["time"] - begun
    return {
        "seconds": seconds,
        "samples": found[-1]["step"] * job["batch"],
        "auc": found[-1]["auc"],
        "start_up_s": found[0]["time"] - begun,
        "evaluation_share": found[-1]["evaluating_s"] / seconds,
        "checkpoint_share": 0.0,
        "curve": [[record["step"], record["auc"]] for record in found[1:]],
    }


def own_config(options: argparse.Namespace, path: Path, precision: str) -> dict[str, Any]:
    """A run's config."""
    steps = options.samples // options.batch
    every = max(1, steps // 20)
    on_gpu = options.device == "cuda"
    return {
        "name": "time_to_auc",
        "device": options.device,
        "precision": precision,
        "model": options.model,
        "optimizer": {"kind": "sgd", "lr": options.lr},
        "embedding": {"optimizer": {"kind": "sgd", "lr": options.table_lr}},
        "data": {
            "path": str(path), "batch_size": options.batch, "shuffle": False, "drop_last": True,
            **({"on_device": True} if on_gpu else {}),
        },
        "eval": {"split": "validation", "final_split": None, "batch_size": options.batch},
        "train": {
            "epochs": None, "max_steps": options.epochs * steps, "eval_every": every,
            "progress_every": max(1, every // 10), "target": {"metric": "auc", "value": options.target},
            "checkpoint_every": every * options.checkpoint_every,
        },
    }  # fmt: skip


def peer_job(options: argparse.Namespace, path: Path, manifest: Manifest, form: str) -> dict[str, Any]:
    """What ``torch_gpu_auc.py`` is told."""
    steps = options.samples // options.batch
    half = options.device == "cuda"
    shape = {
        "rows": [table.rows for table in manifest.tables], "dim": options.model["embedding_dim"], "num_dense": 13,
        "bottom": options.model["bottom_mlp"], "top": options.model["top_mlp"],
    }  # fmt: skip
    return {
        "form": form, "path": str(path), "shape": shape, "batch": options.batch, "half": half, "lr": options.lr,
        "table_lr": options.table_lr, "scale": 1024.0 if half else 1.0, "target": options.target,
        "eval_every": max(1, steps // 20), "max_steps": options.epochs * steps, "device": options.device,
    }  # fmt: skip


def measure(options: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """Every run that was asked for; one that fails says why."""
    path, manifest = make_set(options, folder)
    results: dict[str, dict[str, Any]] = {}
    for name in options.ours:
        precision, ranks = OURS[name]
        config = own_config(options, path, precision)
        watch_ours(config, ranks, folder, options, warm=True)
        results[f"crosslane {name}"] = watch_ours(config, ranks, folder, options, warm=False)
        show(f"crosslane {name}", results[f"crosslane {name}"])
    for form in options.peers:
        job = peer_job(options, path, manifest, form)
        watch_peer({**job, "max_steps": 3, "eval_every": 2, "target": 2.0}, folder, options)
        results[f"torch {form}"] = watch_peer(job, folder, options)
        show(f"torch {form}", results[f"torch {form}"])
    return results


def show(name: str, result: Mapping[str, Any]) -> None:
    """Print one run."""
    if "error" in result:
        print(f"{name:28} target not seen: {result['error']}", flush=True)
        return
    print(
        f"{name:28} {result['seconds']:8.1f} s, {result['samples'] / 1e6:7.1f} M samples, AUC {result['auc']:.4f}, "
        f"start-up {result['start_up_s']:.1f} s, evaluation {result['evaluation_share']:.1%}, "
        f"checkpoints {result['checkpoint_share']:.1%}",
        flush=True,
    )


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=float, required=True, help="AUC of the held-out rows; fix it beforehand")
    parser.add_argument("--ours", nargs="*", choices=list(OURS), default=["fp32", "fp16"])
    parser.add_argument("--peers", nargs="*", default=["compile", "fbgemm compile"], help="forms of torch_gpu_dlrm.py")
    parser.add_argument("--samples", type=int, default=200_000_000, help="rows of an epoch")
    parser.add_argument("--held-out", type=int, default=2_000_000)
    parser.add_argument("--epochs", type=int, default=1, help="after which to give up")
    parser.add_argument("--cap", type=int, default=4_000_000, help="most rows of a table")
    parser.add_argument("--batch", type=int, default=65536)
    parser.add_argument("--lr", type=float, default=1.0, help="of the dense part")
    parser.add_argument("--table-lr", type=float, default=100.0)
    parser.add_argument(
        "--checkpoint-every", type=int, default=0, help="evaluations between checkpoints of ours; 0: none"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the rows and their teacher")
    parser.add_argument("--timeout", type=float, default=200, help="seconds for one run")
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to test this program")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.model = MODEL if options.device == "cuda" else SMALL_MODEL
    with tempfile.TemporaryDirectory() as folder:
        results = measure(options, Path(folder))
    ours = [r["seconds"] for name, r in results.items() if name.startswith("crosslane") and "seconds" in r]
    peers = [r["seconds"] for name, r in results.items() if name.startswith("torch") and "seconds" in r]
    if ours and peers:
        print(f"fastest of PyTorch's over fastest of ours: {min(peers) / min(ours):.2f}")
    if options.json:
        options.json.write_text(json.dumps({"command": sys.argv, "results": results}))


if __name__ == "__main__":
    main()
