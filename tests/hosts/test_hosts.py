"""One mpirun over several hosts, made of network namespaces: topology, exchanges, shaped and cut links."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from virtual_hosts import VirtualHosts, why_not

HERE = Path(__file__).resolve().parent
ENVIRONMENT = {"PYTHONPATH": str(HERE.parents[1]), "CROSSLANE_THREADS": "1"}
LIMIT_S = 30
"""Within which a run must have ended everywhere."""

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module", autouse=True)
def possible() -> None:
    reason = why_not()
    if reason:
        pytest.skip(f"virtual hosts: {reason}")


@pytest.fixture
def two_hosts(possible: None) -> Iterator[VirtualHosts]:
    with VirtualHosts(2) as hosts:
        yield hosts


def namespaces() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout


def run(hosts: VirtualHosts, ranks: list[int], seed: int, rows: int) -> dict[str, list[float]]:
    program = [sys.executable, "-m", "mpi4py", str(HERE / "host_ranks.py"), str(seed), str(rows)]
    done = hosts.run(ranks, program, timeout=300, **ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize(
    ("ranks", "flat", "hierarchical"),
    [([2, 2], 8, 4), ([3, 1], 6, 2), pytest.param([2, 2, 2, 2], 48, 24, marks=pytest.mark.slow)],
)
def test_hosts_are_nodes_and_both_exchanges_agree(ranks: list[int], flat: int, hierarchical: int, seed: int) -> None:
    with VirtualHosts(len(ranks)) as hosts:
        result = run(hosts, ranks, seed, rows=4)
        names = hosts.names
    expected = [node for node, count in enumerate(ranks) for _ in range(count)]
    assert result["node_of"] == expected
    assert result["hosts"] == [names[node] for node in expected]
    pairs = sum(a != b for a in expected for b in expected)
    assert result["Flat"][:2] == [flat, pairs * 4 * 1024]
    assert result["Hierarchical"][:2] == [hierarchical, pairs * 4 * 1024]
    left = namespaces()
    assert not any(name in left for name in names)


def test_a_shaped_link_is_slow(two_hosts: VirtualHosts, seed: int) -> None:
    two_hosts.shape("100mbit")
    result = run(two_hosts, [2, 2], seed, rows=512)
    # Each host sends 4 pairs of ranks 512 KiB, less what the bucket holds: never faster than the link.
    least = (4 * 512 * 1024 - 256 * 1024) * 8 / 100e6
    assert result["Flat"][2] > least
    assert result["Hierarchical"][2] > least


@pytest.mark.slow
def test_a_cut_link_ends_the_run_everywhere(two_hosts: VirtualHosts, tmp_path: Path) -> None:
    """A host that vanishes altogether: ``test_resume_elsewhere.py``."""
    steps = tmp_path / "steps"
    program = [sys.executable, "-m", "mpi4py", str(HERE / "watched_ranks.py"), str(steps)]
    output = tmp_path / "output"
    with output.open("wb") as file:
        process = two_hosts.start([2, 2], program, ENVIRONMENT, stdout=file.fileno(), stderr=file.fileno())
    deadline = time.monotonic() + 240
    while not steps.exists():
        assert time.monotonic() < deadline, output.read_text()
        assert process.poll() is None, output.read_text()
        time.sleep(0.1)
    time.sleep(2)
    two_hosts.cut(1)
    began = time.monotonic()
    while process.poll() is None or two_hosts.pids(0) or two_hosts.pids(1):
        assert time.monotonic() - began < LIMIT_S, [two_hosts.pids(0), two_hosts.pids(1)]
        time.sleep(0.1)
    assert process.returncode != 0
    first, second = two_hosts.names
    printed = output.read_text()
    assert f"error: node 1 (host {second}, ranks 2 to 3): no sign of life for" in printed
    assert f"node 0 (host {first}, ranks 0 to 1) ends its part" in printed
    assert (tmp_path / "lost.0").read_text() in printed
    # The other side lives on, and ends by itself.
    assert f"node 0 (host {first}, ranks 0 to 1): no sign of life" in (tmp_path / "lost.1").read_text()
