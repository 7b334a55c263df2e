"""Rates of links: probes, files, limits."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pytest
from rank_threads import run_ranks

from dlrm.errors import ConfigError
from embedding.comm import DoneEvent, SingleComm
from embedding.links import DEFAULT, PUBLISHED, Link, LinkRates, probe, rates_from_values
from embedding.topology import Topology, discover


def test_every_rank_gets_the_same_rates() -> None:
    rates = run_ranks(4, lambda comm: probe(comm, discover(comm, nodes=2)))
    assert all(rate == rates[0] for rate in rates)
    assert rates[0].source == "measured"
    assert rates[0].inside.bytes_per_s > 0
    assert rates[0].across.latency_s > 0


def test_a_single_node_takes_its_own_rates_for_the_missing_link() -> None:
    rates = run_ranks(2, lambda comm: probe(comm, discover(comm, nodes=1)))[0]
    assert rates.across == rates.inside
    assert rates.across_reduce == rates.inside_reduce


def test_one_rank_a_node_takes_the_rates_between_nodes() -> None:
    rates = run_ranks(2, lambda comm: probe(comm, discover(comm, nodes=2)))[0]
    assert rates.inside == rates.across


def test_one_rank_measures_its_own_work_alone() -> None:
    comm = SingleComm()
    rates = probe(comm, discover(comm))
    assert rates.inside == DEFAULT.inside
    assert rates.work.rows_bytes_per_s > 1e6
    assert 0 < rates.work.deduplicate_s < 1e-4


class SlowComm(SingleComm):
    """Two of two ranks, as seen from one: calls take the time that a known link would need."""

    size = 2

    def __init__(self, bytes_per_s: float, latency_s: float) -> None:
        self.bytes_per_s, self.latency_s = bytes_per_s, latency_s

    def _take(self, sent: float) -> DoneEvent:
        end = time.perf_counter() + self.latency_s + sent / self.bytes_per_s
        while time.perf_counter() < end:
            pass
        return DoneEvent()

    def all_to_all(self, send: Any, recv: Any) -> DoneEvent:
        return self._take(send.nbytes / 2)

    def all_reduce(self, buffer: Any, op: str = "sum") -> DoneEvent:
        return self._take(buffer.nbytes)  # 2 (W - 1) / W = 1


def test_a_known_link_is_measured() -> None:
    slow, fast = SlowComm(50e6, 2e-3), SlowComm(1e9, 1e-4)
    world = SingleComm()
    world.size = 4  # type: ignore[misc]
    topology = Topology(0, 2, 0, 2, fast, slow, (0, 0, 1, 1), (0, 1, 0, 1))
    rates = probe(world, topology)
    # Busy loops on a shared machine run over, never short.
    for link, comm in ((rates.across, slow), (rates.across_reduce, slow), (rates.inside, fast)):
        assert 0.4 * comm.bytes_per_s < link.bytes_per_s < 1.3 * comm.bytes_per_s
        assert comm.latency_s <= link.latency_s < 3 * comm.latency_s
    assert not rates.across_shared


def test_rates_survive_a_file() -> None:
    for rates in (DEFAULT, *PUBLISHED.values()):
        assert rates_from_values(json.loads(json.dumps(rates.to_values()))) == rates


def test_reduce_rates_may_be_left_out() -> None:
    link = {"bytes_per_s": 1e9, "latency_s": 1e-6}
    rates = rates_from_values({"inside": link, "across": {**link, "bytes_per_s": 1e8}})
    assert rates.across_reduce == rates.across == Link(1e8, 1e-6)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"inside": {"bytes_per_s": 1, "latency_s": 0}},
        {"inside": {"bytes_per_s": 1}, "across": {"bytes_per_s": 1}},
        {"inside": 3, "across": 3},
        {"between": {}},
    ],
)
def test_files_that_are_no_rates_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="link rates"):
        rates_from_values(values)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_rates_that_cannot_be_are_refused(rate: float) -> None:
    with pytest.raises(ConfigError, match="must be above 0"):
        Link(rate, 0.0)
    with pytest.raises(ConfigError, match="at least 0"):
        Link(1.0, -abs(rate) if np.isfinite(rate) and rate else float("nan"))


def test_published_rates_are_those_of_the_vendor() -> None:
    rates: LinkRates = PUBLISHED["h100"]
    assert rates.inside.bytes_per_s == 450e9
    assert rates.across.bytes_per_s * 8 == 400e9
