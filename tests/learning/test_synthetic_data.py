"""On rows whose best possible AUC is known the engine reaches it, and permuted categories teach it nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from dlrm.config import parse_run_config, read_config_file
from pipeline.dataset import load_dataset
from pipeline.manifest import Ceilings
from pipeline.synthetic import generate
from pipeline.train import train

CONFIG = Path(__file__).resolve().parents[2] / "examples" / "synthetic_small.yaml"
ROWS = 2_000_000
"""As the head of the config says."""


def train_on_synthetic(folder: Path, *, control: bool) -> tuple[dict, Ceilings]:
    """Generate, train the example config, and return the report and the set's ceilings."""
    data = generate(folder / "data", rows=ROWS, control=control)
    values = read_config_file(CONFIG)
    values["data"]["path"] = str(data)
    report = train(parse_run_config({**values, "run": {"directory": str(folder / "run")}})).report
    assert report["samples"] == load_dataset(data).split("test").rows
    ceilings = load_dataset(data).manifest.ceilings
    assert ceilings is not None
    return report, ceilings


@pytest.mark.slow
def test_synthetic_rows_are_learnt_up_to_their_ceiling(tmp_path: Path) -> None:
    report, ceilings = train_on_synthetic(tmp_path, control=False)
    assert ceilings.best - ceilings.best_additive >= 0.03, "the set does not tell interactions from sums"
    assert report["auc"] >= ceilings.best - 0.005
    assert report["seconds"] < 240
    # More than sampling noise above the true probabilities would mean that the ceiling is none.
    assert report["auc"] <= ceilings.best + 0.003


@pytest.mark.slow
def test_permuted_categories_teach_nothing(tmp_path: Path) -> None:
    report, ceilings = train_on_synthetic(tmp_path, control=True)
    assert report["auc"] <= ceilings.dense_only + 0.005
    assert report["auc"] > 0.55, "the dense columns still carry some of the label"
