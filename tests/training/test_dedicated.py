"""Evaluation on ranks of its own gives what the ranks that train would have found themselves."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import psutil
import pytest

from dlrm.config import parse_run_config
from dlrm.errors import ConfigError
from pipeline.train import train

pytestmark = pytest.mark.ranks


def evaluations(records, values):
    """Metrics by step and split; none is told twice."""
    found = records(values["run"]["directory"], "eval")
    keyed = {(record["step"], record["split"]): record["metrics"] for record in found}
    assert len(keyed) == len(found)
    return keyed


@pytest.mark.parametrize(
    ("evaluating", "sections"),
    [(1, {}), (2, {"checkpoint": {"incremental": True}, "embedding": {"placement": "hybrid"}})],
)
def test_metrics_are_those_of_the_ranks_that_train(tiny_dataset, run_values, run_engine, records, evaluating, sections):
    """To the last bit, the shares of ranks being equal; once with increments, which read the marks of rows too."""
    data, found = tiny_dataset(), []
    for name, own in (("together", 0), ("apart", evaluating)):
        values = run_values(
            data,
            name,
            deterministic=True,
            train={"epochs": 2, "eval_every": 3, "checkpoint_every": 5},
            eval={"batch_size": 32, "ranks": own},
            **sections,
        )
        code, errors = run_engine(values, ranks=2 + own)
        assert code == 0, errors
        found.append(evaluations(records, values))
    together, apart = found
    assert len(together) == 9  # 26 steps, and the closing evaluation
    assert apart == together
    assert len({metrics["auc"] for metrics in apart.values()}) > 2


def test_a_rule_waits_for_the_metric_and_keeps_the_best(tiny_dataset, run_values, run_engine, records):
    data, ends = tiny_dataset(), []
    for own in (0, 1):
        values = run_values(
            data,
            f"stop-{own}",
            deterministic=True,
            optimizer={"kind": "adam", "lr": 0.3},
            train={"epochs": 40, "eval_every": 4, "early_stop": {"metric": "log_loss", "patience": 2}},
            eval={"batch_size": 32, "ranks": own},
        )
        code, errors = run_engine(values, ranks=2 + own)
        assert code == 0, errors
        end = records(values["run"]["directory"], "end")[-1]
        ends.append((end["step"], end["reason"], evaluations(records, values)))
    assert ends[0][1] == "early_stop"
    assert ends[1] == ends[0]


def test_a_stopped_run_goes_on_with_the_weights_that_it_left(
    tiny_dataset, run_values, start_engine, run_engine, records
):
    """The ranks that evaluate begin with the checkpoint too."""
    data = tiny_dataset(train=20_000)
    values, whole = (
        run_values(
            data,
            name,
            deterministic=True,
            train={"epochs": 1, "eval_every": 40, "progress_every": 1},
            eval={"batch_size": 32, "ranks": 1},
        )
        for name in ("stopped", "whole")
    )
    process = start_engine(values, ranks=3)
    wait_for(lambda: count(values, "step") > 60)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    stopped = records(values["run"]["directory"], "end")[-1]
    assert 60 < stopped["step"] < 625
    for each in (values, whole):
        code, errors = run_engine(each, ranks=3)
        assert code == 0, errors
    assert evaluations(records, values) == evaluations(records, whole)


@pytest.mark.parametrize("victim", [0, 2])
def test_a_dying_rank_ends_the_others(tiny_dataset, run_values, start_engine, victim):
    values = run_values(
        tiny_dataset(), train={"epochs": 100_000, "eval_every": 5, "progress_every": 1}, eval={"ranks": 1}
    )
    process = start_engine(values, ranks=3)
    wait_for(lambda: count(values, "eval") > 1)
    ranks = {
        int(child.environ()["OMPI_COMM_WORLD_RANK"]): child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "pipeline.train" in child.cmdline()
    }
    assert sorted(ranks) == [0, 1, 2]
    ranks[victim].kill()
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks.values())


def count(values, kind):
    """Records of a type so far."""
    progress = Path(values["run"]["directory"]) / "progress.jsonl"
    return progress.read_text().count(f'"type":"{kind}"') if progress.exists() else 0


def wait_for(condition, timeout=120):
    """Return once it holds."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_tables_that_do_not_fit_are_refused_in_a_sentence(tiny_dataset, run_values, run_engine):
    """370 rows of 4 KiB: two ranks hold half of them each, one holds all."""
    values = run_values(
        tiny_dataset(),
        embedding={"placement": "row_wise", "memory_limit_mib": 1},
        optimizer={"kind": "sgd"},
        model={"embedding_dim": 1024, "bottom_mlp": [8, 1024]},
        train={"epochs": 1, "max_steps": 2},
    )
    code, errors = run_engine(values, ranks=2)
    assert code == 0, errors
    code, errors = run_engine({**values, "eval": {"ranks": 1}}, ranks=3)
    assert code == ConfigError.exit_code
    assert "eval.ranks: 1; on these ranks" in errors
    assert "exceed" in errors
    assert "Traceback" not in errors


def test_one_process_is_refused(tiny_dataset, run_values):
    values = run_values(tiny_dataset(), eval={"ranks": 1})
    with pytest.raises(ConfigError, match=r"eval\.ranks: 1, but the run has 1 rank"):
        train(parse_run_config(values))
