"""A whole run on a GPU beside the same run on the CPU: losses, weights, checkpoints; emulated where there is no GPU.

Emulated, products are NumPy's, and nothing is captured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_cases import SMALL, STEPS, emulate, losses, records, run, values

from dlrm.errors import CrosslaneError


@pytest.fixture
def on_gpu(machine: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    emulate(machine, monkeypatch)
    return machine


CASES: dict[str, dict[str, Any]] = {
    "sgd": {},
    "deterministic": {"deterministic": True},
    "on the device": {"data": {"on_device": True}},
    "sequential": {"overlap": {"train": False, "eval": False}},
    "adam": {"optimizer": {"kind": "adam", "lr": 0.01}},
    "adagrad, rows": {
        "optimizer": {"kind": "adagrad", "lr": 0.05},
        "embedding": {"optimizer": {"kind": "rowwise_adagrad", "lr": 0.05}},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_follows_the_cpus(on_gpu: Any, case: str, tmp_path: Path) -> None:
    steps = {"train": {"max_steps": 12 if on_gpu.emulated else STEPS, "progress_every": 1}}
    changes = [dict(CASES[case]) | steps for _ in range(2)]
    cpu = run(values(tmp_path / "cpu", "cpu", on_gpu, **changes[0]))
    gpu = run(values(tmp_path / "gpu", "cuda", on_gpu, **changes[1]))
    np.testing.assert_allclose(losses(tmp_path / "gpu"), losses(tmp_path / "cpu"), rtol=1e-4)
    for name in ("auc", "log_loss", "accuracy", "calibration"):
        assert gpu.report[name] == pytest.approx(cpu.report[name], rel=1e-3), name


def test_the_report_keeps_the_stage_times_of_traced_steps(on_gpu: Any, tmp_path: Path) -> None:
    steps = {"max_steps": 24, "progress_every": 6}
    result = run(values(tmp_path, "cuda", on_gpu, train=steps, trace={"steps": [10, 11]}))
    by_window = [record["stages_ms"] for record in records(tmp_path, "step")]
    assert [bool(stages) for stages in by_window] == [False, True, False, False]
    assert result.report["run"]["stages_ms"] == by_window[1]
    assert {"lookup", "top_forward", "dense_update"} <= set(by_window[1])
    (start,) = records(tmp_path, "start")
    assert result.report["run"]["device"] == start["device"]


def test_a_run_resumes_on_either_device(on_gpu: Any, tmp_path: Path) -> None:
    """20 steps on the GPU, then on to the end on each: the same as without a break."""
    end, middle = (8, 4) if on_gpu.emulated else (40, 20)
    adam = {"optimizer": {"kind": "adam", "lr": 0.01}}
    for first, second in (("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")):
        whole, broken = tmp_path / f"{first}-{second}", tmp_path / f"{first}-{second}-broken"
        run(values(whole, second, on_gpu, train={"max_steps": end}, **adam))
        run(values(broken, first, on_gpu, train={"max_steps": middle}, **adam))
        run(values(broken, second, on_gpu, train={"max_steps": end}, **adam))
        np.testing.assert_allclose(losses(broken), losses(whole), rtol=1e-4)


@pytest.mark.parametrize("table_precision", ["fp32", "fp16"])
def test_rows_that_are_read_twice_train_like_rows_that_are_kept(
    on_gpu: Any, table_precision: str, tmp_path: Path
) -> None:
    """Look-up inside the interaction: forward and backward are the same to the last bit, updates are in any order."""
    for fused in (True, False):
        changes = {
            "precision": "fp16", "deterministic": True, "cuda": {"fused_train": fused},
            "embedding": {"table_precision": table_precision},
            "train": {"max_steps": 6 if on_gpu.emulated else STEPS, "progress_every": 1},
        }  # fmt: skip
        run(values(tmp_path / str(fused), "cuda", on_gpu, **changes))
    np.testing.assert_allclose(losses(tmp_path / "True"), losses(tmp_path / "False"), rtol=1e-6)


def test_evaluations_are_the_same_to_the_last_bit_in_every_form(on_gpu: Any, tmp_path: Path) -> None:
    """Look-up and interaction apart or as one kernel, one batch after the other or lanes beside each other."""
    found = {}
    for fused in (True, False):
        for overlapped in ("always", False):
            changes = {
                "precision": "fp16", "deterministic": True, "cuda": {"fused_eval": fused},
                "overlap": {"eval": overlapped}, "train": {"max_steps": 1 if on_gpu.emulated else STEPS},
                "data": {"path": "synthetic:criteo-terabyte?rows=10000&scale=20000"} if on_gpu.emulated else {},
            }  # fmt: skip
            directory = tmp_path / f"{fused}-{overlapped}"
            report = run(values(directory, "cuda", on_gpu, **changes)).report
            found[fused, overlapped] = report["auc"], report["log_loss"]
            assert records(directory, "start")[0]["overlap"]["eval"]["overlapped"] == bool(overlapped)
    assert len(set(found.values())) == 1


def test_half_precision_reaches_the_same_auc(on_gpu: Any, tmp_path: Path) -> None:
    if on_gpu.emulated:
        pytest.skip("products in half precision need a GPU")
    found = {}
    data = {"path": "synthetic:criteo-terabyte?rows=4000000&scale=1000", "batch_size": 4096}
    for name, changes in {
        "fp32": {"precision": "fp32"},
        "fp16": {"precision": "fp16"},
        "dynamic": {"precision": "fp16", "loss_scale": "dynamic", "loss_scale_growth": 100},
        "bf16": {"precision": "bf16"},
        "fp16 tables": {"precision": "fp16", "embedding": {"table_precision": "fp16"}},
    }.items():
        options = {"train": {"max_steps": 800, "progress_every": 100}, "data": dict(data), **changes}
        result = run(values(tmp_path / name, "cuda", on_gpu, **options))
        found[name] = result.report["auc"]
    assert found["fp32"] > 0.65
    for name, auc in found.items():
        assert auc == pytest.approx(found["fp32"], abs=1e-3), (name, found)
    skipped = [record["skipped_steps"] for record in records(tmp_path / "dynamic", "step")]
    assert 0 <= skipped[-1] < 100  # it starts too high


def test_a_loss_scale_that_overflows_skips_steps(on_gpu: Any, tmp_path: Path) -> None:
    if on_gpu.emulated:
        pytest.skip("products in half precision need a GPU")
    # (p - y) / 64 times 2^24 is more than float16 holds.
    changes = {"precision": "fp16", "loss_scale": "dynamic", "loss_scale_growth": 1, "data": {"batch_size": 64}}
    run(values(tmp_path, "cuda", on_gpu, **changes))
    found = records(tmp_path, "step")
    assert np.isfinite([record["loss"] for record in found]).all()
    assert found[-1]["skipped_steps"] > 3


def test_a_wrong_row_is_named(on_gpu: Any, tmp_path: Path) -> None:
    from pipeline.dataset import load_dataset
    from pipeline.generated import parse_synthetic, write_synthetic

    folder = tmp_path / "data"
    write_synthetic(folder, parse_synthetic(SMALL))
    (file,) = load_dataset(folder).manifest.splits["train"].files
    words = np.memmap(folder / file.path, np.uint32, "r+").reshape(file.rows, -1)
    words[7, 20] = 0xFFFFFFF0
    words.flush()
    changes = {"data": {"path": str(folder), "shuffle": False}}
    with pytest.raises(CrosslaneError, match=r"row 7.*byte"):
        run(values(tmp_path / "run", "cuda", on_gpu, **changes))


def test_tables_too_large_are_refused_before_they_are_allocated(on_gpu: Any, tmp_path: Path) -> None:
    if on_gpu.emulated:
        pytest.skip("the host has no memory of its own to run out of")
    data = {"path": "synthetic:criteo-terabyte-full?rows=1000000", "batch_size": 1024}
    with pytest.raises(CrosslaneError, match=r"tables: .* GiB .*table_precision: fp16"):
        run(values(tmp_path, "cuda", on_gpu, data=data) | {"model": {"embedding_dim": 128, "bottom_mlp": (128,)}})
