"""Runs on bags of several lengths: on a GPU as on the CPU, emulated where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bag_cases import EMBEDDING, OPTIMIZERS, write_bags
from run_cases import emulate, losses, run, values

from dlrm.errors import DataError

STEPS = 7
"""Of 64 rows, so that the last batch of the pass has 16."""
SEED = 29
"""Of the data: in some data a rectifier whose input is nearly 0 is on with one order of sums and off with another."""


@pytest.fixture
def on_gpu(machine: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    emulate(machine, monkeypatch)
    return machine


def run_on(device: str, directory: Path, machine: Any, data: Path, **changes: Any) -> Any:
    made = values(
        directory, device, machine, data={"path": str(data), "batch_size": 64},
        train={"max_steps": STEPS, "progress_every": 1}, optimizer={"kind": "sgd", "lr": 0.1}, **changes,
    )  # fmt: skip
    made["eval"] = {"batch_size": 100, "final_split": None}
    return run(made)


FORMS = {"momentum": "weighted", "adam": "weighted", "sgd, one key a feature": "full"}


@pytest.mark.parametrize("name", [*OPTIMIZERS, "sgd, one key a feature"])
def test_bags_train_as_on_the_cpu(on_gpu: Any, name: str, tmp_path: Path) -> None:
    form, kind = FORMS.get(name, "bags"), name.partition(",")[0]
    data = write_bags(tmp_path / "data", SEED, weighted=form == "weighted", bags=form != "full")
    reports = {}
    for device in ("cpu", "cuda"):
        changes = {"embedding": EMBEDDING | {"optimizer": OPTIMIZERS[kind]}}
        reports[device] = run_on(device, tmp_path / device, on_gpu, data, **changes).report
    np.testing.assert_allclose(losses(tmp_path / "cuda"), losses(tmp_path / "cpu"), rtol=1e-4)
    for metric in ("auc", "log_loss"):
        assert reports["cuda"][metric] == pytest.approx(reports["cpu"][metric], rel=1e-3), metric


def test_a_bag_that_is_not_full_is_no_row_of_features(on_gpu: Any, seed: int, tmp_path: Path) -> None:
    data = write_bags(tmp_path / "data", seed)
    found = []
    for device in ("cpu", "cuda"):
        with pytest.raises(DataError, match=r"table 'items': row \d+ of .*concat every row holds 4;") as error:
            run_on(
                device, tmp_path / device, on_gpu, data, embedding={"tables": {"items": {"pooling": "concat"}}}
            )  # fmt: skip
        found.append(str(error.value))
    assert found[0] == found[1]
