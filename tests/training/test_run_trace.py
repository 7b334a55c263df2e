"""A run whose config chooses steps to look at: its files, its report, and the same training."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from dlrm.config import parse_run_config
from pipeline.stages import S
from pipeline.trace import overlap_of, runs_of
from pipeline.train import train

sys.path.insert(0, str(Path(__file__).parents[1] / "pipeline"))

from trace_events import check_trace_events

TRACE = {"steps": [3, 4, 5, 9], "eval_batches": [1, 2]}


def read(values, what):
    return json.loads((Path(values["run"]["directory"]) / "trace" / f"{what}.json").read_text())


def check_run(values, ranks, first=3):
    """Both files of a run over 26 steps with evaluations, and what its report has of them."""
    training, evaluation = read(values, "train"), read(values, "eval")
    assert check_trace_events(training) > 0
    assert check_trace_events(evaluation) > 0
    for rank in range(ranks):
        runs = runs_of(training, rank)
        assert {run.tick for run in runs} == {step for step in TRACE["steps"] if step >= first}
        assert {run.stage for run in runs} == set(S)
        assert {run.tick for run in runs_of(evaluation, rank)} == {1, 2}
        assert all(0 <= run.start <= run.end for run in runs)
    report = json.loads((Path(values["run"]["directory"]) / "report.json").read_text())
    for what, trace in (("train", training), ("eval", evaluation)):
        assert report["lanes"][what]["ratio"] == pytest.approx(overlap_of(runs_of(trace))["ratio"], abs=1e-6)
    page = (Path(values["run"]["directory"]) / "report.html").read_text()
    assert page.count('class="chart lanes"') == 2
    assert "overlap ratio" in page


def test_a_traced_run_has_pictures_and_the_same_outcome(tiny_dataset, run_values):
    data, outcomes = tiny_dataset(), []
    common = {"overlap": {"train": "always", "eval": "always"}, "eval": {"batch_size": 16}}
    for name, trace in (("plain", {}), ("traced", TRACE)):
        values = run_values(data, name, **common, train={"eval_every": 10}, trace=trace)
        outcomes.append(train(parse_run_config(values)).report)
    assert (Path(outcomes[0]["run"]["checkpoint"]).parents[1] / "trace").exists() is False
    assert outcomes[0]["lanes"] == {}
    assert outcomes[0]["log_loss"] == outcomes[1]["log_loss"]
    check_run(values, 1)


def test_a_closing_evaluation_is_traced_where_there_is_no_other_and_only_steps_still_to_come(tiny_dataset, run_values):
    data = tiny_dataset()
    short = run_values(data, train={"max_steps": 4}, trace={"steps": [2]})
    train(parse_run_config(short))
    assert {run.tick for run in runs_of(read(short, "train"))} == {2}
    longer = run_values(data, trace=TRACE, eval={"batch_size": 16})
    train(parse_run_config(longer))
    assert {run.tick for run in runs_of(read(longer, "train"))} == {5, 9}
    check_run(longer, 1, first=5)


@pytest.mark.ranks
def test_every_rank_is_in_the_trace(tiny_dataset, run_values, run_engine):
    values = run_values(
        tiny_dataset(), deterministic=True, overlap={"train": "always", "eval": "always"}, train={"eval_every": 10},
        eval={"batch_size": 16}, trace=TRACE,
    )  # fmt: skip
    code, errors = run_engine(values, ranks=2)
    assert code == 0, errors
    check_run(values, 2)
