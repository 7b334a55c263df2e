"""Ranks with a GPU each over NCCL, and ranks that share one through the host: exchanges, and whole runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from bag_cases import EMBEDDING, PLACED_BAGS, write_bags
from run_cases import losses, records

from service.launchers.mpi import engine_command, engine_environment, find_mpirun
from service.launchers.session import end_session

HERE = Path(__file__).resolve().parent
DATA = "synthetic:criteo-terabyte?rows=400000&scale=2000"
ENDS_WITHIN_S = 30.0


def _gpus() -> int:
    try:
        import cupy

        return int(cupy.cuda.runtime.getDeviceCount())
    except (ImportError, RuntimeError):
        return 0


def need_gpus(wanted: int) -> None:
    if (found := _gpus()) < wanted:
        pytest.skip(f"needs {wanted} GPUs; {found} are visible")


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    more = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "PYTHONPATH": path}
    inherited = engine_environment(os.environ, threads=1)
    # With a safe path this checkout stands first in sys.path, where mpi4py's runner puts the program's folder instead.
    return {name: value for name, value in inherited.items() if name != "PYTHONSAFEPATH"} | more


@pytest.mark.parametrize(
    ("carrier", "ranks"),
    [("nccl", 1), ("nccl", 2), ("nccl", 4), ("nccl", 8), ("staged", 2), ("staged", 4), ("staged", 8)],
)
def test_tables_over_ranks_with_gpus(carrier: str, ranks: int) -> None:
    need_gpus(ranks if carrier == "nccl" else 1)
    command = [*find_mpirun().arguments(ranks), sys.executable, "-m", "mpi4py", str(HERE / "exchange_on_gpus.py")]
    done = subprocess.run(
        [*command, carrier], env=environment(), capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"all exchanges hold on {ranks} ranks over {carrier}" in done.stdout


def config_of(directory: Path, **changes: Any) -> Path:
    """A config's file; sections of ``changes`` are added to it field by field."""
    values: dict[str, Any] = {
        "device": "cuda",
        "data": {"path": DATA, "batch_size": 2048},
        "model": {"embedding_dim": 16, "bottom_mlp": [64, 16], "top_mlp": [64, 1]},
        "optimizer": {"kind": "sgd", "lr": 0.2},
        "train": {"max_steps": 50, "epochs": None, "progress_every": 1},
        "eval": {"batch_size": 10_000, "final_split": None},
        "run": {"directory": str(directory)},
        "seed": 5,
    }
    for name, section in changes.items():
        values[name] = values.get(name, {}) | section if isinstance(section, dict) else section
    file = directory.with_suffix(".json")
    file.write_text(json.dumps(values), encoding="utf-8")
    return file


def train(config: Path, ranks: int, sigmas: float | None = None) -> dict[str, Any]:
    """Run to the end; the report."""
    command = engine_command(config, ranks, debug=True)
    if sigmas is not None:
        command = engine_command(config, ranks, engine=(str(HERE / "train_on_gpus.py"),))
        command.append(str(sigmas))
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    directory = Path(json.loads(config.read_text())["run"]["directory"])
    report: dict[str, Any] = json.loads((directory / "report.json").read_text(encoding="utf-8"))
    return report


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, dict[str, Any]]:
    """Losses and report of one rank."""
    need_gpus(1)
    directory = tmp_path_factory.mktemp("alone") / "run"
    report = train(config_of(directory), 1)
    return losses(directory), report


PLACED = {
    "embedding": {
        "placement": "table_wise",
        "tables": {"C1": {"placement": "hybrid", "threshold": 50}, "C20": {"placement": "row_wise"}},
    }
}
CUT = {
    "embedding": {
        "placement": "column_wise",
        "deduplicate": True,
        "tables": PLACED["embedding"]["tables"] | {"C2": {"placement": "table_wise"}},
    }
}
"""Every row once, and parts of columns."""
RUNS: dict[str, tuple[str, dict[str, Any], float | None]] = {
    "as planned": ("nccl", {}, None),
    "placed": ("nccl", PLACED, None),
    "without graphs": ("nccl", {"cuda": {"graphs": False}, **PLACED}, None),
    "sequential": ("nccl", {"overlap": {"train": False, "eval": False}, **PLACED}, None),
    "lists that run over": ("nccl", PLACED, -30.0),
    "cut and once": ("nccl", CUT, None),
    "staged, cut and once": ("staged", {"cuda": {"carrier": "staged"}, **CUT}, None),
    "staged": ("staged", {"cuda": {"carrier": "staged"}, **PLACED}, None),
}


@pytest.mark.parametrize("name", RUNS)
def test_two_gpus_train_as_one(name: str, alone: tuple[np.ndarray, dict[str, Any]], tmp_path: Path) -> None:
    carrier, changes, sigmas = RUNS[name]
    need_gpus(2 if carrier == "nccl" else 1)
    directory = tmp_path / "run"
    report = train(config_of(directory, **changes), 2, sigmas)
    np.testing.assert_allclose(losses(directory), alone[0], rtol=1e-4)
    assert report["auc"] == pytest.approx(alone[1]["auc"], abs=1e-3)
    assert records(directory, "start")[0]["carrier"] == carrier
    assert (records(directory, "step")[-1]["overflows"] > 0) == (sigmas is not None)


@pytest.mark.parametrize(
    ("carrier", "form"),
    [("nccl", {"bags": False}), ("nccl", {}), ("nccl", {"layout": "jagged"}), ("staged", {"layout": "jagged"})],
)
def test_two_gpus_train_on_bags_as_one(carrier: str, form: dict[str, Any], tmp_path: Path) -> None:
    """Weighted bags, pooled and as features of their own, of tables placed in every way; replayed over NCCL.

    The 17th batch of a pass is a short one.
    """
    need_gpus(2 if carrier == "nccl" else 1)
    data = {"path": str(write_bags(tmp_path / "data", 29, weighted=True, **form)), "batch_size": 24}
    common = {"data": data, "optimizer": {"lr": 0.1}, "train": {"max_steps": 20}, "eval": {"batch_size": 100}}
    one = train(config_of(tmp_path / "one", embedding=EMBEDDING, **common), 1)
    two = train(config_of(tmp_path / "two", embedding=PLACED_BAGS, cuda={"carrier": carrier}, **common), 2)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4)
    assert two["log_loss"] == pytest.approx(one["log_loss"], rel=1e-3)
    assert records(tmp_path / "two", "start")[0]["carrier"] == carrier


def test_more_ranks_than_gpus_share_them(alone: tuple[np.ndarray, dict[str, Any]], tmp_path: Path) -> None:
    ranks = 2 * _gpus()
    report = train(config_of(tmp_path / "run", **PLACED), ranks)
    np.testing.assert_allclose(losses(tmp_path / "run"), alone[0], rtol=1e-4)
    assert report["auc"] == pytest.approx(alone[1]["auc"], abs=1e-3)
    assert records(tmp_path / "run", "start")[0]["carrier"] == "staged"


def test_evaluations_are_the_same_to_the_last_bit_in_every_form(tmp_path: Path) -> None:
    """Rows side by side or where the interaction finds them, one batch after the other or three in flight."""
    need_gpus(2)
    found = {}
    for fused in (True, False):
        for overlapped in ("always", False):
            changes: dict[str, Any] = {
                "precision": "fp16", "deterministic": True, "cuda": {"fused_eval": fused},
                "overlap": {"eval": overlapped}, "train": {"max_steps": 20}, "eval": {"batch_size": 3_000}, **PLACED,
            }  # fmt: skip
            report = train(config_of(tmp_path / f"{fused}-{overlapped}", **changes), 2)
            found[fused, overlapped] = report["auc"], report["log_loss"]
    assert len(set(found.values())) == 1


def test_deterministic_runs_are_equal_to_the_last_bit(tmp_path: Path) -> None:
    need_gpus(2)
    forms = {
        "first": {},
        "second": {},
        "sequential": {"overlap": {"train": False, "eval": False}},
        "without graphs": {"cuda": {"graphs": False}},
    }
    found = {}
    for name, changes in forms.items():
        report = train(config_of(tmp_path / name, deterministic=True, **PLACED, **changes), 2)
        found[name] = losses(tmp_path / name).tolist(), report["auc"]
    for name, outcome in found.items():
        assert outcome == found["first"], name


@pytest.mark.parametrize("gpus", [1, 2])
def test_evaluation_on_a_rank_of_its_own(gpus: int, tmp_path: Path) -> None:
    """The last rank evaluates, on a GPU of its own or on that of the rank that trains."""
    need_gpus(gpus)
    if gpus == 1 and _gpus() > 1:
        pytest.skip("every rank has a GPU of its own")
    found = {}
    for own in (0, 1):
        directory = tmp_path / str(own)
        form = {"train": {"eval_every": 10}, "eval": {"ranks": own}, "precision": "fp16"}
        train(config_of(directory, deterministic=True, **form), 1 + own)
        found[own] = {record["step"]: record["metrics"]["auc"] for record in records(directory, "eval")}
    assert sorted(found[1]) == [10, 20, 30, 40, 50]
    assert found[1] == pytest.approx(found[0], abs=1e-6)


def test_half_precision_reaches_one_gpus_auc(tmp_path: Path) -> None:
    need_gpus(2)
    data = {"path": "synthetic:criteo-terabyte?rows=4000000&scale=1000", "batch_size": 4096}
    forms: dict[str, tuple[int, dict[str, Any]]] = {
        "fp32, one": (1, {}),
        "fp16": (2, {"precision": "fp16"}),
        "fp16, dynamic": (2, {"precision": "fp16", "loss_scale": "dynamic", "loss_scale_growth": 100}),
        "fp16 tables": (2, {"precision": "fp16", "embedding": {"table_precision": "fp16"}}),
        "bf16": (2, {"precision": "bf16"}),
    }
    found = {}
    for name, (ranks, changes) in forms.items():
        steps = {"max_steps": 800, "progress_every": 100}
        found[name] = train(config_of(tmp_path / name, data=data, train=steps, **changes), ranks)["auc"]
    assert found["fp32, one"] > 0.65
    for name, auc in found.items():
        assert auc == pytest.approx(found["fp32, one"], abs=1e-3), (name, found)


def test_a_run_goes_on_with_other_ranks(alone: tuple[np.ndarray, dict[str, Any]], tmp_path: Path) -> None:
    need_gpus(2)
    for first, second in ((2, 1), (1, 2)):
        directory = tmp_path / f"{first}-{second}"
        train(config_of(directory, train={"max_steps": 20}, **PLACED), first)
        train(config_of(directory, **PLACED), second)
        np.testing.assert_allclose(losses(directory), alone[0], rtol=1e-4)


def test_a_rank_that_dies_ends_the_run(tmp_path: Path) -> None:
    need_gpus(2)
    config = config_of(tmp_path / "run", train={"max_steps": 10_000_000, "progress_every": 20})
    process = subprocess.Popen(
        engine_command(config, 2), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        begun, progress = time.perf_counter(), tmp_path / "run" / "progress.jsonl"
        while not (progress.is_file() and records(tmp_path / "run", "step")):
            assert process.poll() is None, "it ended before its first step"
            assert time.perf_counter() - begun < 200, "it took 200 s to its first step"
            time.sleep(0.2)
        ranks = [
            child
            for child in psutil.Process(process.pid).children(recursive=True)
            if "pipeline.train" in " ".join(child.cmdline())
        ]
        os.kill(ranks[-1].pid, signal.SIGKILL)
        assert process.wait(timeout=ENDS_WITHIN_S) != 0
    finally:
        process.kill()
        process.wait()
        end_session(process.pid, patience=0.0)
