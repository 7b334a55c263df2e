"""The engine's verbs end to end on a small data set: prepare, train, evaluate, weights."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.launchers.mpi import engine_environment, find_mpirun

ROOT = Path(__file__).parents[2]
RANKS = int(os.environ.get("CROSSLANE_TEST_RANKS") or 2)


def crosslane(*words: str | Path, starter: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*starter, sys.executable, "-m", "service.cli", *map(str, words)],
        cwd=ROOT,
        env=engine_environment(os.environ, threads=1),
        capture_output=True,
        text=True,
        timeout=240,
    )


def result_of(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def write_criteo(path: Path, rows: int, rng: np.random.Generator) -> None:
    """Rows whose label follows the first category, with empty fields here and there."""
    lines = []
    for _ in range(rows):
        categories = rng.integers(0, 6, 26)
        label = int(rng.random() < (0.9 if categories[0] < 3 else 0.1))
        integers = ["" if rng.random() < 0.1 else str(value) for value in rng.integers(-1, 500, 13)]
        names = ["" if rng.random() < 0.05 else f"{value:08x}" for value in categories]
        lines.append("\t".join([str(label), *integers, *names]))
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared rows and a config for them."""
    folder = tmp_path_factory.mktemp("engine")
    rng = np.random.default_rng()
    for name, rows in (("train_a", 500), ("train_b", 300), ("test", 200)):
        write_criteo(folder / f"{name}.tsv", rows, rng)
    files = (folder / "train_a.tsv", folder / "train_b.tsv")
    out = folder / "data"
    done = crosslane("prepare", "criteo", "--train", *files, "--test", folder / "test.tsv", "--out", out, "--json")
    prepared = result_of(done)
    assert prepared["splits"] == {"train": 800, "test": 200}
    assert (prepared["tables"], prepared["dense_columns"]) == (26, 13)
    config = {
        "data": {"path": str(out), "batch_size": 64},
        "model": {"embedding_dim": 4, "bottom_mlp": [8, 4], "top_mlp": [8, 1]},
        "optimizer": {"kind": "adagrad", "lr": 0.1},
        "train": {"epochs": 4, "progress_every": 5},
    }
    (folder / "run.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def trained(workspace: Path) -> Path:
    """The folder of a finished run."""
    directory = workspace / "runs" / "one"
    report = result_of(crosslane("train", workspace / "run.json", "--set", f"run.directory={directory}", "--json"))
    assert report["auc"] > 0.75
    assert report["samples"] == 200
    assert Path(report["report"]).is_file()
    assert "curves" not in report
    return directory


def newest_checkpoint(directory: Path) -> Path:
    return max((path for path in (directory / "checkpoints").iterdir() if path.is_dir()), key=lambda path: path.name)


def test_evaluating_the_checkpoint_gives_the_reports_metrics(workspace: Path, trained: Path, tmp_path: Path) -> None:
    report = json.loads((trained / "report.json").read_text())
    scores = tmp_path / "scores.npy"
    words = ("--checkpoint", newest_checkpoint(trained), "--report", tmp_path / "out", "--scores", scores, "--json")
    again = result_of(crosslane("evaluate", workspace / "run.json", *words))
    assert again["auc"] == report["auc"]
    assert again["log_loss"] == report["log_loss"]
    assert (tmp_path / "out" / "report.html").is_file()
    predictions = np.load(scores)
    assert predictions.shape == (200,)
    assert ((predictions > 0) & (predictions < 1)).all()


def test_weights_survive_export_and_import(workspace: Path, trained: Path, tmp_path: Path) -> None:
    weights, imported = tmp_path / "weights.npz", tmp_path / "imported"
    exported = result_of(crosslane("checkpoint", "export", newest_checkpoint(trained), weights, "--json"))
    assert exported["tensors"] == 26 + 2 * 2 + 2 * 2
    result_of(crosslane("checkpoint", "import", weights, imported, "--json"))
    report = json.loads((trained / "report.json").read_text())
    again = result_of(crosslane("evaluate", workspace / "run.json", "--checkpoint", imported, "--json"))
    assert again["log_loss"] == report["log_loss"]


def test_training_can_start_from_weights(workspace: Path, trained: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.npz"
    result_of(crosslane("checkpoint", "export", newest_checkpoint(trained), weights, "--json"))
    directory = tmp_path / "run"
    words = ("--init", weights, "--set", f"run.directory={directory}", "--set", "train.max_steps=1")
    result_of(crosslane("train", workspace / "run.json", *words, "--set", "optimizer.lr=1.0e-9", "--json"))
    report = json.loads((directory / "report.json").read_text())
    expected = json.loads((trained / "report.json").read_text())
    assert report["log_loss"] == pytest.approx(expected["log_loss"], rel=1e-5)


def test_failed_training_is_one_error_line_with_its_code(workspace: Path, tmp_path: Path) -> None:
    words = ("--set", f"data.path={tmp_path / 'nowhere'}", "--set", f"run.directory={tmp_path / 'run'}")
    done = crosslane("train", workspace / "run.json", *words)
    assert done.returncode == 3
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [done.stderr.strip()]
    assert "nowhere" in done.stderr


@pytest.mark.ranks
def test_ranks_option_trains_as_one_process_does(workspace: Path, trained: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    words = ("--ranks", str(RANKS), "--set", f"run.directory={directory}", "--json")
    report = result_of(crosslane("train", workspace / "run.json", *words))
    expected = json.loads((trained / "report.json").read_text())
    assert report["log_loss"] == pytest.approx(expected["log_loss"], rel=1e-4)
    start = json.loads((directory / "progress.jsonl").read_text().splitlines()[0])
    assert start["ranks"] == RANKS


@pytest.mark.ranks
def test_plain_mpirun_trains_prints_one_result_and_fails_as_one(workspace: Path, trained: Path, tmp_path: Path) -> None:
    starter = tuple(find_mpirun().arguments(RANKS))
    words = ("--set", f"run.directory={tmp_path / 'run'}", "--json")
    report = result_of(crosslane("train", workspace / "run.json", *words, starter=starter))
    expected = json.loads((trained / "report.json").read_text())
    assert report["log_loss"] == pytest.approx(expected["log_loss"], rel=1e-4)

    # Rank 0's output is a terminal of Open MPI's own; here it goes into a pipe, where escapes have no place.
    plain = crosslane("train", workspace / "run.json", *words[:-1], starter=starter)
    assert plain.returncode == 0, plain.stderr
    assert "Evaluation" in plain.stdout
    assert "\x1b" not in plain.stdout

    done = crosslane("train", workspace / "run.json", *words, "--set", "optimizer.lrate=1", starter=starter)
    assert done.returncode == 2
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1
