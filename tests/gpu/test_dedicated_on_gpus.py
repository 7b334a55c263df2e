"""Evaluation on ranks of its own where rows lie on GPUs: emulated, with ranks that are threads."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rank_threads
from run_cases import emulate, records, run, values

from dlrm.errors import DeviceError
from pipeline.dedicated import check_devices

STEPS = 4
DATA = "synthetic:criteo-terabyte?rows=16000&scale=20000"
"""Two batches of evaluation rows, by 400."""
PLACED = {"C1": {"placement": "hybrid", "threshold": 3}, "C20": {"placement": "row_wise"}}
FORMS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "two train, increments": (2, 1, {"checkpoint": {"incremental": True}}),
    "two evaluate": (1, 2, {"optimizer": {"kind": "adam", "lr": 0.01}}),
}


@pytest.fixture
def emulated(machine: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    if not machine.emulated:
        pytest.skip("ranks that are threads exchange arrays of the host; test_several_gpus.py has ranks with GPUs")
    emulate(machine, monkeypatch)
    return machine


@pytest.mark.parametrize("form", FORMS)
def test_metrics_are_those_of_the_ranks_that_train(emulated: Any, form: str, tmp_path: Path) -> None:
    """A rule that nothing meets has training wait, which threads of one process have to."""
    trainers, evaluators, changes = FORMS[form]
    found = []
    for name, own in (("together", 0), ("apart", evaluators)):
        run_values = values(
            tmp_path / name, "cuda", emulated, data={"path": DATA}, deterministic=True,
            train={"max_steps": STEPS, "eval_every": 2, "checkpoint_every": 1,
                   "target": {"metric": "auc", "value": 1.0}},
            embedding={"placement": "table_wise", "tables": PLACED}, **changes,
        )  # fmt: skip
        run_values["eval"] |= {"ranks": own}
        result = run(run_values, lambda work, ranks=trainers + own: rank_threads.run_ranks(ranks, work)[0])
        assert result.step == STEPS
        found.append({record["step"]: record["metrics"] for record in records(tmp_path / name, "eval")})
    together, apart = found
    assert sorted(apart) == [2, 4]
    assert len({metrics["log_loss"] for metrics in apart.values()}) == 2
    for step, metrics in apart.items():
        for metric in ("auc", "log_loss", "calibration"):
            np.testing.assert_allclose(metrics[metric], together[step][metric], rtol=1e-6, err_msg=metric)


def test_ranks_with_and_without_gpus_are_refused() -> None:
    def work(comm: Any) -> None:
        model = types.SimpleNamespace(flat_parameters=np.zeros(40))
        check_devices(types.SimpleNamespace(model=model, device=types.SimpleNamespace(steps_behind=2)), comm)  # type: ignore[arg-type]
        device = types.SimpleNamespace(steps_behind=2 * (comm.rank != 1))
        check_devices(types.SimpleNamespace(model=model, device=device), comm)  # type: ignore[arg-type]

    with pytest.raises(DeviceError, match="some ranks have a GPU, some have none"):
        rank_threads.run_ranks(3, work)
