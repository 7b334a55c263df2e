"""Runs on bags of several lengths: on a GPU as on the CPU, emulated where there is none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rank_threads
from bag_cases import EMBEDDING, OPTIMIZERS, PLACED_BAGS, TABLES, write_bags
from run_cases import emulate, losses, records, run, values

from dlrm.errors import DataError
from pipeline import engine_cuda

BATCH, STEPS = 24, 20
"""The 17th batch of a pass has 16 rows; before it every place of a ring of three is captured, and replayed."""
SEED = 29
"""Of the data: in some data a rectifier whose input is nearly 0 is on with one order of sums and off with another."""


@pytest.fixture
def on_gpu(machine: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    machine.devices = emulate(machine, monkeypatch)
    return machine


def run_on(
    device: str,
    directory: Path,
    machine: Any,
    data: Path,
    ranks: int = 1,
    *,
    batch: int = BATCH,
    steps: int = STEPS,
    order: Any = None,
    **changes: Any,
) -> Any:
    made = values(
        directory, device, machine, data={"path": str(data), "batch_size": batch, **(order or {})},
        train={"max_steps": steps, "progress_every": 1}, optimizer={"kind": "sgd", "lr": 0.1}, **changes,
    )  # fmt: skip
    made["eval"] = {"batch_size": 100, "final_split": None}
    return run(made, lambda work: rank_threads.run_ranks(ranks, work)[0])


FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("sgd", {}),
    "momentum, weighted": ("momentum", {"weighted": True}),
    "adagrad, full bags": ("adagrad", {"bags": False}),
    "rowwise_adagrad, jagged, short at first": ("rowwise_adagrad", {"layout": "jagged", "short": 0.5}),
    "adam, weighted, jagged": ("adam", {"weighted": True, "layout": "jagged"}),
    "ftrl": ("ftrl", {}),
}


@pytest.mark.parametrize("name", FORMS)
def test_bags_train_as_on_the_cpu(on_gpu: Any, name: str, tmp_path: Path) -> None:
    """Replayed from graphs, which hold for whatever number of keys a batch has."""
    kind, form = FORMS[name]
    data = write_bags(tmp_path / "data", SEED, **form)
    steps, order = (STEPS + 17, {"shuffle": False}) if "short" in form else (STEPS, {})
    reports = {}
    for device in ("cpu", "cuda"):
        reports[device] = run_on(
            device, tmp_path / device, on_gpu, data, steps=steps, order=order,
            embedding=EMBEDDING | {"optimizer": OPTIMIZERS[kind]},
        ).report  # fmt: skip
    np.testing.assert_allclose(losses(tmp_path / "cuda"), losses(tmp_path / "cpu"), rtol=1e-4)
    for metric in ("auc", "log_loss"):
        assert reports["cuda"][metric] == pytest.approx(reports["cpu"][metric], rel=1e-3), metric
    for device in on_gpu.devices:
        # Where bags grow, arrays are made anew, and graphs.
        assert device.recordings["made"] > 3 if "short" in form else device.recordings["made"] == 3
        assert device.recordings["replayed"] > 6


def test_pooled_vectors_of_one_key_need_no_offsets(on_gpu: Any, tmp_path: Path) -> None:
    """All bags are full and none is pooled: one key a feature."""
    data = write_bags(tmp_path / "data", SEED, bags=False)
    tables = {name: {"pooling": "concat"} for name, (_, hotness) in TABLES.items() if hotness > 1}
    for device in ("cpu", "cuda"):
        run_on(device, tmp_path / device, on_gpu, data, embedding={"tables": tables})
    np.testing.assert_allclose(losses(tmp_path / "cuda"), losses(tmp_path / "cpu"), rtol=1e-4)


def test_a_bag_that_is_not_full_is_no_row_of_features(on_gpu: Any, seed: int, tmp_path: Path) -> None:
    data = write_bags(tmp_path / "data", seed)
    for device in ("cpu", "cuda"):  # of several rows, a GPU names any
        with pytest.raises(DataError, match=r"table 'items': row \d+ of .*concat every row holds 4;"):
            run_on(
                device, tmp_path / device, on_gpu, data, embedding={"tables": {"items": {"pooling": "concat"}}}
            )  # fmt: skip


def test_replayed_steps_are_the_issued_ones(on_gpu: Any, tmp_path: Path) -> None:
    """To the last bit, whatever number of keys a batch has."""
    if on_gpu.emulated:
        pytest.skip("nothing is captured without a GPU; the other tests look at what would be")
    data = write_bags(tmp_path / "data", SEED, layout="jagged")
    for name, graphs in (("replayed", True), ("issued", False)):
        run_on("cuda", tmp_path / name, on_gpu, data, embedding=EMBEDDING, deterministic=True, cuda={"graphs": graphs})
    assert losses(tmp_path / "replayed").tolist() == losses(tmp_path / "issued").tolist()


ON_RANKS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "sgd, full bags, once": (2, {"weighted": True, "bags": False}, {"deduplicate": True}),
    "adam, frequent rows counted, short bags that run over": (
        3, {"ordered": False, "layout": "jagged", "short": 0.4}, {"optimizer": OPTIMIZERS["adam"]}
    ),
    "by node, lists that run over": (4, {}, {"nodes": 2, "all_to_all": "hierarchical"}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # what was not fetched is any number
@pytest.mark.parametrize("name", ON_RANKS)
def test_ranks_train_on_bags_as_one_cpu(
    on_gpu: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replayed: what stands for NCCL here does nothing that a graph would not."""
    if not on_gpu.emulated:
        pytest.skip("ranks that are threads exchange arrays of the host; test_several_gpus.py has ranks with GPUs")
    monkeypatch.setattr(engine_cuda.Carrier, "captures", True)
    ranks, form, changes = ON_RANKS[name]
    if "run over" in name:
        measure = engine_cuda.measure_lists
        monkeypatch.setattr(engine_cuda, "measure_lists", lambda *rest: replace(measure(*rest), sigmas=-10.0))
    data = write_bags(tmp_path / "data", SEED, **form)
    steps: dict[str, Any] = {"batch": 32, "steps": 13, "order": {"shuffle": "short" not in form}}  # at last 16 rows
    if "by node" in name:
        steps |= {"batch": 64, "steps": 7}
    embedding = {field: value for field, value in changes.items() if field == "optimizer"}
    one = run_on("cpu", tmp_path / "cpu", on_gpu, data, **steps, embedding=EMBEDDING | embedding)
    several = run_on(
        "cuda", tmp_path / "gpus", on_gpu, data, ranks, **steps, embedding=PLACED_BAGS | changes,
        deterministic="adam" in name,
    )  # fmt: skip
    np.testing.assert_allclose(losses(tmp_path / "gpus"), losses(tmp_path / "cpu"), rtol=1e-4)
    for metric in ("auc", "log_loss"):
        assert several.report[metric] == pytest.approx(one.report[metric], rel=1e-3), metric
    assert (records(tmp_path / "gpus", "step")[-1]["overflows"] > 0) == ("run over" in name)
    if "full" in name:
        for device in on_gpu.devices:
            assert device.recordings["made"] == 3
            assert device.recordings["replayed"] > 3
