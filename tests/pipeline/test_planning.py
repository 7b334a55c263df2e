"""Plans of a config: what is forced, counted and printed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from dlrm.config import RunConfig, parse_run_config
from dlrm.errors import ConfigError
from embedding.links import DEFAULT, Link
from pipeline import planning
from pipeline.cli_plan import read_links
from pipeline.dataset import Dataset, load_dataset
from pipeline.synthetic import SyntheticTable, generate

TABLES = (SyntheticTable(rows=3000), SyntheticTable(rows=40, exponent=0.5), SyntheticTable(rows=900, hotness=3))

FREE = replace(
    DEFAULT, **{name: Link(1e9, 0.0) for name in ("inside", "across", "inside_reduce", "across_reduce")}
)  # messages start at once


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return load_dataset(generate(tmp_path_factory.mktemp("data") / "set", rows=4000, tables=TABLES, num_dense=2))


def config_of(dataset: Dataset, **embedding: Any) -> RunConfig:
    return parse_run_config(
        {
            "data": {"path": str(dataset.path), "batch_size": 256},
            "model": {"embedding_dim": 8, "bottom_mlp": [8], "top_mlp": [4, 1]},
            "embedding": embedding,
        }
    )


def run_plan(tmp_path: Path, config: RunConfig, *words: str) -> Any:
    from dlrm.config import to_values
    from pipeline.cli import app

    path = tmp_path / "run.json"
    path.write_text(json.dumps(to_values(config)), encoding="utf-8")
    result = CliRunner().invoke(app, ["plan", str(path), *words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_calibration_counts_the_first_batches(dataset: Dataset) -> None:
    known = planning.calibrate(config_of(dataset, calibration_batches=5), dataset)
    assert known.counts is not None
    assert known.counts.samples == 5 * 256
    assert known.counts.lookups == [5 * 256, 5 * 256, 3 * 5 * 256]
    assert list(known.hotness.values()) == [1, 1, 3]
    assert known.jagged == (dataset.split("train").read(slice(0, 2)).keys.offsets is not None)
    # As many batches as there are, where more are asked for.
    whole = planning.calibrate(config_of(dataset, calibration_batches=1000), dataset)
    assert whole.counts is not None
    assert whole.counts.samples == dataset.splits["train"].rows
    keys = dataset.split("train").read(slice(None)).keys
    assert whole.counts.counts[0].sum() == keys.num_rows


def test_what_the_config_forces_is_obeyed(dataset: Dataset) -> None:
    names = [table.name for table in dataset.tables]
    config = config_of(
        dataset,
        placement="row_wise",
        deduplicate=True,
        tables={names[0]: {"placement": "hybrid", "threshold": 7}, names[1]: {"pooling": "mean"}},
    )
    plan = planning.plan_tables(config, dataset.tables, ranks=4, calibration=planning.calibrate(config, dataset))
    assert [placement.kind for placement in plan.placements] == ["hybrid", "row_wise", "row_wise"]
    assert plan.placements[0].threshold == 7
    assert all(placement.deduplicate for placement in plan.placements)
    assert [spec.pooling for spec in plan.specs] == ["sum", "mean", "sum"]


def test_a_tables_de_duplication_can_be_forced(dataset: Dataset) -> None:
    first, second, third = (table.name for table in dataset.tables)
    tables = {
        first: {"placement": "row_wise", "deduplicate": True},
        second: {"placement": "row_wise", "deduplicate": False},
        third: {"deduplicate": True},
    }
    known = planning.calibrate(config_of(dataset), dataset)
    for other in (True, False):
        config = config_of(dataset, deduplicate=other, tables=tables)
        plan = planning.plan_tables(config, dataset.tables, ranks=4, calibration=known)
        assert [placement.deduplicate for placement in plan.placements[:2]] == [True, False]
        left = plan.placements[2]
        assert left.deduplicate or left.kind in ("column_wise", "replicated")
        with pytest.raises(ConfigError, match=r"embedding.tables.*deduplicate: .* one exchange; set embedding.dedup"):
            planning.plan_tables(config, dataset.tables, ranks=4, calibration=known, captured=True)


@pytest.mark.parametrize("captured", [False, True])
def test_a_plan_is_kept_as_long_as_the_config_allows_it(dataset: Dataset, captured: bool) -> None:
    names = [table.name for table in dataset.tables]
    hybrid = {names[0]: {"placement": "hybrid", "threshold": 7}}
    free, forced, once, by_node = (
        config_of(dataset, **rules)
        for rules in (
            {},
            {"placement": "row_wise", "deduplicate": False, "tables": hybrid},
            {"placement": "row_wise", "deduplicate": True, "tables": hybrid},
            {"placement": "row_wise", "deduplicate": False, "tables": hybrid, "all_to_all": "hierarchical"},
        )
    )
    moved = config_of(
        dataset, placement="row_wise", deduplicate=False, tables={names[0]: {**hybrid[names[0]], "threshold": 8}}
    )
    for config in (free, forced, once, by_node, moved):
        known = planning.calibrate(config, dataset)
        shape = {"ranks": 4, "nodes": 2, "calibration": known, "captured": captured}
        for plan in planning.plan_several(config, dataset.tables, **shape):
            listed = replace(plan, placements=tuple(replace(p, listed=p.kind == "hybrid") for p in plan.placements))
            for own in (plan, listed):
                assert planning.obeys(own, config, dataset.tables, captured=captured)
    [flat] = planning.plan_several(
        config_of(dataset, placement="row_wise", deduplicate=False, tables=hybrid, all_to_all="flat"),
        dataset.tables,
        **shape,
    )
    kept = [
        planning.obeys(flat, config, dataset.tables, captured=captured) for config in (forced, once, by_node, moved)
    ]
    assert kept == [True, False, False, False]


@pytest.mark.parametrize("captured", [False, True])
def test_a_plan_is_kept_as_long_as_the_memory_limit_allows_it(dataset: Dataset, captured: bool) -> None:
    """3940 rows of 4 KiB: half of them replicated take about 10 MiB a rank of four, all spread out about 4."""

    def wide(**embedding: Any) -> RunConfig:
        config = config_of(dataset, **embedding)
        return replace(config, model=replace(config.model, embedding_dim=1024, bottom_mlp=(1024,)))

    names = [table.name for table in dataset.tables]
    forced = {"placement": "row_wise", "tables": {names[0]: {"placement": "hybrid", "threshold": 2000}}}
    shape = {"ranks": 4, "nodes": 2, "captured": captured}
    plan = planning.plan_tables(wide(**forced), dataset.tables, **shape)
    listed = replace(plan, placements=tuple(replace(p, listed=p.kind == "hybrid") for p in plan.placements))
    needs = -(-int(plan.memory().max()) // 2**20)
    assert listed.memory().max() > needs * 2**20
    for made in (plan, listed):
        kept = [
            planning.obeys(made, wide(**forced, memory_limit_mib=limit), dataset.tables, captured=captured)
            for limit in (needs - 1, needs, needs + 1)
        ]
        assert kept == [False, True, True]
    lower = wide(memory_limit_mib=needs - 1)
    again = planning.plan_tables(lower, dataset.tables, **shape)
    assert planning.obeys(again, lower, dataset.tables, captured=captured)


def test_a_plan_for_gpus_counts_what_they_send(dataset: Dataset) -> None:
    """No keys, every occurrence of a row, gradients of touched or all replicated rows; no table cut by columns."""
    config = config_of(dataset)
    known = planning.calibrate(config, dataset)
    plans = planning.plan_several(config, dataset.tables, ranks=4, calibration=known, captured=True)
    assert not any(placement.deduplicate for plan in plans for placement in plan.placements)
    assert not any(placement.kind == "column_wise" for plan in plans for placement in plan.placements)
    first = dataset.tables[0]
    for threshold in (first.rows - 1, 2):
        forced = config_of(
            dataset, placement="row_wise", tables={first.name: {"placement": "hybrid", "threshold": threshold}}
        )
        on_gpus, on_cpus = (
            planning.plan_tables(forced, dataset.tables, ranks=4, calibration=known, captured=captured, links=FREE)
            for captured in (True, False)
        )
        seconds = dict(on_gpus.seconds)
        assert seconds["keys"] == 0 < dict(on_cpus.seconds)["keys"]
        touched = on_gpus.predictions[0].touched_rows
        assert (touched < threshold / 2) == (threshold > 2)
        # 2 (W - 1) / W of 4 bytes a number.
        rows = touched if threshold > 2 else threshold
        assert seconds["all_reduce"] == pytest.approx(1.5 * 4 * rows * 8 / FREE.inside_reduce.bytes_per_s)


@pytest.mark.parametrize(("nodes", "all_to_all"), [(1, "flat"), (2, "flat"), (2, "hierarchical")])
def test_a_plan_for_gpus_starts_what_they_start(dataset: Dataset, nodes: int, all_to_all: str) -> None:
    """Rows of all tables in one exchange each way, one all-reduce of gradients, and by node one more of a flag."""
    second = Link(1e30, 1.0)
    slow = replace(DEFAULT, inside=second, across=second, inside_reduce=second, across_reduce=second)
    names = [table.name for table in dataset.tables]
    config = config_of(
        dataset, placement="row_wise", all_to_all=all_to_all,
        tables={names[0]: {"placement": "hybrid", "threshold": 7}, names[1]: {"placement": "table_wise"}},
    )  # fmt: skip
    plan = planning.plan_tables(config, dataset.tables, ranks=4, nodes=nodes, captured=True, links=slow)
    assert plan.all_to_all == all_to_all
    seconds = dict(plan.seconds)
    messages = 2 if all_to_all == "hierarchical" else 3  # to a mate, and to the other node's lane; to 3 ranks
    rounds = 4  # of an all-reduce: 2 ceil(log2 4), or 2 on each level
    assert seconds["keys"] == 0
    assert seconds["vectors"] == pytest.approx(messages)
    assert seconds["gradients"] == pytest.approx(messages)
    assert seconds["all_reduce"] == pytest.approx(rounds * (2 if all_to_all == "hierarchical" else 1))


def test_a_table_without_pooling_counts_once_for_each_key(dataset: Dataset) -> None:
    names = [table.name for table in dataset.tables]
    apart = config_of(dataset, tables={names[2]: {"pooling": "concat"}})
    known = planning.calibrate(apart, dataset)
    plan = planning.plan_tables(apart, dataset.tables, ranks=4, calibration=known)
    assert [spec.num_vectors for spec in plan.specs] == [1, 1, 3]
    whole, pooled = (
        planning.simulate(
            config,
            dataset.tables,
            num_dense=2,
            calibration=known,
            links=DEFAULT,
            ranks_per_node=8,
            flops=1e12,
            ranks=[8],
        )[0]["dense_ms"]
        for config in (apart, config_of(dataset))
    )
    # (8 + 15) -> 4 and (8 + 6) -> 4 inputs of the top MLP.
    weights = {pairs: 3 * 8 + (8 + pairs + 1) * 4 + 5 for pairs in (15, 6)}
    assert whole / pooled == pytest.approx(weights[15] / weights[6])


def test_a_table_that_is_not_there_is_refused(dataset: Dataset) -> None:
    config = config_of(dataset, tables={"nowhere": {"placement": "row_wise"}})
    with pytest.raises(ConfigError, match=r"embedding.tables.nowhere: the data has no such table"):
        planning.forced_placements(config, dataset.tables)


@pytest.mark.parametrize(
    ("embedding", "sentence"),
    [
        ({"tables": {"C1": {"threshold": 3}}}, "threshold: 3, but placement is not set"),
        ({"tables": {"C1": {"threshold": 3, "placement": "row_wise"}}}, "threshold: 3, but placement is row_wise"),
        (
            {"tables": {"C1": {"placement": "column_wise", "deduplicate": True}}},
            "deduplicate: true, but placement is column_wise",
        ),
        ({"placement": "diagonal"}, "embedding.placement"),
        ({"exchange_precision": "fp8"}, "embedding.exchange_precision"),
        ({"memory_limit_mib": 0}, "embedding.memory_limit_mib"),
        ({"calibration_batches": 0}, "embedding.calibration_batches"),
        (
            {"placement": "column_wise", "optimizer": {"kind": "rowwise_adagrad"}},
            "embedding.placement: column_wise does not go with 'rowwise_adagrad'",
        ),
        (
            {"tables": {"C1": {"placement": "column_wise"}}, "optimizer": {"kind": "rowwise_adagrad"}},
            "embedding.tables.C1.placement: column_wise does not go with",
        ),
    ],
)
def test_configs_that_cannot_be_are_refused(dataset: Dataset, embedding: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        config_of(dataset, **embedding)


def test_the_memory_limit_is_the_configs_or_what_is_free(dataset: Dataset) -> None:
    assert planning.memory_limit_bytes(config_of(dataset, memory_limit_mib=12), 4) == 12 * 2**20
    free = planning.memory_limit_bytes(config_of(dataset), 1)
    assert free > 2**20
    assert planning.memory_limit_bytes(config_of(dataset), 4) < free
    with pytest.raises(ConfigError, match="memory_limit_mib"):
        planning.plan_tables(
            config_of(dataset, memory_limit_mib=1, placement="replicated"), dataset.tables, ranks=2, memory_limit=1000
        )


def test_the_command_prints_a_table_and_json(dataset: Dataset, tmp_path: Path) -> None:
    config = config_of(dataset, calibration_batches=2)
    printed = run_plan(tmp_path, config, "--ranks", "4", "--nodes", "2")
    assert printed.exit_code == 0
    assert "placement" in printed.output
    result = json.loads(run_plan(tmp_path, config, "--ranks", "4", "--nodes", "2", "--json").output)
    assert [row["table"] for row in result["tables"]] == [table.name for table in dataset.tables]
    assert result["step_ms"] == pytest.approx(sum(result["step_parts_ms"].values()))
    assert result["step_ms"] <= 1.001 * min(result["alternatives_ms"].values())
    assert set(result["tables"][0]) >= {"frequent_rows", "frequent_share", "mib_per_rank", "across_bytes"}


def test_the_simulation_goes_up_to_1024_ranks_without_data(dataset: Dataset, tmp_path: Path) -> None:
    config = config_of(dataset)
    words = ["--simulate", "--rows", "100000,2000,3", "--set", "data.batch_size=65536", "--json"]
    rows = json.loads(run_plan(tmp_path, config, *words).output)
    assert [row["ranks"] for row in rows] == [8, 16, 32, 64, 128, 256, 512, 1024]
    for row in rows:
        parts = [row[f"{name}_ms"] for name in ("keys", "vectors", "gradients", "all_reduce", "work")]
        assert row["step_ms"] == pytest.approx(sum(parts) + row["dense_ms"] + row["dense_all_reduce_ms"])
        assert row["samples_per_s"] == pytest.approx(65536e3 / row["step_ms"])
        assert row["nodes"] == row["ranks"] // 8
    assert rows[0]["across_mb_per_rank"] == 0
    shown = run_plan(tmp_path, config, *words[:-1]).output.splitlines()
    assert max(map(len, shown)) <= 80
    assert [line.split()[0] for line in shown if line.split()[:1] and line.split()[0].replace(",", "").isdigit()] == [
        f"{row['ranks']:,}" for row in rows
    ]
    # 13 -> 8 and (8 + 6) -> 4 -> 1: forward and backward of 65,536 / 8 rows at 1e14 operations a second.
    weights = 14 * 8 + 15 * 4 + 5
    assert rows[0]["dense_ms"] == pytest.approx(1e3 * 6 * weights * 8192 / 1e14)


def test_links_come_by_name_or_from_a_file(tmp_path: Path) -> None:
    assert read_links("h100").source == "published"
    path = tmp_path / "links.json"
    path.write_text(json.dumps(read_links("a100").to_values()), encoding="utf-8")
    assert read_links(str(path)) == read_links("a100")
    path.write_text("[1]", encoding="utf-8")
    with pytest.raises(ConfigError, match="holds list"):
        read_links(str(path))
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match="not JSON"):
        read_links(str(path))
    with pytest.raises(ConfigError, match="name a JSON file or one of h100"):
        read_links(str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--rows", "3,x"], "integers separated by commas"),
        (["--rows", "3,0"], "every table has at least 1"),
        (["--exponent", "-1"], "must lie in 0 .. 10"),
        (["--flops", "0"], "finite number above 0"),
        (["--ranks", "2", "--nodes", "3"], "nodes <= ranks"),
        (["--simulate", "--set", "data.batch_size=4"], "fewer than 8 ranks"),
    ],
)
def test_bad_options_are_one_sentence(dataset: Dataset, tmp_path: Path, words: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        run_plan(tmp_path, config_of(dataset), *words)


def test_dense_weights_are_those_of_the_model(dataset: Dataset) -> None:
    from dlrm.device import HostDevice
    from dlrm.model import DenseModel

    config = config_of(dataset)
    for num_dense in (2, 0):
        model = DenseModel(
            model=config.model, num_dense=num_dense, num_tables=3, dtype=np.float32, device=HostDevice(1), seed=1
        )
        assert planning.dense_weights(config, num_dense, 3) == model.flat_parameters.size
