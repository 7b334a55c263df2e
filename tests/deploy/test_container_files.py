"""The container's files: nothing in them that does not exist, and an entry point that works as a plain script."""

import fnmatch
import json
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import httpx
import pytest
import yaml
from typer.main import get_command

from service import settings
from service.commands import app

ROOT = Path(__file__).parents[2]
ENTRYPOINT = ROOT / "deploy" / "entrypoint.sh"
KNOWN_VARIABLES = set(re.findall(r"^``(CROSSLANE_\w+)``", settings.__doc__, re.MULTILINE))


def instructions():
    """(word, rest) of every instruction, continued lines joined."""
    text = (ROOT / "deploy" / "Dockerfile").read_text()
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = lines.replace("\\\n", " ")
    return [(line.split()[0].upper(), line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def of(word):
    return [rest for found, rest in instructions() if found == word]


@pytest.fixture(scope="module")
def compose():
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text())


def copies():
    """(source, from another stage) of every file that is copied."""
    for rest in of("COPY"):
        words = shlex.split(rest)
        options = [word for word in words if word.startswith("--")]
        stage = any(word.startswith("--from=") for word in options)
        for source in [word for word in words if not word.startswith("--")][:-1]:
            yield source, stage


def test_instructions_are_dockers_own():
    known = {
        "FROM",
        "WORKDIR",
        "COPY",
        "RUN",
        "USER",
        "VOLUME",
        "ENV",
        "EXPOSE",
        "HEALTHCHECK",
        "ENTRYPOINT",
        "CMD",
        "ARG",
    }
    assert {word for word, _ in instructions()} <= known
    assert instructions()[0][0] == "FROM"


def test_what_is_copied_exists_and_is_not_ignored():
    ignore = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text().splitlines()
    kept = [line.removeprefix("!") for line in ignore if line.startswith("!")]
    assert "*" in ignore
    sources = [source for source, stage in copies() if not stage]
    assert len(sources) >= 8
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(fnmatch.fnmatch(source, pattern) for pattern in kept), source
    assert all((ROOT / name).exists() for name in kept)


def test_every_package_is_copied():
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages == {"dlrm", "embedding", "pipeline", "service"}
    assert packages <= {source for source, _ in copies()}


def test_what_the_wheel_is_made_of_is_copied():
    """A build without setup.py or examples/ succeeds, and gives a wheel without ready configs."""
    assert {"pyproject.toml", "setup.py", "examples"} <= {source for source, _ in copies()}


def test_other_stages_are_there():
    stages = {match[1] for rest in of("FROM") if (match := re.search(r"\bAS (\w+)", rest))}
    named = {match[1] for rest in of("COPY") if (match := re.search(r"--from=(\w+)", rest))}
    assert named <= stages


def test_the_image_runs_without_root():
    words = [word for word, _ in instructions()]
    (user,) = of("USER")
    assert user not in {"root", "0"}
    assert any(f"useradd --create-home --uid 10001 {user}" in rest for rest in of("RUN"))
    assert max(index for index, word in enumerate(words) if word in {"RUN", "COPY"}) < words.index("USER")


def test_variables_are_those_that_the_settings_read(compose):
    (environment,) = of("ENV")
    image = dict(entry.split("=", 1) for entry in shlex.split(environment))
    names = {*image, *compose["services"]["crosslane"]["environment"]}
    assert {name for name in names if name.startswith("CROSSLANE_")} <= KNOWN_VARIABLES
    loaded = settings.load_settings(environ={**image, "CROSSLANE_TOKEN_FILE": "", "CROSSLANE_TOKEN": "secret"})
    assert (str(loaded.home), loaded.port) == ("/data", settings.DEFAULT_PORT)
    assert of("EXPOSE") == [str(loaded.port)]
    assert of("VOLUME") == ["/data"]
    assert f":{loaded.port}/healthz" in of("HEALTHCHECK")[0]


def test_the_entry_point_is_the_script_and_its_verb_exists():
    assert json.loads(of("ENTRYPOINT")[0]) == ["crosslane-entrypoint"]
    assert any(rest.endswith("deploy/entrypoint.sh /usr/local/bin/crosslane-entrypoint") for rest in of("COPY"))
    assert ENTRYPOINT.stat().st_mode & stat.S_IXUSR
    verbs = get_command(app).commands
    (verb,) = json.loads(of("CMD")[0])
    options = {option for parameter in verbs[verb].params for option in parameter.opts}
    assert "--stop-jobs" in options
    subprocess.run(["sh", "-n", str(ENTRYPOINT)], check=True)


def test_compose_builds_this_image_and_publishes_on_loopback_only(compose):
    (service,) = compose["services"].values()
    assert (ROOT / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    assert service["ports"] == [f"127.0.0.1:{settings.DEFAULT_PORT}:{settings.DEFAULT_PORT}"]
    assert "network_mode" not in service
    assert "privileged" not in service


def test_the_gpu_file_adds_an_extra_that_there_is_and_gpus_to_the_same_service(compose):
    added = yaml.safe_load((ROOT / "deploy" / "compose.gpu.yml").read_text())
    assert set(added) <= {"services"} | set(compose)
    assert set(added["services"]) == set(compose["services"])
    (service,) = added["services"].values()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (name, value), *more = service["build"]["args"].items()
    assert not more
    assert re.search(r":-(\w+)}", value)[1] in extras
    assert any(rest.split("=")[0] == name for rest in of("ARG"))
    assert any(f"${{{name}:+[${name}]}}" in rest for rest in of("RUN"))
    (devices,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert (devices["driver"], devices["capabilities"]) == ("nvidia", ["gpu"])
    assert {name for name in service["environment"] if name.startswith("CROSSLANE_")} <= KNOWN_VARIABLES


@pytest.mark.parametrize(("extra", "asked"), [("", "/w/one.whl"), ("cuda12", "/w/one.whl[cuda12]")])
def test_the_extra_reaches_pip(tmp_path, extra, asked):
    """What the RUN line hands to pip, by a shell as in the image."""
    (line,) = [rest for rest in of("RUN") if rest.startswith("pip install")]
    wheels = tmp_path / "w"
    wheels.mkdir()
    (wheels / "one.whl").touch()
    script = line.split(" && ")[0].replace("pip install", "printf '%s\n'").replace("/wheels", str(wheels))
    done = subprocess.run(["sh", "-c", script], env={"EXTRA": extra}, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == asked.replace("/w", str(wheels), 1)


def test_compose_keeps_the_runs_in_a_declared_volume(compose):
    (service,) = compose["services"].values()
    mounts = dict(volume.split(":") for volume in service["volumes"])
    assert set(mounts) <= set(compose["volumes"])
    assert list(mounts.values()) == of("VOLUME")


def test_a_container_waits_longer_than_a_checkpoint_may_take(compose):
    grace = int(compose["services"]["crosslane"]["stop_grace_period"].removesuffix("s"))
    loaded = settings.load_settings(environ={})
    assert grace > loaded.stop_seconds + loaded.kill_seconds


@pytest.fixture
def entry(tmp_path):
    """Runs the entry point as a plain script, on loopback and a free port."""
    started = []

    def run(*arguments, **variables):
        environment = {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), "/usr/bin", "/bin"]),
            "HOME": str(tmp_path),
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "CROSSLANE_HOME": str(tmp_path / "data"),
            "CROSSLANE_HOST": "127.0.0.1",
            "CROSSLANE_PORT": "0",
            **variables,
        }
        bin_folder = tmp_path / "bin"
        bin_folder.mkdir(exist_ok=True)
        # Stands for the installed command, so that the checkout need not be installed.
        command = bin_folder / "crosslane"
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m service.cli "$@"\n')
        command.chmod(0o755)
        environment["PATH"] = str(bin_folder) + os.pathsep + environment["PATH"]
        process = subprocess.Popen(
            [str(ENTRYPOINT), *arguments],
            env=environment,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def address(process):
    line = process.stdout.readline()
    found = re.search(r"http://\S+:\d+", line)
    assert found, line + process.stderr.read()
    return found[0]


def test_the_entry_point_serves_with_a_token_of_its_own_making(entry, tmp_path):
    process = entry()
    url = address(process)
    token = (tmp_path / "data" / "token").read_text().strip()
    assert len(token) >= 32
    assert stat.S_IMODE((tmp_path / "data" / "token").stat().st_mode) == 0o600
    with httpx.Client(base_url=url, trust_env=False, timeout=120) as client:
        assert client.get("/healthz").json()["status"] == "ok"
        assert client.get("/v1/jobs").status_code == 401
        assert client.get("/v1/jobs", headers={"authorization": f"Bearer {token}"}).json()["total"] == 0
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0
    assert token not in errors
    again = entry("serve")
    address(again)
    assert (tmp_path / "data" / "token").read_text().strip() == token


def test_the_entry_point_takes_a_given_token(entry, tmp_path):
    process = entry("serve", CROSSLANE_TOKEN="given-from-outside")
    url = address(process)
    assert (tmp_path / "data" / "token").read_text() == "given-from-outside\n"
    headers = {"authorization": "Bearer given-from-outside"}
    with httpx.Client(base_url=url, trust_env=False, timeout=120, headers=headers) as client:
        assert client.get("/v1/jobs").status_code == 200


def test_the_entry_point_runs_other_commands(entry, tmp_path):
    process = entry("submit", "no-such-file.yaml")
    out, errors = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert errors.startswith("error: config no-such-file.yaml")
    assert not (tmp_path / "data").exists()
