"""Rates of links: probes, files, limits."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from rank_threads import run_ranks

from dlrm.errors import ConfigError
from embedding.comm import DoneEvent, SingleComm
from embedding.links import DEFAULT, PUBLISHED, Link, LinkRates, probe, rates_from_values
from embedding.topology import Topology, discover


@pytest.mark.parametrize(("ranks", "nodes"), [(4, 2), (3, 2)])
def test_every_rank_gets_the_same_rates(ranks: int, nodes: int) -> None:
    rates = run_ranks(ranks, lambda comm: probe(comm, discover(comm, nodes=nodes)))
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


class Clock:
    """A clock that stands still but for what is spent on it: how busy the machine is changes nothing."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class SlowComm(SingleComm):
    """Rank 0 of two nodes of two ranks: calls take the time that known links would need."""

    size = 4

    def __init__(
        self, clock: Clock, inside: tuple[float, float], across: tuple[float, float], *, group: str = "all"
    ) -> None:
        self.clock = clock
        self.links = {"inside": inside, "across": across}
        self.size = 4 if group == "all" else 2
        self.group = group

    def _take(self, **sent: float) -> DoneEvent:
        needed = [latency + sent[name] / rate for name, (rate, latency) in self.links.items() if name in sent]
        self.clock.now += max(needed, default=0.0)
        return DoneEvent()

    def all_to_all_v(self, send: Any, send_counts: Any, recv: Any, recv_counts: Any) -> DoneEvent:
        assert list(send_counts) == list(recv_counts)
        sent = {"inside": 4 * send_counts[1], "across": 4 * sum(send_counts[2:])}
        return self._take(**{name: size for name, size in sent.items() if size})

    def all_to_all(self, send: Any, recv: Any) -> DoneEvent:
        return self._take(**{self.group: send.nbytes / 2})

    def all_gather(self, send: Any, recv: Any) -> DoneEvent:
        return self._take(**{self.group: float(send.nbytes)})


def test_known_links_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, across = (1e9, 1e-4), (50e6, 2e-3)
    clock = Clock()
    monkeypatch.setattr("embedding.links.time", clock)
    near, far = (SlowComm(clock, inside, across, group=name) for name in ("inside", "across"))
    topology = Topology(0, 2, 0, 2, near, far, (0, 0, 1, 1), (0, 1, 0, 1))
    rates = probe(SlowComm(clock, inside, across), topology)
    # The small run's bytes count as latency, and are left out of the large one's.
    for link, (rate, latency), messages in (
        (rates.across, across, 2),
        (rates.inside, inside, 1),
        (rates.across_reduce, across, 1),
        (rates.inside_reduce, inside, 1),
    ):
        assert link.bytes_per_s == pytest.approx(rate, rel=0.05), (link, rate)
        assert latency <= messages * link.latency_s < 1.2 * latency, (link, latency)
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
