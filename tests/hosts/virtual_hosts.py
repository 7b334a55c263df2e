"""Hosts on one machine: network namespaces on a switch of their own, each with a host name, under one mpirun.

    python tests/hosts/virtual_hosts.py --hosts 2 --ranks 2 --rate 200mbit -- python -m mpi4py program.py

Needs root and iproute2. Every host has one network card, and nothing else of the machine's network: what hosts send
each other goes over the switch (a bridge in a namespace), at the rate that ``shape`` sets (a token bucket at each
card; the kernel may lack netem, so there is neither delay nor loss), until ``cut``. Names are new for every set of
hosts, and ``close`` removes them with whatever still runs in them. Addresses are of the range for examples
(RFC 5737), which no one's network uses.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

NETWORK = "192.0.2"
CARD = "eth0"
_AGENT = """#!/bin/sh
# Stands in for ssh: [options] host command... Where the far side is killed, it goes on waiting, as ssh does when a
# host vanishes without a word.
while [ "${1#-}" != "$1" ]; do shift; done
host=$1; shift
ip netns exec "$host" unshare --uts sh -c 'hostname "$0"; exec sh -c "$1"' "$host" "$*"
code=$?
[ $code -lt 128 ] || exec sleep 120
exit $code
"""


def why_not() -> str | None:
    """Why there can be no hosts here; ``None``: they can be made. Installs iproute2 where apt can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None or shutil.which("tc") is None:
        apt = shutil.which("apt-get")
        command = [apt or "apt-get", "install", "-y", "-q", "iproute2"]
        if apt is None or subprocess.run(command, capture_output=True, timeout=300, check=False).returncode:
            return "iproute2 (ip, tc) is not installed"
    if not Path(sys.executable).with_name("mpirun").exists():
        return "there is no mpirun beside this Python"
    trial = f"xl{secrets.token_hex(3)}t"
    try:
        _ip("netns", "add", trial)
        try:
            _ip("-n", trial, "link", "add", "br0", "type", "bridge")
            subprocess.run(["unshare", "--uts", "true"], check=True, capture_output=True, timeout=30)
        finally:
            _ip("netns", "del", trial)
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", b"") or str(error)
        return f"no network namespaces here: {detail if isinstance(detail, str) else detail.decode().strip()}"
    return None


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], check=True, capture_output=True, timeout=30)
    return done.stdout.decode()


class VirtualHosts:
    """So many hosts, until the ``with`` block ends.

    Attributes:
        names: host names, which are the namespaces' too.
    """

    def __init__(self, count: int) -> None:
        """Make them.

        Args:
            count: 2 to 9.
        """
        token = secrets.token_hex(3)
        self.names = [f"xl{token}h{host}" for host in range(count)]
        self._switch = f"xl{token}sw"
        self._folder = Path(tempfile.mkdtemp(prefix="xlhosts"))
        self._started: list[subprocess.Popen[bytes]] = []
        try:
            self._make()
        except BaseException:
            self.close()
            raise

    def _make(self) -> None:
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "br0", "up")
        for host, name in enumerate(self.names):
            port = f"port{host}"
            _ip("netns", "add", name)
            _ip("link", "add", CARD, "netns", name, "type", "veth", "peer", "name", port, "netns", self._switch)
            _ip("-n", self._switch, "link", "set", port, "master", "br0", "up")
            _ip("-n", name, "addr", "add", f"{self.address(host)}/24", "dev", CARD)
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", CARD, "up")
        agent = self._folder / "agent"
        agent.write_text(_AGENT)
        agent.chmod(0o755)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def address(self, host: int) -> str:
        """Where a host is on their network."""
        return f"{NETWORK}.{host + 1}"

    def shape(self, rate: str | None) -> None:
        """Limit what every host sends to ``rate`` (in tc's words, such as ``200mbit``); ``None``: no limit."""
        for name in self.names:
            if rate is None:
                subprocess.run(
                    ["tc", "-n", name, "qdisc", "del", "dev", CARD, "root"], capture_output=True, check=False
                )
                continue
            bucket = ["tbf", "rate", rate, "burst", "256kb", "latency", "400ms"]
            command = ["tc", "-n", name, "qdisc", "replace", "dev", CARD, "root", *bucket]
            subprocess.run(command, check=True, capture_output=True, timeout=30)

    def cut(self, host: int) -> None:
        """Pull a host's cable: nothing comes in or goes out, and no one is told."""
        _ip("-n", self._switch, "link", "set", f"port{host}", "nomaster")

    def mend(self, host: int) -> None:
        """Plug the cable in again."""
        _ip("-n", self._switch, "link", "set", f"port{host}", "master", "br0")

    def pids(self, host: int) -> list[int]:
        """Processes of a host."""
        return [int(word) for word in _ip("netns", "pids", self.names[host]).split()]

    def vanish(self, host: int) -> None:
        """Pull a host's cable and kill everything on it, so that its end is not heard of elsewhere."""
        self.cut(host)
        self._kill(host)

    def _kill(self, host: int) -> None:
        for pid in self.pids(host):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def command(self, ranks: Sequence[int], program: Sequence[str], options: Sequence[str] = ()) -> list[str]:
        """The command that starts ``program`` under one mpirun, which runs on the first host.

        Args:
            ranks: ranks of each host.
            program: program and arguments.
            options: more of mpirun's options.
        """
        hosts = self._folder / f"hosts{secrets.token_hex(3)}"
        hosts.write_text("".join(f"{n} slots={count}\n" for n, count in zip(self.names, ranks, strict=True)))
        network = f"{NETWORK}.0/24"
        mpirun = [
            str(Path(sys.executable).with_name("mpirun")),
            *("--hostfile", str(hosts), "-np", str(sum(ranks)), "--map-by", "slot", "--bind-to", "none"),
            *("--prtemca", "plm_ssh_agent", str(self._folder / "agent"), "--prtemca", "prte_if_include", network),
            *("--mca", "btl_tcp_if_include", network, "--mca", "mpi_yield_when_idle", "1", *options),
        ]
        return self.on(0, [*mpirun, *program])

    def on(self, host: int, program: Sequence[str]) -> list[str]:
        """The command that runs ``program`` on one host."""
        name = self.names[host]
        line = f"hostname {name}; exec {shlex.join(program)}"
        return ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", line]

    def start(
        self, ranks: Sequence[int], program: Sequence[str], environment: Mapping[str, str] | None = None, **pipes: int
    ) -> subprocess.Popen[bytes]:
        """Start ``program`` on the hosts; ``environment`` reaches every rank."""
        allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        process = subprocess.Popen(
            self.command(ranks, program),
            env={**os.environ, **allowed, **(environment or {})},
            start_new_session=True,
            **pipes,  # type: ignore[call-overload]
        )
        self._started.append(process)
        return process

    def run(
        self, ranks: Sequence[int], program: Sequence[str], *, timeout: float, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run ``program`` on the hosts to its end, or for ``timeout`` seconds (``subprocess.TimeoutExpired``)."""
        process = self.start(ranks, program, environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            out, error = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as late:
            self._end(process)
            out, error = process.communicate()
            raise subprocess.TimeoutExpired(program, timeout, out, error) from late
        return subprocess.CompletedProcess(program, process.returncode, out.decode(), error.decode())

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        for host in range(len(self.names)):
            self._kill(host)
        process.kill()

    def close(self) -> None:
        """Kill what still runs on the hosts, and remove them."""
        present = {line.split()[0] for line in _ip("netns", "list").splitlines() if line}
        for host, name in enumerate(self.names):
            if name in present:
                deadline = time.monotonic() + 10
                while self.pids(host) and time.monotonic() < deadline:
                    self._kill(host)
                    time.sleep(0.02)
        for process in self._started:
            process.kill()
            process.wait()
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
        for name in (*self.names, self._switch):
            if name in present:
                _ip("netns", "del", name)
        shutil.rmtree(self._folder, ignore_errors=True)


def main() -> int:
    """Run one command on hosts that live as long as it does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--hosts", type=int, default=2, choices=range(2, 10), metavar="2..9")
    parser.add_argument("--ranks", type=int, default=2, help="ranks on each host")
    parser.add_argument("--rate", help="of each host's card, such as 200mbit; left out: no limit")
    parser.add_argument("--timeout", type=float, default=600, help="seconds")
    parser.add_argument("program", nargs="+", help="after --: program and arguments")
    options = parser.parse_args()
    reason = why_not()
    if reason:
        print(f"virtual hosts: {reason}", file=sys.stderr)
        return 2
    with VirtualHosts(options.hosts) as hosts:
        hosts.shape(options.rate)
        process = hosts.start([options.ranks] * options.hosts, options.program)
        try:
            return process.wait(options.timeout)
        except subprocess.TimeoutExpired:
            print(f"virtual hosts: still running after {options.timeout:.0f} s, ended", file=sys.stderr)
            return 124


if __name__ == "__main__":
    sys.exit(main())
