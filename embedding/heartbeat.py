"""Nodes watch each other, so that a run ends everywhere when a link is cut or a host vanishes.

MPI itself waits for ever in that case, and Open MPI's mpirun no longer even obeys SIGTERM. So the first rank of every
node sends the first ranks of the others a datagram a second, and listens. Who hears nothing of a node for
``timeout_s`` says so, tells the others, and ends what runs on its own host: mpirun or its daemon, and the ranks.

The datagrams use UDP over IPv4 and a port that the system picks. Each carries a random token of the run; others are
ignored. They go to every address of the other host (``network`` narrows that down to, say, the network that carries
the data). A node that was never heard at all is not judged, since a firewall may keep datagrams out: a warning says
so. A watcher that was itself held up, as by a suspended machine, starts counting anew.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import secrets
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from dlrm.errors import CommError, ConfigError
from embedding.comm import Comm, all_gather_bytes, broadcast_bytes
from embedding.topology import Topology

# Loaded where there are several nodes to watch; training on one machine does without.
if TYPE_CHECKING:
    import psutil

INTERVAL_S = 1.0
TIMEOUT_S = 20.0
"""With the second or two that ending takes, a run is over within 30 seconds."""

LAUNCHERS = frozenset({"mpirun", "mpiexec", "prterun", "prted", "orterun", "orted", "mpiexec.hydra", "hydra_pmi_proxy"})
"""Names of the processes that start ranks and wait for them."""

_DATAGRAM = struct.Struct("!16sBII")
_BEAT, _BYE, _LOST = 1, 2, 3
_GENERATIONS = 4


class Heartbeat:
    """This rank's part in the watch; nothing at all where there is one node.

    A context manager: leaving it tells the other nodes that this one has ended as it should.
    """

    def __init__(
        self,
        comm: Comm,
        topology: Topology,
        *,
        interval_s: float = INTERVAL_S,
        timeout_s: float = TIMEOUT_S,
        network: str | None = None,
        on_lost: Callable[[str], None] | None = None,
        end: Callable[[Sequence[psutil.Process]], None] | None = None,
    ) -> None:
        """Agree on the addresses and start to watch; every rank of ``comm`` calls it.

        Args:
            comm: all ranks.
            topology: their nodes.
            interval_s: time between two beats.
            timeout_s: silence after which a node counts as lost.
            network: use addresses of this network alone, such as ``198.51.100.0/24``; ``None``: all.
            on_lost: told the sentence that is printed, before the end; on the first rank of each node.
            end: ends this node; handed the node's other ranks. ``None``: ``end_this_host``.

        Raises:
            ConfigError: ``network`` is none, or this host has no address in it.
        """
        self._thread: threading.Thread | None = None
        if topology.num_nodes == 1:
            return
        leader = topology.local_rank == 0
        self._node = topology.node
        self._interval_s, self._timeout_s = interval_s, timeout_s
        self._on_lost = on_lost
        self._end = end or end_this_host
        addresses = _addresses(network)
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM) if leader else None
        if self._socket is not None:
            self._socket.bind(("", 0))
            self._socket.setblocking(False)
        port = self._socket.getsockname()[1] if self._socket else 0
        self._host = socket.gethostname()
        about = {"host": self._host, "pid": os.getpid(), "port": port, "addresses": addresses}
        everyone = [json.loads(part) for part in all_gather_bytes(comm, json.dumps(about).encode())]
        self._token = broadcast_bytes(comm, secrets.token_bytes(16))
        missing = sorted({part["host"] for part in everyone if not part["addresses"]})
        if missing:
            if self._socket is not None:
                self._socket.close()
            where = f"in {network}" if network else "besides loopback"
            raise ConfigError(f"heartbeat: host {', '.join(missing)} has no IPv4 address {where}; name its network")
        self._names: dict[int, str] = {}
        self._addresses: dict[int, list[tuple[str, int]]] = {}
        for node in range(topology.num_nodes):
            ranks = topology.ranks_of(node)
            first = everyone[ranks[0]]
            self._names[node] = f"node {node} (host {first['host']}, {_ranks(ranks)})"
            self._addresses[node] = [
                (address, first["port"])
                for address in first["addresses"]
                # Loopback leads to another "node" only where nodes are parts of one machine.
                if first["host"] == self._host or not ipaddress.ip_address(address).is_loopback
            ]
        self._mates = [
            everyone[rank]["pid"] for rank in topology.ranks_of(self._node) if everyone[rank]["pid"] != os.getpid()
        ]
        self._others = [node for node in self._names if node != self._node]
        self._stopping = threading.Event()
        if leader:
            self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
            self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Say goodbye and end the watch; harmless to call twice."""
        if self._thread is not None:
            self._stopping.set()
            self._thread.join()
            self._thread = None

    def _watch(self) -> None:
        mates = [process for pid in self._mates if (process := _process(pid)) is not None]
        assert self._socket is not None
        with self._socket:
            lost = self._listen(self._socket)
            if lost is None:
                self._tell(self._socket, _BYE, self._node)
                return
            node, sentence = lost
            self._tell(self._socket, _LOST, node)
        # With its line end in one piece: other threads and ranks write there, too.
        print(f"error: {sentence}\n", end="", file=sys.stderr, flush=True)
        if self._on_lost is not None:
            # The end must come, whatever else fails.
            with contextlib.suppress(Exception):
                self._on_lost(sentence)
        self._end(mates)

    def _listen(self, link: socket.socket) -> tuple[int, str] | None:
        """Beat and listen until ``stop`` (``None``), or until a node is lost: its number and what to say."""
        start = woken = time.monotonic()
        heard: dict[int, float] = {}
        watched = set(self._others)
        beat_at = 0.0
        warned = False
        while not self._stopping.is_set():
            now = time.monotonic()
            if now >= beat_at:
                self._send(link, _BEAT, self._node, self._others)
                beat_at = now + self._interval_s
            select.select([link], [], [], min(self._interval_s / 4, 0.25))
            reported = self._receive(link, heard, watched)
            now = time.monotonic()
            held_up = now - woken - self._interval_s
            woken = now
            if held_up > self._interval_s:
                heard = {node: min(now, last + held_up) for node, last in heard.items()}
            if reported is not None:
                teller, node = reported
                return node, f"{self._names[node]} is lost, says {self._names[teller]}; {self._last_words()}"
            for node in watched & heard.keys():
                if now - heard[node] > self._timeout_s:
                    return node, (
                        f"{self._names[node]}: no sign of life for {now - heard[node]:.0f} s "
                        f"(limit {self._timeout_s:g} s): the host is gone or the link is cut; {self._last_words()}"
                    )
            if not warned and now - start > self._timeout_s:
                warned = True
                for node in sorted(watched - heard.keys()):
                    print(
                        f"warning: {self._names[node]}: no heartbeat from it has reached {self._names[self._node]} by "
                        f"UDP; if it vanishes, that will not be noticed here\n",
                        end="",
                        file=sys.stderr,
                        flush=True,
                    )
        return None

    def _receive(self, link: socket.socket, heard: dict[int, float], watched: set[int]) -> tuple[int, int] | None:
        """Take in what has come; (who tells, who is lost) where a node is reported lost."""
        while True:
            try:
                data = link.recv(64)
            except BlockingIOError:
                return None
            except OSError:
                continue  # an earlier datagram found no one: the silence counts, not this
            if len(data) != _DATAGRAM.size:
                continue
            token, kind, node, about = _DATAGRAM.unpack(data)
            if not secrets.compare_digest(token, self._token) or node not in self._others:
                continue
            heard[node] = time.monotonic()
            if kind == _BYE:
                watched.discard(node)
            elif kind == _LOST and about in self._names:
                return node, about

    def _tell(self, link: socket.socket, kind: int, about: int) -> None:
        """Send what is said only once several times: datagrams get lost."""
        for _ in range(3):
            self._send(link, kind, about, self._others)
            time.sleep(0.02)

    def _send(self, link: socket.socket, kind: int, about: int, nodes: Sequence[int]) -> None:
        data = _DATAGRAM.pack(self._token, kind, self._node, about)
        for node in nodes:
            for address in self._addresses[node]:
                with contextlib.suppress(OSError):
                    link.sendto(data, address)

    def _last_words(self) -> str:
        return (
            f"{self._names[self._node]} ends its part of the run; "
            "resume from the last checkpoint on hosts that reach each other"
        )


def end_this_host(mates: Sequence[psutil.Process]) -> None:
    """End the launcher above this rank with all it started, and this process (exit code of a ``CommError``).

    The launcher cannot end in an orderly way: it would wait for the lost host.

    Args:
        mates: the node's other ranks, which may have another launcher above them.
    """
    import psutil

    time.sleep(0.5)  # the launcher passes the last words on
    ended = list(mates)
    with contextlib.suppress(psutil.Error):
        for ancestor in psutil.Process().parents()[:_GENERATIONS]:
            if ancestor.name() in LAUNCHERS:
                # Among its children are the remote shells to the other hosts.
                ended = [ancestor, *ancestor.children(recursive=True), *mates]
                break
    for process in ended:
        if process.pid != os.getpid():
            with contextlib.suppress(psutil.Error):
                process.kill()
    os._exit(CommError.exit_code)


def _process(pid: int) -> psutil.Process | None:
    import psutil

    try:
        return psutil.Process(pid)
    except psutil.Error:
        return None  # a process-id namespace of its own


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks))}"


def _addresses(network: str | None) -> list[str]:
    """This host's IPv4 addresses, at most eight, loopback last.

    Raises:
        ConfigError: ``network`` is no network.
    """
    try:
        inside = ipaddress.ip_network(network) if network else None
    except ValueError as error:
        raise ConfigError(f"heartbeat network {network!r}: {error}; write it like 198.51.100.0/24") from None
    import psutil

    found = [
        card.address
        for cards in psutil.net_if_addrs().values()
        for card in cards
        if card.family == socket.AF_INET and (inside is None or ipaddress.ip_address(card.address) in inside)
    ]
    return sorted(found, key=lambda address: ipaddress.ip_address(address).is_loopback)[:8]
