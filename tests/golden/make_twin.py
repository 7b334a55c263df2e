"""Trains the PyTorch twin of the example configs on real data and writes ``twin.json`` (needs PyTorch, PyYAML).

    python tests/golden/make_twin.py --project-python .venv/bin/python \
        --criteo-train criteo_kaggle_train_7200.tsv --criteo-test criteo_kaggle_test_800.tsv

Same config, initial values (a Philox of its own), batch order and stopping rule as the trainer, in float32; the
mathematics is ``reference_dlrm.py``. ``tests/learning`` holds the trainer's test AUC against it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import yaml
from reference_dlrm import Architecture, Bags, Batch, Trainer, check_optimizers, check_philox, initial_values

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parents[1] / "examples"
SEEDS = {"criteo_sample": (1,), "movielens": (1, 2, 3)}


def config_digest(config: dict) -> str:
    """A sum over everything in the config that the trained model depends on."""
    kept = {section: values for section, values in config.items() if section not in {"name", "run", "seed"}}
    kept["data"] = {field: value for field, value in config["data"].items() if field != "path"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve by mean ranks, ties shared."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(counts) - (counts - 1) / 2
    positives = labels.sum()
    ranks = mean_rank[inverse][labels == 1].sum()
    return float((ranks - positives * (positives + 1) / 2) / (positives * (labels.size - positives)))


def log_loss(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean binary cross-entropy."""
    p = np.where(labels == 1, scores, 1 - scores.astype(np.float64))
    return float(-np.log(p).mean())


def batch_of(data: dict[str, np.ndarray], split: str, rows: np.ndarray) -> Batch:
    """Rows of a split as one batch."""
    tables = {}
    for table in data["tables"]:
        offsets = data[f"{split}.{table}.offsets"]
        starts, counts = offsets[rows], offsets[rows + 1] - offsets[rows]
        inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        keys = data[f"{split}.{table}.keys"][np.repeat(starts, counts) + inside]
        bag = np.repeat(np.arange(rows.size), counts)
        tables[str(table)] = Bags(keys=torch.from_numpy(keys.astype(np.int64)), bag=torch.from_numpy(bag))
    labels, dense = data[f"{split}.label"][rows], data[f"{split}.dense"][rows]
    return Batch(
        labels=torch.from_numpy(labels.astype(np.float32)),
        dense=torch.from_numpy(dense.astype(np.float32)),
        tables=tables,
    )


def scores_of(trainer: Trainer, data: dict[str, np.ndarray], split: str) -> tuple[np.ndarray, np.ndarray]:
    """Predictions and labels of a split, in row order."""
    labels = data[f"{split}.label"]
    parts = np.array_split(np.arange(labels.size), max(1, labels.size // 8192))
    return np.concatenate([trainer.predict(batch_of(data, split, part)) for part in parts]), labels


def train_twin(config: dict, data: dict[str, np.ndarray], seed: int) -> dict[str, float | int]:
    """Train with early stopping on the validation AUC and score the test split with the best weights."""
    model, size = config["model"], config["data"]["batch_size"]
    architecture = Architecture(
        num_dense=data["train.dense"].shape[1],
        tables={str(name): int(rows) for name, rows in zip(data["tables"], data["rows"], strict=True)},
        dim=model["embedding_dim"],
        bottom=tuple(model["bottom_mlp"]),
        top=tuple(model["top_mlp"]),
    )
    trainer = Trainer(architecture, initial_values(architecture, seed), config, torch.float32)
    rule, every = config["train"]["early_stop"], config["train"]["eval_every"]
    best, best_step, since, best_weights = -np.inf, 0, 0, trainer.weights()
    for order in data[f"order.{seed}"]:
        for start in range(0, order.size, size):
            trainer.train_step(batch_of(data, "train", order[start : start + size]))
            if trainer.step % every:
                continue
            found = auc(*scores_of(trainer, data, config["eval"]["split"]))
            if found > best:
                best, best_step, since, best_weights = found, trainer.step, 0, trainer.weights()
            else:
                since += 1
            if since >= rule["patience"]:
                break
        if since >= rule["patience"]:
            break
    for name, value in best_weights.items():
        trainer.parameters[name].data.copy_(torch.from_numpy(value))
    scores, labels = scores_of(trainer, data, config["eval"]["final_split"])
    return {"auc": auc(scores, labels), "log_loss": log_loss(scores, labels), "best_step": best_step}


def make_case(case: str, arguments: list[str]) -> dict:
    """Dump the data, train every seed."""
    config = yaml.safe_load((EXAMPLES / f"{case}.yaml").read_text(encoding="utf-8"))
    if config["train"]["early_stop"]["metric"] != "auc" or config["data"].get("drop_last"):
        raise SystemExit(
            f"{case}: the twin knows early stopping on AUC with every batch kept, and the config asks else"
        )
    seeds = SEEDS[case]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "data.npz"
        words = [arguments[0], str(HERE / "dump_twin_data.py"), case, str(out), *arguments[1:]]
        subprocess.run([*words, "--seeds", *map(str, seeds)], check=True)
        data = dict(np.load(out))
    results = {}
    for seed in seeds:
        results[str(seed)] = train_twin(config, data, seed)
        print(case, seed, results[str(seed)], flush=True)
    return {
        "config_sha256": config_digest(config),
        "dataset_sha256": str(data["dataset_sha256"]),
        "torch": torch.__version__,
        "seeds": results,
    }


def main() -> None:
    """Make the cases that were asked for and keep the others."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--project-python", default=sys.executable)
    parser.add_argument("--criteo-train")
    parser.add_argument("--criteo-test")
    parser.add_argument("--cases", nargs="+", choices=SEEDS, default=list(SEEDS))
    options = parser.parse_args()
    check_philox()
    check_optimizers()
    path = HERE / "twin.json"
    twins = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for case in options.cases:
        arguments = [options.project_python]
        if case == "criteo_sample":
            if not (options.criteo_train and options.criteo_test):
                raise SystemExit("criteo_sample: needs --criteo-train and --criteo-test")
            arguments += ["--train", str(options.criteo_train), "--test", str(options.criteo_test)]
        twins[case] = make_case(case, arguments)
        path.write_text(json.dumps(twins, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
