"""Whole runs over several GPUs beside the same run on one: emulated, with ranks that are threads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import rank_threads
from run_cases import emulate, losses, records, run, values

from dlrm.errors import DeviceError
from dlrm.interaction import listed_interaction, listed_interaction_backward
from dlrm.scalars import SKIPPED_STEPS
from embedding.captured_exchange import ExchangedEmbedding
from embedding.captured_sums import CapturedSums
from embedding.placement import plan_from_values
from pipeline import engine, engine_cuda
from pipeline.checkpoint import open_checkpoint
from pipeline.flight import Flight
from pipeline.schedule import EVAL_OVERLAPPED, TRAIN_EXCHANGED, TRAIN_OVERLAPPED
from pipeline.stages import S
from pipeline.stages_cuda import CudaStages
from pipeline.trainer import TrainResult

STEPS = 6
DATA = "synthetic:criteo-terabyte?rows=16000&scale=20000"
"""Two batches of evaluation rows, by 400."""
OPTIONS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "adam, deterministic, touched": {
        "optimizer": {"kind": "adam", "lr": 0.01},
        "deterministic": True,
        "embedding": {"placement": "replicated"},
    },
    "uneven, once": {"data": {"batch_size": 67}, "embedding": {"deduplicate": True}},
    "increments, columns": {
        "checkpoint": {"incremental": True},
        "train": {"checkpoint_every": 2},
        "embedding": {"placement": "column_wise"},
    },
}


@pytest.fixture
def emulated(machine: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    if not machine.emulated:
        pytest.skip("ranks that are threads exchange arrays of the host; test_several_gpus.py has ranks with GPUs")
    emulate(machine, monkeypatch)
    return machine


def run_on(ranks: int, directory: Path, machine: Any, **changes: Any) -> TrainResult:
    """A run whose plan has replicated, owned and spread rows, where there are several ranks."""
    placed = {"C1": {"placement": "hybrid", "threshold": 3}, "C10": {"placement": "hybrid", "threshold": 40}}
    placed["C20"] = {"placement": "row_wise"}
    embedding = {"tables": placed, "placement": "table_wise", **changes.pop("embedding", {})}
    train = {"max_steps": STEPS, "progress_every": 1, **changes.pop("train", {})}
    data = {"path": DATA, **changes.pop("data", {})}
    run_values = values(directory, "cuda", machine, embedding=embedding, train=train, data=data, **changes)
    return run(run_values, lambda work: rank_threads.run_ranks(ranks, work)[0])


def changes_of(name: str) -> dict[str, Any]:
    return {field: dict(value) if isinstance(value, dict) else value for field, value in OPTIONS[name].items()}


def check(directory: Path, result: TrainResult, other: Path, expected: TrainResult) -> None:
    """Both runs had the same losses, and their models score the same."""
    found = losses(directory)
    assert np.isfinite(found).all()
    assert len(found) == STEPS
    np.testing.assert_allclose(found, losses(other), rtol=1e-4)
    for metric in ("auc", "log_loss", "accuracy", "calibration"):
        assert result.report[metric] == pytest.approx(expected.report[metric], rel=1e-3), metric


@pytest.mark.parametrize(
    ("ranks", "name"),
    [(2, "sgd"), (4, "adam, deterministic, touched"), (3, "uneven, once"), (2, "increments, columns")],
)  # fmt: skip
def test_ranks_train_as_one(
    emulated: Any, ranks: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways, choose = [], CapturedSums.touched

    def noted(self: CapturedSums, *arguments: Any) -> Any:
        ways.append(choose(self, *arguments))
        return ways[-1]

    monkeypatch.setattr(CapturedSums, "touched", noted)
    one = run_on(1, tmp_path / "one", emulated, **changes_of(name))
    several = run_on(ranks, tmp_path / "several", emulated, **changes_of(name))
    check(tmp_path / "several", several, tmp_path / "one", one)
    assert records(tmp_path / "several", "step")[-1]["overflows"] == 0
    assert records(tmp_path / "several", "start")[0]["carrier"] == "staged"
    assert len(ways) >= ranks
    assert all((way is not None) == ("touched" in name) for way in ways)


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
def test_ranks_exchange_by_node(emulated: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes of two ranks, whose lists run over at first; distinct rows not all of them can count by themselves."""
    measure = engine_cuda.measure_lists
    monkeypatch.setattr(engine_cuda, "measure_lists", lambda *rest: replace(measure(*rest), sigmas=-10.0))
    one = run_on(1, tmp_path / "one", emulated)
    nodes = run_on(
        4, tmp_path / "nodes", emulated, embedding={"nodes": 2, "all_to_all": "hierarchical", "deduplicate": True}
    )
    check(tmp_path / "nodes", nodes, tmp_path / "one", one)
    assert records(tmp_path / "nodes", "start")[0]["plan"]["all_to_all"] == "hierarchical"
    assert 1 <= records(tmp_path / "nodes", "step")[-1]["overflows"] < STEPS


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # what was not fetched is any number
@pytest.mark.parametrize("form", ["once", "always", "sometimes"])
def test_a_batch_whose_lists_run_over_is_run_again(
    emulated: Any, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once: lists grow after that. Always, and about every other time: they do not."""
    one = run_on(1, tmp_path / "one", emulated)
    measure, exact, runs = engine_cuda.measure_lists, CudaStages.run_exact, []

    def shorter(*arguments: Any) -> Any:
        return replace(measure(*arguments), sigmas=0.0 if form == "sometimes" else -10.0)

    def counted(self: CudaStages, batch: Any, flight: Flight, last: S) -> None:
        runs.append(last)
        exact(self, batch, flight, last)

    monkeypatch.setattr(engine_cuda, "measure_lists", shorter)
    monkeypatch.setattr(CudaStages, "run_exact", counted)
    if form != "once":
        monkeypatch.setattr(ExchangedEmbedding, "make_room", lambda *_: None)
    two = run_on(2, tmp_path / "two", emulated)
    check(tmp_path / "two", two, tmp_path / "one", one)
    overflows = [record["overflows"] for record in records(tmp_path / "two", "step")]
    if form == "once":
        assert overflows[-1] >= 1
    if form == "always":
        assert overflows == list(range(1, STEPS + 1))
        # On both ranks, and every batch of the closing evaluation.
        assert runs.count(S.dense_update) == 2 * STEPS
        assert runs.count(S.top_forward) == 2 * 2


def test_a_deterministic_run_is_the_same_in_any_order(emulated: Any, tmp_path: Path) -> None:
    for name, overlap in (("overlapped", True), ("sequential", False)):
        run_on(
            2, tmp_path / name, emulated, deterministic=True, overlap={"train": overlap, "eval": overlap}
        )  # fmt: skip
    assert losses(tmp_path / "overlapped").tolist() == losses(tmp_path / "sequential").tolist()


@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_other_ranks(emulated: Any, first: int, second: int, tmp_path: Path) -> None:
    adam = {"optimizer": {"kind": "adam", "lr": 0.01}}
    whole = run_on(1, tmp_path / "whole", emulated, **adam)
    run_on(first, tmp_path / "broken", emulated, train={"max_steps": STEPS // 2}, **adam)
    end = run_on(second, tmp_path / "broken", emulated, **adam)
    check(tmp_path / "broken", end, tmp_path / "whole", whole)


def test_frequent_rows_are_found_wherever_they_are_and_kept(
    emulated: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data that is not numbered by frequency: rows are counted and listed, and a run goes on with its lists."""
    load = engine.load_dataset

    def unordered(path: str) -> Any:
        dataset = load(path)
        tables = tuple(replace(table, frequency_ordered=False) for table in dataset.tables)
        dataset.manifest = replace(dataset.manifest, tables=tables)
        return dataset

    monkeypatch.setattr(engine, "load_dataset", unordered)
    adam = {"optimizer": {"kind": "adam", "lr": 0.01}}
    one = run_on(1, tmp_path / "one", emulated, **adam)
    lists = []
    for ranks, steps in ((2, 2), (2, 4), (3, STEPS)):  # three ranks make lists of their own
        end = run_on(ranks, tmp_path / "several", emulated, train={"max_steps": steps}, **adam)
        saved = open_checkpoint(max((tmp_path / "several" / "checkpoints").glob("step-*")))
        plan = plan_from_values(saved.meta["plan"])
        pairs = zip(plan.specs, plan.placements, strict=True)
        lists.append({s.name: saved.read(f"frequent.{s.name}").tolist() for s, place in pairs if place.listed})
    check(tmp_path / "several", end, tmp_path / "one", one)
    assert "C10" in lists[0]
    assert lists[0] == lists[1]
    assert "C10" in lists[2]


def test_a_gradient_of_one_rank_that_is_not_finite_skips_all_ranks_steps(
    emulated: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with dynamic loss scaling in half precision, whose products need a GPU."""
    build, backward, seen = engine_cuda.build_stages, CudaStages.top_backward, []

    def build_dynamic(*arguments: Any, **named: Any) -> CudaStages:
        stages = build(*arguments, **named)
        stages.dynamic = True
        return stages

    def broken(self: CudaStages, flight: Flight) -> None:
        backward(self, flight)
        if flight.step == 3 and self.comm.rank == self.comm.size - 1:
            flight.workspace.grad_vectors[0, 1, 0] = np.inf
        if flight.step == STEPS:
            seen.append(int(self.guard.view(np.int32)[SKIPPED_STEPS]))

    monkeypatch.setattr(engine_cuda, "build_stages", build_dynamic)
    monkeypatch.setattr(CudaStages, "top_backward", broken)
    one = run_on(1, tmp_path / "one", emulated)
    two = run_on(2, tmp_path / "two", emulated)
    check(tmp_path / "two", two, tmp_path / "one", one)
    assert seen == [1, 1, 1]


FUSED: dict[str, tuple[int, dict[str, Any]]] = {
    "uneven": (3, {"data": {"batch_size": 67}}),
    "dynamic": (2, {"loss_scale": "dynamic"}),
    "as they come": (2, {"overlap": {"train": False}, "deterministic": False}),
    "run over": (2, {}),
}


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # what was not fetched is any number
@pytest.mark.parametrize("name", FUSED)
def test_rows_that_the_interaction_finds_train_like_rows_side_by_side(
    emulated: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows in the tables and rows that have come, gradients that are sent from where they are written."""
    (ranks, changes), calls = FUSED[name], []

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(name)
        return listed_interaction_backward(*arguments, **named)

    monkeypatch.setattr("pipeline.stages_cuda.listed_interaction_backward", counted)
    if name == "run over":
        measure = engine_cuda.measure_lists
        monkeypatch.setattr(engine_cuda, "measure_lists", lambda *rest: replace(measure(*rest), sigmas=-10.0))
    for fused in (False, True):
        assert not calls
        options = {
            "train": {"max_steps": 4},
            "precision": "fp16",
            "deterministic": True,
            "cuda": {"fused_train": fused},
            **changes,
        }
        run_on(ranks, tmp_path / str(fused), emulated, **options)
    found, kept = losses(tmp_path / "True"), losses(tmp_path / "False")
    assert np.isfinite(found).all()
    assert len(found) == 4
    assert len(calls) >= 4 * ranks
    if name == "as they come":
        np.testing.assert_allclose(found, kept, rtol=1e-3)
    else:
        assert found.tolist() == kept.tolist()
    assert (records(tmp_path / "True", "step")[-1]["overflows"] > 0) == (name == "run over")


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # what was not fetched is any number
@pytest.mark.parametrize("sigmas", [10.0, -10.0], ids=["", "run over"])
def test_evaluations_over_ranks_are_the_same_to_the_last_bit_in_every_form(
    emulated: Any, sigmas: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows side by side or where the interaction finds them, one batch after the other or three in flight."""
    measure, calls, found, again = engine_cuda.measure_lists, [], {}, []
    monkeypatch.setattr(engine_cuda, "measure_lists", lambda *rest: replace(measure(*rest), sigmas=sigmas))
    run_exact = CudaStages.run_exact

    def noted(self: CudaStages, batch: Any, flight: Flight, last: S) -> None:
        again.append(last)
        run_exact(self, batch, flight, last)

    monkeypatch.setattr(CudaStages, "run_exact", noted)
    monkeypatch.setattr(ExchangedEmbedding, "make_room", lambda *_: None)  # the training's batch would make enough

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(arguments)
        return listed_interaction(*arguments, **named)

    monkeypatch.setattr("pipeline.stages_cuda.listed_interaction", counted)
    for fused in (False, True):
        for overlapped in (False, "always"):
            assert bool(calls) == (fused and bool(overlapped))
            options: dict[str, Any] = {
                "train": {"max_steps": 1},
                "precision": "fp16",
                "deterministic": True,
                "cuda": {"fused_train": False, "fused_eval": fused},
                "overlap": {"eval": overlapped},
            }
            report = run_on(3, tmp_path / f"{fused}-{overlapped}", emulated, **options).report
            found[fused, overlapped] = report["auc"], report["log_loss"]
            assert (S.top_forward in again) == (sigmas < 0)
            again.clear()
    assert len(set(found.values())) == 1


@pytest.mark.parametrize(
    "exchange", [{"deduplicate": True}, {"placement": "column_wise"}, {"nodes": 2, "all_to_all": "hierarchical"}]
)
def test_one_kernel_for_look_up_and_interaction_is_refused_where_it_cannot_be(
    emulated: Any, exchange: dict[str, Any], tmp_path: Path
) -> None:
    form = {"precision": "fp16", "cuda": {"fused_train": True}}
    with pytest.raises(DeviceError, match="neither by node nor de-duplicated nor by columns"):
        run_on(2, tmp_path, emulated, embedding=exchange, **form)


def test_a_batch_that_fills_some_ranks_shares_alone_is_not_whole() -> None:
    """The first of two ranks has 4 rows of 7 as of 8; the other has not, and both replay or neither does."""
    flight = Flight(labels=np.zeros(4), dense=None, workspace=None, embedding=None, batch_rows=8)  # type: ignore[arg-type]
    for rows in (7, 8):
        host = SimpleNamespace(num_rows=4)
        flight.accept(SimpleNamespace(step=1, epoch=0, host=host, global_rows=rows))  # type: ignore[arg-type]
        assert flight.whole is (rows == 8)


@pytest.mark.parametrize("rows", [TRAIN_OVERLAPPED, TRAIN_EXCHANGED, EVAL_OVERLAPPED])
def test_one_stream_has_all_exchanges(rows: Any) -> None:
    """So that one communicator serves them."""
    exchanges = {S.input_dist, S.output_dist, S.grad_dist, S.reduce_replicated, S.reduce_top, S.reduce_bottom}
    assert len({row.stream for row in rows if row.stage in exchanges}) == 1
