"""Prepares the sets that the twin is trained on and dumps rows and batch order (runs with the project's Python).

    python dump_twin_data.py movielens OUT.npz --seeds 1 2 3
    python dump_twin_data.py criteo_sample OUT.npz --seeds 1 --train TRAIN.tsv --test TEST.tsv

The order of batches is data, not mathematics: the twin is handed it, so that both sides see the same rows in the
same steps. ``OUT.npz``: ``<split>.label``, ``<split>.dense``, ``<split>.<table>.keys`` and ``.offsets``,
``order.<seed>`` [epochs, rows], ``tables`` and ``rows`` (names and sizes), ``dataset_sha256``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from pipeline.threads import settle_threads  # noqa: E402

settle_threads()

import numpy as np  # noqa: E402

from dlrm.config import load_run_config  # noqa: E402
from pipeline.dataset import Dataset, load_dataset  # noqa: E402
from pipeline.etl.criteo import CriteoInputs, prepare_criteo  # noqa: E402
from pipeline.etl.rules import Rules  # noqa: E402
from pipeline.loader import RowOrder  # noqa: E402
from pipeline.sources import prepare_source  # noqa: E402


def split_arrays(dataset: Dataset, split: str) -> dict[str, np.ndarray]:
    """All rows of a split, in row order."""
    rows = dataset.split(split).rows
    batch = dataset.split(split).read(slice(0, rows))
    keys = batch.keys
    offsets = np.arange(keys.num_tables * rows + 1) if keys.offsets is None else keys.offsets
    arrays = {f"{split}.label": batch.labels, f"{split}.dense": batch.dense}
    for t, table in enumerate(dataset.tables):
        bounds = offsets[t * rows : (t + 1) * rows + 1]
        arrays[f"{split}.{table.name}.keys"] = keys.keys[bounds[0] : bounds[-1]]
        arrays[f"{split}.{table.name}.offsets"] = bounds - bounds[0]
    return arrays


def main() -> None:
    """Prepare, read, dump."""
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=("movielens", "criteo_sample"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--train", type=Path)
    parser.add_argument("--test", type=Path)
    options = parser.parse_args()
    config = load_run_config(ROOT / "examples" / f"{options.case}.yaml")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "data"
        if options.case == "movielens":
            prepare_source("movielens", out)
        else:
            inputs = CriteoInputs(train=[options.train], test=[options.test], validation_fraction=0.1)
            prepare_criteo(inputs, out, rules=Rules(frequency_threshold=6))
        dataset = load_dataset(out)
        arrays: dict[str, np.ndarray] = {
            "tables": np.array([table.name for table in dataset.tables]),
            "rows": np.array([table.rows for table in dataset.tables]),
            "dataset_sha256": np.array(dataset_digest(dataset)),
        }
        for split in dataset.manifest.splits:
            arrays.update(split_arrays(dataset, split))
        train = dataset.split("train")
        for seed in options.seeds:
            order = RowOrder(train, seed=seed, shuffle=config.data.shuffle, window=config.data.shuffle_window)
            epochs = [order.rows(epoch, 0, train.rows) for epoch in range(config.train.epochs or 1)]
            arrays[f"order.{seed}"] = np.stack(epochs).astype(np.int32)
        np.savez(options.out, **arrays)


def dataset_digest(dataset: Dataset) -> str:
    """One sum over the SHA-256 of all files, so that a test can tell whether it has the twin's rows."""
    import hashlib

    files = [dataset.path / file.path for split in dataset.manifest.splits.values() for file in split.files]
    sums = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return hashlib.sha256(" ".join(sums).encode()).hexdigest()


if __name__ == "__main__":
    main()
