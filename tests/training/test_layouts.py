"""The same rows train alike, however they lie on the disk."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from dlrm.config import parse_run_config
from pipeline.checkpoint import open_checkpoint
from pipeline.manifest import TableInfo
from pipeline.train import train
from pipeline.writer import DatasetWriter

TABLES = [
    TableInfo(name="a", rows=50, hotness=3),
    TableInfo(name="b", rows=9),
    TableInfo(name="c", rows=300, hotness=4),
]


def trained(values):
    """Bytes of every weight, and the losses, of a run."""
    train(parse_run_config(values))
    directory = Path(values["run"]["directory"])
    records = [json.loads(line) for line in (directory / "progress.jsonl").read_text().splitlines()]
    checkpoint = open_checkpoint(max((directory / "checkpoints").glob("step-*")))
    losses = [record["loss"] for record in records if record["type"] == "step"]
    return losses, {name: checkpoint.read(name).tobytes() for name in checkpoint.names}


@pytest.mark.parametrize("weighted", [False, True])
def test_layout_and_width_of_keys_change_no_bit_of_training(tmp_path, rng, run_values, weighted):
    labels, dense = rng.integers(0, 2, 300), rng.normal(size=(300, 2)).astype(np.float32)
    highs = np.repeat([table.rows for table in TABLES], [table.hotness for table in TABLES])
    keys = rng.integers(-1, highs, (300, highs.size))
    weights = rng.normal(size=keys.shape).astype(np.float32) if weighted else None
    runs = []
    for layout, key_dtype in product(("raw", "jagged"), ("int32", "int64")):
        name = f"{layout}-{key_dtype}"
        options = {"layout": layout, "key_dtype": key_dtype, "weighted": weighted}
        with DatasetWriter(tmp_path / name, name=name, dense_names=["x", "y"], tables=TABLES, **options) as writer:
            for split, rows in (("train", slice(0, 220)), ("test", slice(220, 300))):
                writer.write(split, labels[rows], dense[rows], keys[rows], None if weights is None else weights[rows])
            writer.finish()
        pooling = {"tables": {"c": {"pooling": "mean"}}}
        runs.append(trained(run_values(tmp_path / name, f"run-{name}", embedding=pooling, eval={"split": "test"})))
    losses, tensors = runs[0]
    assert len(losses) == 2 * 7
    assert np.isfinite(losses).all()
    for other_losses, other_tensors in runs[1:]:
        assert other_losses == losses
        assert other_tensors == tensors
