"""A service without a network: requests go straight to the application, and rounds of the supervisor are called."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import httpx
import psutil
import pytest

from service.app import create_app
from service.jobs import JobState
from service.launchers.local import LocalLauncher
from service.launchers.session import Grace, session_members
from service.settings import Settings

FAKE_ENGINE = (str(Path(__file__).with_name("fake_engine.py")),)


def until(condition: Callable[[], Any], seconds: float = 120.0) -> Any:
    """Wait for something to hold; returns it."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"did not come true within {seconds} s")
        time.sleep(0.02)
    return found


@dataclass
class Bench:
    """One service, called by hand."""

    settings: Settings
    app: Any = field(init=False)
    launchers: list[LocalLauncher] = field(default_factory=list)
    """This one's and those of the services before it, whose children are still ours to wait for."""

    def __post_init__(self) -> None:
        self.open()

    def open(self) -> None:
        """Begin as a fresh service on the same folder."""
        grace = Grace(checkpoint=self.settings.stop_seconds, terminate=self.settings.kill_seconds)
        self.launcher = LocalLauncher(grace=grace, engine=self.settings.engine)
        self.launchers.append(self.launcher)
        self.app = create_app(self.settings, self.launcher)
        self.store = self.app.state.service.store
        self.supervisor = self.app.state.service.supervisor

    def close(self) -> None:
        """End as a service that leaves its jobs alone."""
        self.store.close()

    def call(self, method: str, path: str, *, host: str = "127.0.0.1:8470", **options: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as client:
                return await client.request(method, path, **options)

        return anyio.run(send)

    def body(self, name: str = "run", **changes: Any) -> dict[str, Any]:
        """A request that is accepted."""
        config = {"name": name, "data": {"path": str(self.settings.data / "tiny")}}
        return {"config": config, "ranks": 1, **changes}

    def submit(self, name: str = "run", **changes: Any) -> str:
        answer = self.call("POST", "/v1/jobs", json=self.body(name, **changes))
        assert answer.status_code == 201, answer.text
        return answer.json()["id"]

    def state(self, job_id: str) -> str:
        return self.store.get(job_id).state

    def tick_until(self, job_id: str, *states: str, seconds: float = 120.0) -> Any:
        """Call rounds of the supervisor until the job is in one of the states; returns the job."""

        def there() -> Any:
            self.supervisor.tick()
            return self.state(job_id) in states and self.store.get(job_id)

        return until(there, seconds)

    def records(self, job_id: str) -> list[dict[str, Any]]:
        return self.call("GET", f"/v1/jobs/{job_id}/progress").json()["records"]

    def processes(self, job_id: str) -> list[int]:
        """Processes that belong to a job, whoever their parent is."""
        directory = self.store.get(job_id).directory
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("CROSSLANE_JOB") == directory and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process.pid)
            except psutil.Error:
                continue
        return found


@pytest.fixture
def make_bench(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    """Makes services with settings of their own; ends their jobs afterwards."""
    made: list[Bench] = []

    def make(**changes: Any) -> Bench:
        values = {
            "home": tmp_path / "home",
            "cores": 4,
            "stop_seconds": 5.0,
            "kill_seconds": 2.0,
            "poll_seconds": 0.05,
            "engine": FAKE_ENGINE,
        }
        bench = Bench(Settings(**{**values, **changes}))
        data = bench.settings.data / "tiny"
        data.mkdir(exist_ok=True)
        (data / "dataset.json").write_text("{}")
        made.append(bench)
        return bench

    yield make
    for bench in made:
        for job in bench.store.in_state(JobState.RUNNING):
            for pid in bench.processes(job.id):
                os.kill(pid, 9)
            if job.pid is not None:
                assert until(lambda session=job.pid: not session_members(session), 5.0)
        for child in (child for launcher in bench.launchers for child in launcher._children.values()):
            child.wait(5)
        bench.close()


@pytest.fixture
def bench(make_bench: Callable[..., Bench]) -> Bench:
    """A service with four cores and no GPU."""
    return make_bench()
