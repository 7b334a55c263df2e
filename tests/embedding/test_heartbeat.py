"""Nodes that watch each other over loopback: who is missed, who is told, who is let go."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
from placed_ranks import on_nodes

from dlrm.errors import ConfigError
from embedding.heartbeat import _BEAT, _DATAGRAM, _LOST, Heartbeat

TIMEOUT_S = 1.0
"""Twenty beats: all watches are threads of this process, so that a busy machine holds up all of them or none."""


class Noted(Heartbeat):
    """Notes whom it has heard and when it last sent a beat."""

    heard_of: frozenset[int] = frozenset()
    sent_at = 0.0

    def _receive(self, link: socket.socket, heard: dict[int, float], watched: set[int]) -> tuple[int, int] | None:
        found = super()._receive(link, heard, watched)
        self.heard_of = frozenset(heard)
        return found

    def _send(self, link: socket.socket, kind: int, *rest: Any) -> None:
        if kind == _BEAT:
            self.sent_at = time.monotonic()
        super()._send(link, kind, *rest)


class Watch:
    """The watches of all ranks, and what each said and did at its end."""

    def __init__(self, node_of: list[int], timeout_s: float = TIMEOUT_S) -> None:
        self.said: dict[int, list[str]] = {rank: [] for rank in range(len(node_of))}
        self.ended: list[int] = []

        def start(comm: Any, topology: Any) -> Noted:
            rank = comm.rank
            return Noted(
                comm,
                topology,
                interval_s=0.05,
                timeout_s=timeout_s,
                network="127.0.0.0/8",
                on_lost=self.said[rank].append,
                end=lambda mates: self.ended.append(rank),
            )

        self.ranks = on_nodes(node_of, start)

    def settle(self) -> None:
        """Wait until every node has heard every other one: only then it judges them."""
        watching = [heartbeat for heartbeat in self.ranks if heartbeat._thread is not None]
        wait_until(lambda: all(heartbeat.heard_of >= set(heartbeat._others) for heartbeat in watching))

    def stop(self) -> None:
        for heartbeat in self.ranks:
            heartbeat.stop()

    def silence(self, rank: int) -> None:
        """End a rank's watch without a goodbye."""
        self.ranks[rank]._send = lambda *_: None
        self.ranks[rank].stop()


def wait_until(true: Callable[[], bool], limit_s: float = 60) -> None:
    deadline = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_nodes_that_beat_or_say_goodbye_are_not_missed() -> None:
    watch = Watch([0, 0, 1, 1])
    time.sleep(1.5 * TIMEOUT_S)
    watch.ranks[0].stop()
    watch.ranks[0].stop()  # harmless
    time.sleep(1.5 * TIMEOUT_S)
    watch.stop()
    assert watch.ended == []


def test_a_silent_node_is_named_and_everyone_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    watch = Watch([0, 0, 1, 1, 2])
    watch.settle()
    watch.silence(2)
    wait_until(lambda: bool(watch.ended))
    assert time.monotonic() - watch.ranks[2].sent_at > TIMEOUT_S
    wait_until(lambda: sorted(watch.ended) == [0, 4])
    watch.stop()
    printed = capfd.readouterr().err
    for rank, own in ((0, "node 0"), (4, "node 2")):
        (sentence,) = watch.said[rank]
        assert sentence.startswith(f"node 1 (host {socket.gethostname()}, ranks 2 to 3)")
        assert "no sign of life" in sentence or "is lost, says node" in sentence
        assert f"{own} (host" in sentence
        assert "resume from the last checkpoint" in sentence
        assert f"error: {sentence}\n" in printed
    assert not watch.said[1]
    assert not watch.said[2]


def test_a_node_that_is_cut_off_from_one_ends_the_others_too() -> None:
    """Nodes 0 and 1 no longer hear each other; node 2 hears both."""
    watch = Watch([0, 1, 2])
    watch.settle()
    watch.ranks[0]._addresses[1] = []
    watch.ranks[1]._addresses[0] = []
    wait_until(lambda: sorted(watch.ended) == [0, 1, 2])
    assert "is lost, says node" in watch.said[2][0]
    watch.stop()


def test_a_node_never_heard_is_warned_of_and_not_judged(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Heartbeat, "_receive", lambda *_: None)
    watch = Watch([0, 1], timeout_s=0.3)
    printed = ""

    def both_are_warned_of() -> bool:
        nonlocal printed
        printed += capfd.readouterr().err
        return printed.count("warning: ") == 2

    wait_until(both_are_warned_of)
    time.sleep(0.5)
    watch.stop()
    printed += capfd.readouterr().err
    for node, other in ((0, 1), (1, 0)):
        assert printed.count(f"warning: node {node} (host {socket.gethostname()}, rank {node}): no heartbeat") == 1
        assert f"reached node {other}" in printed
    assert watch.ended == []


def test_what_strangers_send_is_ignored() -> None:
    watch = Watch([0, 1])
    time.sleep(0.2)
    ((address, port),) = watch.ranks[1]._addresses[0]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        for data in (
            b"",
            b"x",
            bytes(64),
            _DATAGRAM.pack(bytes(16), _LOST, 1, 1),
            _DATAGRAM.pack(watch.ranks[0]._token, _LOST, 7, 1),  # there is no node 7
            _DATAGRAM.pack(watch.ranks[0]._token, _LOST, 1, 7),
        ):
            stranger.sendto(data, (address, port))
    time.sleep(0.3)
    assert watch.ended == []
    # The right words from a node end the run.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as teller:
        teller.sendto(_DATAGRAM.pack(watch.ranks[0]._token, _LOST, 1, 1), (address, port))
    wait_until(lambda: 0 in watch.ended)
    watch.stop()


def test_a_watcher_that_was_held_up_blames_no_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Node 0 sleeps through its own limit and sees node 1's beats only later, as after a machine's suspension."""
    watch = Watch([0, 1])
    watch.ranks[1]._timeout_s = 100.0
    watch.settle()
    receive, held = Heartbeat._receive, []

    def slow(self: Heartbeat, *arguments: Any) -> Any:
        if self._node == 0 and not held:
            held.append(True)
            time.sleep(2 * TIMEOUT_S)
            return None  # what came meanwhile is not read yet
        return receive(self, *arguments)

    monkeypatch.setattr(Heartbeat, "_receive", slow)
    wait_until(lambda: bool(held))
    time.sleep(3 * TIMEOUT_S)
    assert 0 not in watch.ended
    watch.stop()


def test_one_node_needs_no_watch() -> None:
    watch = Watch([0, 0, 0])
    assert [heartbeat._thread for heartbeat in watch.ranks] == [None] * 3
    watch.stop()


@pytest.mark.parametrize(
    ("network", "words"),
    [
        ("198.51.100.0/24", "no IPv4 address in 198.51.100.0/24"),
        ("nonsense", "'nonsense'"),
        ("127.0.0.1/8", "host bits"),
    ],
)
def test_a_network_that_no_host_is_in_is_refused(network: str, words: str) -> None:
    def start(comm: Any, topology: Any) -> None:
        with pytest.raises(ConfigError, match=words):
            Heartbeat(comm, topology, network=network)

    on_nodes([0, 1], start)
