"""The service as a process of its own, on a real port: client, verbs, restart after kill -9, occupied ports."""

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from dlrm.errors import ServiceError
from service import cli
from service.client import ServiceClient
from service.store import JobStore

FAKE_ENGINE = str(Path(__file__).with_name("fake_engine.py"))
SERVE = """
import sys
from pathlib import Path
from service.app import serve
from service.settings import Settings
home, port, stop_jobs = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "stop"
settings = Settings(home=home, port=port, cores=2, engine=(sys.argv[4],), poll_seconds=0.05, stop_seconds=5.0,
                    kill_seconds=1.0, stop_jobs=stop_jobs)
serve(settings, ready=lambda url: print(url, flush=True))
"""


class Server:
    """A service on a free port, which a restart keeps."""

    def __init__(self, home, stop_jobs=False):
        self.home = home
        self.stop_jobs = stop_jobs
        self.port = 0
        self.start()

    def start(self):
        command = [sys.executable, "-c", SERVE, str(self.home), str(self.port), "stop" if self.stop_jobs else "leave"]
        self.process = subprocess.Popen([*command, FAKE_ENGINE], stdout=subprocess.PIPE, text=True)
        self.url = self.process.stdout.readline().strip()
        self.port = int(self.url.rpartition(":")[2])
        self.client = ServiceClient(self.url)
        self.client.wait_until_ready()

    def end(self, number=signal.SIGTERM):
        self.client.close()
        self.process.send_signal(number)
        code = self.process.wait(20)
        self.process.stdout.close()
        return code


@pytest.fixture
def home(tmp_path):
    (tmp_path / "home" / "data" / "tiny").mkdir(parents=True)
    (tmp_path / "home" / "data" / "tiny" / "dataset.json").write_text("{}")
    return tmp_path / "home"


@pytest.fixture
def serve(home):
    """Starts services; ends them and what their jobs left."""
    started = []

    def start(**options):
        started.append(Server(home, **options))
        return started[-1]

    yield start
    for server in started:
        if server.process.poll() is None:
            server.end(signal.SIGKILL)
    for process in psutil.process_iter():
        try:
            if process.environ().get("CROSSLANE_JOB", "").startswith(str(home)):
                process.kill()
        except psutil.Error:
            continue


@pytest.fixture
def crosslane(capsys, monkeypatch):
    """Runs one command; returns its exit code and what it printed."""

    def run(*words):
        code = cli.run([str(word) for word in words])
        return code, *capsys.readouterr()

    for name in [name for name in os.environ if name.startswith("CROSSLANE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")
    return run


def config_file(folder, name="run", **sections):
    path = folder / "config.yaml"
    path.write_text(json.dumps({"name": name, "data": {"path": "tiny"}, **sections}))
    return path


def has_steps(client, job_id):
    deadline = time.monotonic() + 120
    while client.job(job_id)["progress"].get("step", 0) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_job_outlives_a_killed_service_and_its_exit_code_is_found(serve, tmp_path):
    server = serve()
    go = tmp_path / "go"
    config = {"data": {"path": "tiny"}}
    running = server.client.submit(config, name=f"free:{go}")["id"]
    failing = server.client.submit(config, name=f"fail free:{go}")["id"]
    waiting = server.client.submit(config, threads_per_rank=2)["id"]
    has_steps(server.client, running)
    assert server.client.wait(failing, every=0.05)["exit_code"] == 3
    assert server.end(signal.SIGKILL) == -signal.SIGKILL
    server.start()
    assert [server.client.job(job)["state"] for job in (running, waiting)] == ["running", "queued"]
    assert server.end(signal.SIGKILL) == -signal.SIGKILL
    go.touch()  # the job ends while no service is there
    ended = server.home / "jobs" / running / "exit.json"
    deadline = time.monotonic() + 120
    while not ended.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    server.start()
    job = server.client.wait(running, every=0.05)
    assert (job["state"], job["exit_code"]) == ("succeeded", 0)
    assert server.client.wait(waiting, every=0.05)["state"] == "succeeded"


def test_a_service_that_ends_in_order_leaves_its_jobs_running(serve, tmp_path):
    server = serve()
    job_id = server.client.submit({"data": {"path": "tiny"}}, name="hold")["id"]
    has_steps(server.client, job_id)
    assert server.end(signal.SIGTERM) == 0
    assert not (server.home / "service.json").exists()
    server.start()
    assert server.client.job(job_id)["state"] == "running"
    server.client.cancel(job_id)
    assert server.client.wait(job_id, every=0.05)["exit_code"] == 75


def test_a_service_can_take_its_jobs_along(serve):
    server = serve(stop_jobs=True)
    job_id = server.client.submit({"data": {"path": "tiny"}}, name="hold")["id"]
    has_steps(server.client, job_id)
    assert server.end(signal.SIGINT) == 0
    assert json.loads((server.home / "jobs" / job_id / "exit.json").read_text())["exit_code"] == 75
    server.start()
    assert server.client.job(job_id)["state"] == "cancelled"


def test_the_verbs_submit_follow_list_and_cancel(serve, crosslane, tmp_path):
    server = serve()
    at = ("--url", server.url)
    code, out, _ = crosslane("submit", config_file(tmp_path), "--name", "first", "--json", *at)
    first = json.loads(out)["id"]
    assert code == 0
    server.client.wait(first, every=0.05)
    code, out, err = crosslane("submit", config_file(tmp_path), "--follow", "--set", "name=second", "--json", *at)
    second = json.loads(out)
    assert (code, second["name"], second["state"]) == (0, "second", "succeeded")
    assert "AUC 0.75" in err
    code, out, _ = crosslane("jobs", "--json", "--state", "succeeded", *at)
    assert [job["id"] for job in json.loads(out)["jobs"]] == [second["id"], first]
    code, out, _ = crosslane("jobs", *at)
    assert "second" in out
    code, out, _ = crosslane("status", first, *at)
    assert "finished" in out
    code, out, _ = crosslane("logs", first, *at)
    assert out.startswith("engine of first")
    code, out, _ = crosslane("logs", first, "--tail", "1", "--json", *at)
    assert json.loads(out)["logs"] == "gpus ''\n"
    code, out, _ = crosslane("report", first, "--json", *at)
    assert json.loads(out)["auc"] == 0.75
    code, out, _ = crosslane("report", first, "--out", tmp_path / "report.html", *at)
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    code, out, _ = crosslane("report", first, *at)
    assert f"/v1/jobs/{first}/report" in out
    held = server.client.submit({"data": {"path": "tiny"}}, name="hold")["id"]
    has_steps(server.client, held)
    code, out, _ = crosslane("cancel", held, "--wait", "--json", *at)
    assert (code, json.loads(out)["state"]) == (0, "cancelled")
    code, out, err = crosslane("cancel", first, *at)
    assert (code, out) == (8, "")
    assert "has ended already" in err


def test_following_ends_with_the_runs_exit_code(serve, crosslane, tmp_path):
    server = serve()
    code, out, _ = crosslane("submit", config_file(tmp_path, "fail"), "--follow", "--url", server.url)
    assert code == 3
    assert "beyond its 5 rows" in out
    code, _, err = crosslane("submit", config_file(tmp_path, train={"epochs": 0}), "--url", server.url)
    assert code == 8
    assert err.startswith("error: train.epochs")
    assert "Traceback" not in err


def test_paths_of_the_submitter_reach_the_service_whole(serve, crosslane, tmp_path, monkeypatch):
    server = serve()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "dataset.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    config = config_file(tmp_path, data={"path": "mine"})
    _, out, _ = crosslane("submit", config, "--json", "--url", server.url)
    assert json.loads(out)["dataset"] == str(tmp_path / "mine")
    _, out, _ = crosslane("submit", config_file(tmp_path), "--dataset", "mine", "--json", "--url", server.url)
    assert json.loads(out)["dataset"] == str(tmp_path / "mine")


def test_an_occupied_port_is_one_clear_error(crosslane, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, out, err = crosslane("serve", "--port", port, "--data-dir", tmp_path / "home")
    assert (code, out) == (8, "")
    assert err.splitlines() == [
        f"error: port {port} on 127.0.0.1: taken by another process; stop that one, or choose another with --port"
    ]


def test_two_services_may_not_share_a_folder(serve, crosslane, home):
    serve()
    code, _, err = crosslane("serve", "--port", 0, "--data-dir", home)
    assert code == 8
    assert "another service uses it" in err


def test_an_address_without_a_token_and_a_foreign_address_are_refused(crosslane, tmp_path):
    code, _, err = crosslane("serve", "--host", "192.0.2.1", "--data-dir", tmp_path)
    assert code == 2
    assert "no token" in err
    (tmp_path / "token").write_text("secret")
    options = ("--token-file", tmp_path / "token", "--data-dir", tmp_path)
    code, _, err = crosslane("serve", "--host", "192.0.2.1", *options)
    assert code == 8
    assert "cannot be bound" in err


def test_a_service_that_is_not_there_is_named_with_the_remedy(crosslane):
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    code, out, err = crosslane("jobs", "--url", url)
    assert (code, out) == (8, "")
    assert err == f"error: service at {url}: not reachable; start it with `crosslane serve`, or name it with --url\n"
    assert crosslane("jobs", "--url", "nonsense")[0] == 8
    assert crosslane("status", "../../healthz", "--url", url)[0] == 8


@pytest.mark.parametrize(
    ("status", "content", "words"),
    [
        (401, b'{"detail": "needs its token"}', "CROSSLANE_TOKEN"),
        (409, b'{"detail": "job x: has ended already"}', "has ended already"),
        (500, b"Internal Server Error", "answered 500"),
        (200, b"<html>", "not answered as Crosslane does"),
    ],
)
def test_answers_that_are_no_success_become_one_sentence(status, content, words):
    transport = httpx.MockTransport(lambda request: httpx.Response(status, content=content))
    with ServiceClient("http://127.0.0.1:1", transport=transport) as client, pytest.raises(ServiceError, match=words):
        client.jobs()


def test_the_client_sends_its_token():
    seen = []
    transport = httpx.MockTransport(lambda request: seen.append(request) or httpx.Response(200, json={}))
    with ServiceClient("http://127.0.0.1:1", "secret", transport=transport) as client:
        client.health()
    assert seen[0].headers["authorization"] == "Bearer secret"


def test_a_damaged_data_base_is_one_clear_error(tmp_path):
    path = tmp_path / "service.db"
    path.write_bytes(b"no data base at all" * 100)
    with pytest.raises(ServiceError, match="cannot be opened"):
        JobStore(path)
    path.unlink()
    JobStore(path).close()
    newer = sqlite3.connect(path)
    newer.execute("PRAGMA user_version = 99")
    newer.close()
    with pytest.raises(ServiceError, match="version 99"):
        JobStore(path)
