"""Training and evaluation from Raw files need few packages: a GPU machine's Python need not have the others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dlrm.errors import ConfigError
from pipeline.adopt_parquet import adopt_parquet
from pipeline.convert import convert

ROOT = Path(__file__).parents[2]

NEEDED = {"numpy", "numba", "llvmlite", "pydantic", "pydantic_core", "yaml", "mpi4py"}
"""Whatever pydantic needs itself comes with it: ``typing_extensions`` and the two below."""

PROGRAM = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if not (top in sys.stdlib_module_names or top in allowed or top.startswith("_")):
            raise ModuleNotFoundError(f"No module named {name!r}", name=top)

allowed = set(sys.argv[1].split(","))
sys.meta_path.insert(0, Absent())
"""

TRAIN = PROGRAM + "from pipeline.train import main; sys.exit(main(sys.argv[2]))"

EVALUATE = PROGRAM + (
    "from pipeline.evaluate import main; "
    "code, _ = main(sys.argv[2], checkpoint=sys.argv[3], report=sys.argv[4]); sys.exit(code)"
)


def run(program, *arguments):
    own = {"dlrm", "embedding", "pipeline", "typing_extensions", "annotated_types", "typing_inspection"}
    return subprocess.run(
        [sys.executable, "-c", program, ",".join(sorted(NEEDED | own)), *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture
def config(tmp_path, tiny_dataset, run_values):
    path = tmp_path / "config.yaml"

    def write(dataset=None, **sections):
        path.write_text(yaml.safe_dump(run_values(dataset or tiny_dataset(), **sections)))
        return path

    return write


def test_a_run_from_raw_files_loads_nothing_else(tmp_path, config) -> None:
    path = config(train={"epochs": 1}, overlap={"train": "always", "eval": "always"})
    done = run(TRAIN, path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == ["warning: report.html is not written, since jinja2 is not installed"]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert 0 < report["auc"] < 1

    checkpoint = Path(report["run"]["checkpoint"])
    done = run(EVALUATE, path, checkpoint, tmp_path / "again")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "again" / "report.json").read_text())["log_loss"] == report["log_loss"]


def test_who_trains_on_a_gpu_waits_for_no_compiler() -> None:
    """numba takes a quarter of a second to load, and has nothing to do where rows come from a GPU or go to it."""
    program = "import sys, pipeline.engine, pipeline.trainer; print(*sorted({'numba', 'llvmlite'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_a_parquet_set_says_what_it_needs(tmp_path, tiny_dataset, config) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed: make install")
    convert(tiny_dataset(), tmp_path / "parquet", to="parquet")
    folder = adopt_parquet({"train": [tmp_path / "parquet"]}, out=tmp_path / "adopted")
    done = run(TRAIN, config(folder))
    assert done.returncode == ConfigError.exit_code
    assert "training from Parquet files needs polars; install it, or convert them to raw" in done.stderr
