"""Link rates are measured once for a run: its folder keeps them for ranks and nodes of the same number."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dlrm.config import RunConfig, parse_run_config
from embedding.links import DEFAULT, LinkRates
from embedding.topology import discover
from pipeline import plan_agreement

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ranks"))
from rank_threads import run_ranks


def config_of(directory: Path, **more: Any) -> RunConfig:
    return parse_run_config(
        {
            "data": {"path": "not read"},
            "model": {"embedding_dim": 8, "bottom_mlp": [8], "top_mlp": [1]},
            "run": {"directory": str(directory)},
            **more,
        }
    )


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the communicators that ``probe`` was called with, which finds rates by ranks and nodes."""
    called: list[int] = []

    def probe(comm: Any, topology: Any, device: Any = None) -> LinkRates:
        called.append(comm.size)
        rate = replace(DEFAULT.inside, bytes_per_s=1e6 * comm.size + topology.num_nodes)
        return replace(DEFAULT, inside=rate, source="measured")

    monkeypatch.setattr(plan_agreement, "probe", probe)
    return called


def rates(config: RunConfig, ranks: int, nodes: int = 1, carrier: str | None = None) -> LinkRates:
    def work(comm: Any) -> LinkRates:
        topology = discover(comm, nodes)
        return plan_agreement.link_rates(
            config, comm, topology, lambda: plan_agreement.probe(comm, topology), DEFAULT, carrier
        )

    found = run_ranks(ranks, work)
    assert all(own == found[0] for own in found)
    first: LinkRates = found[0]
    return first


def test_a_run_measures_once_for_one_shape(tmp_path: Path, probes: list[int]) -> None:
    config = config_of(tmp_path / "run")
    first = rates(config, 2)
    assert first.source == "measured"
    assert probes == [2, 2]
    assert rates(config, 2) == first
    assert probes == [2, 2]
    other = rates(config, 3)
    assert probes == [2, 2, 3, 3, 3]
    assert rates(config, 3, nodes=3) != other
    assert len(probes) == 8


def test_rates_between_gpus_are_not_those_between_cpus(tmp_path: Path, probes: list[int]) -> None:
    config = config_of(tmp_path / "run")
    for carrier in (None, "nccl", "nccl", "staged", None):
        rates(config, 2, carrier=carrier)
    assert len(probes) == 2 * 4


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"ranks": 2, "nodes": 1}'])
def test_a_torn_file_is_measured_again(text: str, tmp_path: Path, probes: list[int]) -> None:
    (tmp_path / "links.json").write_text(text, encoding="utf-8")
    measured = rates(config_of(tmp_path), 2)
    assert len(probes) == 2
    kept = json.loads((tmp_path / "links.json").read_text(encoding="utf-8"))
    assert kept["inside"]["bytes_per_s"] == measured.inside.bytes_per_s


def test_deterministic_runs_measure_nothing(tmp_path: Path, probes: list[int]) -> None:
    assert rates(config_of(tmp_path, deterministic=True), 2) == DEFAULT
    assert probes == []
    assert list(tmp_path.iterdir()) == []
