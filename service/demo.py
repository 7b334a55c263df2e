"""``crosslane demo``: from nothing to an evaluation report, over REST, leaving nothing running.

Everything goes the way that a user goes: the service, the preparation and the training are processes of
their own, and this one speaks to the service over HTTP.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from dlrm.config import load_run_config, to_values
from dlrm.errors import LaunchError, ServiceError
from pipeline.console import RunProgress, print_fields, print_json, terminal
from pipeline.ready_configs import ready_config
from service.client import ServiceClient
from service.launchers.mpi import engine_environment
from service.settings import available_cores, default_home, inherited_environment, service_url

DATASET = "movielens"

_START_SECONDS = 60.0
_POLL_SECONDS = 0.3


def run_demo(*, home: Path | None, ranks: int, as_json: bool) -> None:
    """Fetch, prepare, serve, submit, follow, report, clean up.

    Args:
        home: folder of the service, the data and the run; ``None``: ``demo`` in the service's own folder.
        ranks: MPI ranks to train on.
        as_json: print the result as JSON instead of a table.

    Raises:
        CrosslaneError: a step failed; the service and the job have been ended.
    """
    console = terminal(errors=True)
    home = (home or default_home() / "demo").expanduser().absolute()
    home.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    with _ended_by_signals(), _service(home, ranks) as client:
        console.print(f"service: {client.url} (store and runs in {home})", soft_wrap=True)
        _prepare(home, console)
        config = to_values(load_run_config(ready_config(DATASET)))
        job = client.submit(config, dataset=DATASET, ranks=ranks, threads_per_rank=max(1, available_cores() // ranks))
        console.print(f"job: {client.url}/v1/jobs/{job['id']}", soft_wrap=True)
        console.print("A first run compiles its kernels for this machine, which takes about a minute.")
        with _cancelled_on_error(client, job["id"]), RunProgress(console) as view:
            for record in client.follow(job["id"], every=_POLL_SECONDS):
                view.feed(record)
        job = client.job(job["id"])
        if job["state"] != "succeeded":
            reason = job["error"] or job["reason"] or "no reason given"
            raise LaunchError(f"job {job['id']} {job['state']}: {reason}; its output is in {home / 'jobs' / job['id']}")
        report = json.loads(client.report(job["id"], "json"))
    _print_result(job, report, seconds=time.monotonic() - begun, as_json=as_json)


def _print_result(job: dict[str, Any], report: dict[str, Any], *, seconds: float, as_json: bool) -> None:
    page = (Path(job["run_directory"]) / "report.html").as_uri()
    result = {
        "auc": report["auc"],
        "log_loss": report["log_loss"],
        "samples_per_s": report["samples_per_s"],
        "seconds": round(seconds, 1),
    }
    if as_json:
        print_json({**result, "report": page})
        return
    print_fields("MovieLens-100K, test split", result, as_json=False)
    terminal().print(f"report: {page}", soft_wrap=True)


def _environment() -> dict[str, str]:
    return engine_environment(inherited_environment())


def _prepare(home: Path, console: Console) -> None:
    """Fetch and prepare the data set, once for a home; a process of its own, since it needs NumPy."""
    target = home / "data" / DATASET
    manifest = target / "dataset.json"
    if manifest.is_file():
        licence = json.loads(manifest.read_text(encoding="utf-8"))["licence"]
        console.print(f"data: {target} (prepared before)\n{licence}\n", soft_wrap=True)
        return
    command = [sys.executable, "-m", "service.cli", "data", "fetch", DATASET, "--out", str(target), "--json"]
    done = subprocess.run(command, env=_environment(), stdout=subprocess.DEVNULL, check=False)  # it shows the licence
    if done.returncode:
        raise LaunchError(f"data set {DATASET}: could not be fetched and prepared; the lines above say why")
    console.print(f"data: {target}", soft_wrap=True)


@contextmanager
def _service(home: Path, ranks: int) -> Iterator[ServiceClient]:
    """The control service on a free loopback port for as long as the body runs; its output goes to a file."""
    port = _free_port()
    environment = {**_environment(), "CROSSLANE_CORES": str(max(ranks, available_cores()))}
    for name in ("CROSSLANE_HOST", "CROSSLANE_PORT", "CROSSLANE_HOME"):
        environment.pop(name, None)
    log = home / "service.log"
    command = [sys.executable, "-m", "service.cli", "serve", "--stop-jobs"]
    command += ["--data-dir", str(home), "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for us, so that the job can be cancelled before the service ends
        )
    try:
        with ServiceClient(service_url("127.0.0.1", port)) as client:
            _wait_until_ready(client, process, log)
            yield client
    finally:
        _end(process)


def _wait_until_ready(client: ServiceClient, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None:
        try:
            client.wait_until_ready(seconds=0.5)
        except ServiceError:
            if time.monotonic() > deadline:
                raise
        else:
            return
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    raise ServiceError(f"the service ended at once: {lines[-1] if lines else 'no output'} (see {log})")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the service: SIGTERM, and SIGKILL where that does not help."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def _cancelled_on_error(client: ServiceClient, job_id: str) -> Iterator[None]:
    """Cancel the job, and wait for its end, when the body is left by an exception."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(ServiceError):  # the service is gone, or the job has ended
            client.cancel(job_id)
            client.wait(job_id)
        raise


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into an exit that runs every ``finally`` on its way."""

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
