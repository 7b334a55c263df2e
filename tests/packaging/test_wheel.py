"""The built wheel, installed into an environment of its own and run among decoys of its own packages' names."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("dlrm", "embedding", "pipeline", "service")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is left in the checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in (*PACKAGES, "examples"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def crosslane(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command in an environment that holds the wheel; its dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    here = sysconfig.get_path("purelib")
    there = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    # Only the folder itself: its own .pth files, such as an editable install's, stay out.
    (Path(there) / "dependencies.pth").write_text(here + "\n")
    command = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--force-reinstall", wheel]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder / "bin" / "crosslane"


@pytest.fixture
def among_decoys(tmp_path: Path) -> Path:
    """A folder whose packages break whoever imports them."""
    for name in PACKAGES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise SystemExit('decoy {name} imported')\n")
    return tmp_path


def run(command: Path, *words: str, cwd: Path, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "CROSSLANE_"))}
    # Open MPI's files lie in this environment, where the other one's dependencies are.
    environment["PATH"] = os.pathsep.join([str(command.parent), str(Path(sys.executable).parent), environment["PATH"]])
    environment["MPI4PY_LIBMPI"] = str(Path(sys.prefix) / "lib")
    return subprocess.run([command, *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)


def test_wheel_carries_every_package_file_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    expected |= {f"pipeline/examples/{path.name}" for path in (ROOT / "examples").glob("*.yaml")}
    assert names == expected


def test_installed_command_tells_help_schema_and_examples(crosslane: Path, among_decoys: Path) -> None:
    helped = run(crosslane, "--help", cwd=among_decoys)
    assert helped.returncode == 0, helped.stderr
    assert "Exit codes" in helped.stdout
    schema = run(crosslane, "config", "schema", cwd=among_decoys)
    assert json.loads(schema.stdout)["title"] == "RunConfig"
    examples = run(crosslane, "config", "example", "--json", cwd=among_decoys)
    assert {"movielens", "mlperf_dlrm"} <= {row["name"] for row in json.loads(examples.stdout)}
    version = run(crosslane, "--version", cwd=among_decoys)
    assert version.stdout.startswith("crosslane ")


def test_installed_demo_trains_among_decoys_and_leaves_nothing_running(crosslane: Path, among_decoys: Path) -> None:
    home = among_decoys / "home"
    done = run(crosslane, "demo", "--home", str(home), "--json", cwd=among_decoys, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert 0.76 < result["auc"] < 0.85
    assert 0.5 < result["log_loss"] < 0.6
    page = Path(result["report"].removeprefix("file://"))
    assert "<html" in page.read_text(encoding="utf-8").lower()
    assert page.is_relative_to(home)
    assert "research use only" in done.stderr
    start = json.loads((page.parent / "progress.jsonl").read_text().splitlines()[0])
    assert start["ranks"] == 2
    assert not [process for process in psutil.process_iter(["cmdline"]) if str(home) in str(process.info["cmdline"])]
