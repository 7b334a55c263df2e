"""Ranks with different configs are told apart before anything else happens."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from dlrm.config import parse_run_config
from dlrm.errors import ConfigError
from pipeline.config_agreement import agree_config

on_ranks = runpy.run_path(str(Path(__file__).with_name("thread_ranks.py")))["run_ranks"]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_equal_configs_pass(size: int) -> None:
    config = parse_run_config({"data": {"path": "d"}})
    assert on_ranks(size, lambda comm: agree_config(config, comm)) == [None] * size


@pytest.mark.parametrize(
    ("field", "values", "message"),
    [
        (
            "optimizer.lr",
            [0.1, 0.2, 0.1, 0.3],
            "optimizer.lr: the ranks disagree: 0.1 on rank 0, 2; 0.2 on rank 1; 0.3 ",
        ),
        (
            "embedding.tables",
            [{}, {"a": {"pooling": "mean"}}, {}, {}],
            "embedding.tables.a.pooling: .* on rank 0, 2, 3",
        ),
        ("train.target", [None, {"value": 0.8}, None, None], "train.target.*on rank 0, 2, 3"),
    ],
)
def test_every_rank_is_named_with_what_it_has(field: str, values: list, message: str) -> None:
    def work(comm) -> None:
        section, name = field.split(".")
        rest = {"eval_every": 5} if section == "train" else {}
        agree_config(parse_run_config({"data": {"path": "d"}, section: {name: values[comm.rank], **rest}}), comm)

    results = on_ranks(4, work)
    assert all(isinstance(result, ConfigError) for result in results), results
    assert len({str(result) for result in results}) == 1
    with pytest.raises(ConfigError, match=message):
        raise results[0]
