"""Trained on real rows, the engine is as good as an independent twin, and better than models that cannot interact.

The twin (``tests/golden/make_twin.py``) is PyTorch with the same config, initial values and batch order. MovieLens
is fetched once into the user's cache. Criteo's rows may not be handed on, so that they lie beside the
checkout (``../shared/data``) or where ``CROSSLANE_CRITEO_DIR`` says, or this part is skipped.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from dlrm.config import parse_run_config, read_config_file
from pipeline.dataset import Dataset, load_dataset
from pipeline.etl.criteo import CriteoInputs, prepare_criteo
from pipeline.etl.rules import Rules
from pipeline.sources import prepare_source
from pipeline.train import train

ROOT = Path(__file__).resolve().parents[2]
TWINS = json.loads((ROOT / "tests" / "golden" / "twin.json").read_text(encoding="utf-8"))
MOVIELENS_SEEDS = (1, 2, 3)
REMAKE = "the twin was trained on something else; run tests/golden/make_twin.py again"


def config_digest(config: dict) -> str:
    """A sum over everything in the config that the trained model depends on (as in ``make_twin.py``)."""
    kept = {section: values for section, values in config.items() if section not in {"name", "run", "seed"}}
    kept["data"] = {field: value for field, value in config["data"].items() if field != "path"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def dataset_digest(dataset: Dataset) -> str:
    """One sum over the SHA-256 of all files (as in ``dump_twin_data.py``)."""
    files = [dataset.path / file.path for split in dataset.manifest.splits.values() for file in split.files]
    sums = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return hashlib.sha256(" ".join(sums).encode()).hexdigest()


def train_example(name: str, data: Path, directory: Path, seed: int) -> dict:
    """Train an example config on prepared data; the report."""
    values = read_config_file(ROOT / "examples" / f"{name}.yaml")
    values["data"]["path"] = str(data)
    config = parse_run_config({**values, "seed": seed, "run": {"directory": str(directory)}})
    return train(config).report


def check_twin_is_of(name: str, data: Path) -> None:
    """The committed twin belongs to this config and these rows."""
    twin = TWINS[name]
    assert config_digest(read_config_file(ROOT / "examples" / f"{name}.yaml")) == twin["config_sha256"], REMAKE
    assert dataset_digest(load_dataset(data)) == twin["dataset_sha256"], REMAKE


def criteo_files() -> tuple[Path, Path]:
    """The two files of Criteo's rows, or a skip."""
    folder = Path(os.environ.get("CROSSLANE_CRITEO_DIR") or ROOT.parent / "shared" / "data")
    files = folder / "criteo_kaggle_train_7200.tsv", folder / "criteo_kaggle_test_800.tsv"
    if not all(file.is_file() for file in files):
        pytest.skip(f"no {files[0].name} and {files[1].name} in {folder}; CROSSLANE_CRITEO_DIR names their folder")
    return files


@pytest.mark.slow
def test_criteo_rows_are_learnt_as_the_twin_learns_them(tmp_path: Path) -> None:
    train_file, test_file = criteo_files()
    inputs = CriteoInputs(train=[train_file], test=[test_file], validation_fraction=0.1)
    prepare_criteo(inputs, tmp_path / "data", rules=Rules(frequency_threshold=6))
    check_twin_is_of("criteo_sample", tmp_path / "data")
    report = train_example("criteo_sample", tmp_path / "data", tmp_path / "run", seed=1)
    twin = TWINS["criteo_sample"]["seeds"]["1"]
    assert report["auc"] == pytest.approx(twin["auc"], abs=0.003)
    assert report["log_loss"] == pytest.approx(twin["log_loss"], abs=0.003)


@pytest.fixture(scope="module")
def movielens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_source("movielens", tmp_path_factory.mktemp("movielens") / "data")


@pytest.fixture(scope="module")
def movielens_reports(movielens: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict]:
    folder = tmp_path_factory.mktemp("movielens_runs")
    return {seed: train_example("movielens", movielens, folder / str(seed), seed) for seed in MOVIELENS_SEEDS}


@pytest.mark.slow
def test_movielens_is_learnt_as_the_twin_learns_it(movielens: Path, movielens_reports: dict[int, dict]) -> None:
    check_twin_is_of("movielens", movielens)
    for seed, report in movielens_reports.items():
        twin = TWINS["movielens"]["seeds"][str(seed)]
        assert report["auc"] == pytest.approx(twin["auc"], abs=0.003), f"seed {seed}"


def one_hot_rows(dataset: Dataset, split: str, names: tuple[str, ...]) -> tuple[csr_matrix, np.ndarray]:
    """One column per row of each named table, and the labels."""
    rows = dataset.split(split).rows
    batch = dataset.split(split).read(slice(0, rows))
    offsets = np.arange(batch.keys.num_tables * rows + 1) if batch.keys.offsets is None else batch.keys.offsets
    columns, width = [], 0
    for t, table in enumerate(dataset.tables):
        if table.name in names:
            bounds = offsets[t * rows : (t + 1) * rows + 1]
            assert (np.diff(bounds) == 1).all()
            columns.append(batch.keys.keys[bounds[0] : bounds[-1]] + width)
            width += table.rows
    assert len(columns) == len(names)
    indices = np.stack(columns, axis=1).reshape(-1)
    pointers = np.arange(rows + 1) * len(names)
    return csr_matrix((np.ones(indices.size), indices, pointers), shape=(rows, width)), batch.labels


def additive_auc(data: Path) -> float:
    """Test AUC of logistic regression on one-hot user and item, L2 chosen on the validation split."""
    dataset = load_dataset(data)
    splits = {split: one_hot_rows(dataset, split, ("user", "item")) for split in ("train", "validation", "test")}
    found = []
    for strength in (0.25, 0.5, 1.0, 2.0, 4.0):
        model = LogisticRegression(C=strength, max_iter=2000, tol=1e-6).fit(*splits["train"])
        scores = {split: model.decision_function(splits[split][0]) for split in ("validation", "test")}
        found.append([roc_auc_score(splits[split][1], scores[split]) for split in ("validation", "test")])
    best = int(np.argmax([validation for validation, _ in found]))
    assert 0 < best < len(found) - 1, f"the best L2 lies at the edge of those tried: {found}"
    return float(found[best][1])


@pytest.mark.slow
def test_movielens_needs_more_than_user_and_item_means(movielens: Path, movielens_reports: dict[int, dict]) -> None:
    mean = np.mean([report["auc"] for report in movielens_reports.values()])
    assert mean >= 0.772
    additive = additive_auc(movielens)
    assert additive > 0.75, "the additive model is not fitted well enough to be a bar"
    assert mean > additive, f"{mean:.4f} does not exceed the additive model's {additive:.4f}"
