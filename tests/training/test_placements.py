"""However the tables are placed, whole runs train as one rank does, and go on from each other's checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from embedding.placement import plan_from_values
from embedding.reduce_way import ReduceWay
from pipeline.checkpoint import open_checkpoint
from pipeline.dataset import load_dataset
from pipeline.synthetic import SyntheticTable, generate

HYBRID = {"tables": {name: {"placement": "hybrid", "threshold": rows} for name, rows in (("user", 7), ("item", 100))}}
PLACEMENTS = {
    "row_wise": {"placement": "row_wise"},
    "column_wise": {"placement": "column_wise"},
    "replicated": {"placement": "replicated"},
    "de-duplicated": {"placement": "table_wise", "deduplicate": True},
    "hybrid": {"placement": "row_wise", "deduplicate": True, **HYBRID},
    "hierarchical": {"placement": "row_wise", "all_to_all": "hierarchical", "nodes": 2},
}


def tensors_of(directory):
    checkpoint = open_checkpoint(max((Path(directory) / "checkpoints").glob("step-*")))
    return {name: checkpoint.read(name) for name in checkpoint.names if not name.startswith("frequent.")}


def assert_close(left, right):
    assert left.keys() == right.keys()
    for name, values in left.items():
        assert np.isfinite(values).all(), name
        np.testing.assert_allclose(values, right[name], rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.fixture
def alone(tiny_dataset, run_values, run_engine):
    """The config's values but for ranks and placement, and what one rank makes of them."""
    sections = {"precision": "fp64", "data": {"batch_size": 33}, "optimizer": {"kind": "adagrad", "lr": 0.02}}
    data = tiny_dataset()
    values = run_values(data, "alone", **sections)
    code, errors = run_engine(values)
    assert code == 0, errors
    return lambda directory, **more: run_values(data, directory, **sections, **more), tensors_of(
        values["run"]["directory"]
    )


@pytest.mark.ranks
@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_placement_trains_as_one_rank_does(alone, run_engine, name):
    values_of, expected = alone
    for ranks in (2, 4):
        values = values_of(f"{name}-{ranks}", embedding=PLACEMENTS[name])
        code, errors = run_engine(values, ranks=ranks)
        assert code == 0, errors
        assert_close(tensors_of(values["run"]["directory"]), expected)


@pytest.mark.ranks
def test_frequent_rows_are_found_wherever_they_are_and_kept(alone, run_engine):
    """All 403 rows are counted before the plan is made; the data numbers its rows at random."""
    values_of, _ = alone
    for until in (5, 9):
        values = values_of("counted", embedding=PLACEMENTS["hybrid"], train={"max_steps": until})
        code, errors = run_engine(values, ranks=2)
        assert code == 0, errors
        checkpoint = open_checkpoint(max((Path(values["run"]["directory"]) / "checkpoints").glob("step-*")))
        split = load_dataset(values["data"]["path"]).split("train")
        keys = split.read(slice(None)).keys
        for table, (name, rows, threshold) in enumerate((("user", 50, 7), ("tags", 20, 0), ("item", 300, 100))):
            if not threshold:
                assert f"frequent.{name}" not in checkpoint
                continue
            own = keys.keys[keys.offsets[table * split.rows] : keys.offsets[(table + 1) * split.rows]]
            counts = np.bincount(own, minlength=rows)
            expected = sorted(range(rows), key=lambda row: (-counts[row], row))[:threshold]
            np.testing.assert_array_equal(checkpoint.read(f"frequent.{name}"), sorted(expected))
    kinds = [placement["listed"] for placement in checkpoint.meta["plan"]["placements"]]
    assert kinds == [True, False, True]


@pytest.mark.ranks
@pytest.mark.parametrize("latency_s", [0.0, 1.0])
def test_replicated_rows_go_on_bit_for_bit(tiny_dataset, run_values, run_engine, latency_s):
    """By touched rows where all-reduces start at once, else all; in fp32, where the order of sums shows."""
    link = {"bytes_per_s": 1e9, "latency_s": latency_s}
    rates = dict.fromkeys(("inside", "across", "inside_reduce", "across_reduce"), link) | {"ranks": 3, "nodes": 1}
    values = run_values(
        tiny_dataset(), "run", embedding={"placement": "replicated"}, data={"batch_size": 33},
        train={"max_steps": 12, "checkpoint_every": 5, "keep_checkpoints": 9},
    )  # fmt: skip
    directory, made = Path(values["run"]["directory"]), []
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "links.json").write_text(json.dumps(rates), encoding="utf-8")
    for _ in range(2):
        code, errors = run_engine(values, ranks=3)
        assert code == 0, errors
        made.append(tensors_of(directory))
        for later in sorted((directory / "checkpoints").glob("step-*"))[1:]:
            shutil.rmtree(later)  # the second run goes on from step 5
    [first] = (directory / "checkpoints").glob("step-*")
    assert int(first.name.removeprefix("step-")) == 5
    plan = plan_from_values(open_checkpoint(first).meta["plan"])
    dense = ReduceWay.of(plan, range(len(plan.specs))).is_dense(50 + 20 + 300, 33, plan.specs[0].dim, 4)
    assert dense == (latency_s > 0)
    for name, array in made[0].items():
        np.testing.assert_array_equal(made[1][name], array, err_msg=name)


@pytest.mark.ranks
def test_a_run_goes_on_with_other_ranks_and_another_placement(alone, run_engine):
    values_of, expected = alone
    steps = {"epochs": 2, "progress_every": 1}
    for ranks, until, placement in (
        (2, 7, "hybrid"),
        (2, 11, "column_wise"),  # as many ranks: what is forced now counts, not the plan of the checkpoint
        (4, 15, "column_wise"),
        (1, 20, "row_wise"),
        (3, None, "row_wise"),
    ):
        values = values_of("moved", embedding=PLACEMENTS[placement], train={**steps, "max_steps": until})
        code, errors = run_engine(values, ranks=ranks)
        assert code == 0, errors
        last = open_checkpoint(max((Path(values["run"]["directory"]) / "checkpoints").glob("step-*")))
        assert {own["kind"] for own in last.meta["plan"]["placements"]} == {placement, "row_wise"} - (
            {"row_wise"} if placement == "column_wise" else set()
        )
    assert_close(tensors_of(values["run"]["directory"]), expected)


@pytest.mark.ranks
def test_tables_beyond_the_memory_limit_are_refused_before_they_are_made(tiny_dataset, run_values, run_engine):
    values = run_values(tiny_dataset(), model={"embedding_dim": 1024, "bottom_mlp": [16, 1024]})
    code, errors = run_engine({**values, "embedding": {"memory_limit_mib": 1, "placement": "replicated"}}, ranks=2)
    assert code == 2, errors
    messages = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1
    assert "'item'" in messages[0]


@pytest.mark.ranks
def test_a_run_goes_on_by_another_plan_where_less_memory_is_allowed(tiny_dataset, run_values, run_engine):
    """370 rows of 4 KiB and their replicated state: more than 1 MiB a rank, unless they are spread out."""
    kinds, data = [], tiny_dataset()
    for until, limit in ((3, 9), (5, 9), (7, 1)):
        values = run_values(
            data, model={"embedding_dim": 1024, "bottom_mlp": [16, 1024]}, optimizer={"kind": "sgd"},
            embedding={"memory_limit_mib": limit} | ({"placement": "replicated"} if until == 3 else {}),
            train={"max_steps": until},
        )  # fmt: skip
        code, errors = run_engine(values, ranks=2)
        assert code == 0, errors
        last = open_checkpoint(max((Path(values["run"]["directory"]) / "checkpoints").glob("step-*")))
        kinds.append({own["kind"] for own in last.meta["plan"]["placements"]})
        assert plan_from_values(last.meta["plan"]).memory().max() <= limit * 2**20
    assert kinds[0] == kinds[1] == {"replicated"} != kinds[2]


@pytest.mark.ranks
def test_tables_without_pooling_train_and_go_on_wherever_they_lie(tmp_path, run_values, run_engine):
    """Each key of a bag is a feature of its own (``concat``), beside tables that are pooled."""
    tables = [
        SyntheticTable(rows=60, hotness=3),
        SyntheticTable(rows=300, hotness=2),
        SyntheticTable(rows=20, hotness=2),
    ]
    data = generate(tmp_path / "data", rows=420, tables=tables, num_dense=2, seed=3)
    pooling = {"C1": {"pooling": "concat"}, "C2": {"pooling": "concat"}}
    hybrid = {name: {**own, "placement": "hybrid", "threshold": 11} for name, own in pooling.items()}
    sections = {"precision": "fp64", "data": {"batch_size": 33}, "optimizer": {"kind": "adagrad", "lr": 0.02}}
    found = []
    for directory, runs in (
        ("alone", [(1, None, {"tables": pooling}, False)]),
        (
            "moved",
            [
                (2, 7, {"placement": "row_wise", "deduplicate": True, "tables": hybrid}, "always"),
                (3, 13, {"placement": "column_wise", "tables": pooling}, False),
                (2, None, {"placement": "table_wise", "tables": pooling}, False),
            ],
        ),
    ):
        for ranks, until, embedding, overlap in runs:
            values = run_values(
                data, directory, **sections, embedding=embedding, overlap={"train": overlap, "eval": overlap},
                train={"max_steps": until},
            )  # fmt: skip
            code, errors = run_engine(values, ranks=ranks)
            assert code == 0, errors
        found.append(tensors_of(values["run"]["directory"]))
    assert found[0]["top.0.weight"].shape == (16, 8 + 7 * 6 // 2)  # the bottom output, and pairs of 1 + 3 + 2 + 1
    assert_close(found[1], found[0])
