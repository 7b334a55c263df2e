"""The NVTabular engine: renumbering without it, its environment, what is refused; with it, equality of the engines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psutil
import pytest
from typer.testing import CliRunner

from dlrm.errors import ConfigError, DataError
from pipeline.adopt_parquet import adopt_parquet
from pipeline.cli import app
from pipeline.dataset import load_dataset
from pipeline.etl import criteo_nvtabular as engine
from pipeline.etl import nvtabular_env
from pipeline.etl.criteo import CriteoInputs, prepare_criteo
from pipeline.etl.nvtabular_numbers import FIRST_ID, Uniques, read_uniques, renumber
from pipeline.etl.rules import Rules, make_rules

REPOSITORY = Path(__file__).parents[3]
REAL_ROWS = Path(os.environ.get("CROSSLANE_CRITEO_DIR", str(REPOSITORY / ".." / "shared" / "data")))
REAL_TRAIN, REAL_TEST = (REAL_ROWS / f"criteo_kaggle_{name}.tsv" for name in ("train_7200", "test_800"))
NVTABULAR = os.environ.get(nvtabular_env.VARIABLE, "")
with_nvtabular = pytest.mark.skipif(
    not NVTABULAR, reason=f"{nvtabular_env.VARIABLE} names no environment of `crosslane env nvtabular`"
)


def nvtabular_column(values: list[int | None], threshold: int, rng: np.random.Generator) -> tuple[Uniques, list[int]]:
    """What NVTabular makes of a column by its own rules: equal counts in an order that nobody knows."""
    counts = Counter(values)
    missing = counts.pop(None, 0)
    kept = [(value, count) for value, count in counts.items() if count >= threshold]
    kept = [kept[place] for place in rng.permutation(len(kept))]
    kept.sort(key=lambda pair: -pair[1])
    ids: dict[int | None, int] = {value: FIRST_ID + place for place, (value, _) in enumerate(kept)}
    ids[None] = 1
    uniques = Uniques(
        np.array([value for value, _ in kept], np.uint32),
        np.array([count for _, count in kept], np.int64),
        missing,
        len(values) - missing - sum(count for _, count in kept),
    )
    return uniques, [ids.get(value, 2) for value in values]


@pytest.mark.parametrize("missing", ["own", "rare"])
@pytest.mark.parametrize("cap_rows", [None, 1, 9])
@pytest.mark.parametrize("threshold", [1, 3])
def test_renumbered_ids_are_those_of_plain_python(
    tmp_path: Path, rng: np.random.Generator, missing: Any, cap_rows: int | None, threshold: int
) -> None:
    pool = [*rng.integers(0, 2**32, 60).tolist(), 0, 2**32 - 1, None]
    values = [pool[place] for place in rng.integers(0, len(pool), 300)]
    uniques, ids = nvtabular_column(values, threshold, rng)
    rules = Rules(frequency_threshold=threshold, cap_rows=cap_rows, missing_category=missing)

    numbered, numbers = renumber(uniques, rules, len(values), tmp_path / "values")

    counts = Counter(-1 if value is None else value for value in values if value is not None or missing == "own")
    order = sorted((value for value in counts if counts[value] >= threshold), key=lambda value: (-counts[value], value))
    order = order[: None if cap_rows is None else cap_rows - 1]
    expected = {value: place for place, value in enumerate(order, 1)}
    assert numbers[ids].tolist() == [expected.get(-1 if value is None else value, 0) for value in values]
    assert (numbered.size, numbered.missing) == (len(order), expected.get(-1, 0))
    assert np.fromfile(numbered.path, np.uint32).tolist() == [max(value, 0) for value in order]
    assert numbered.counts_of(0, len(order)).tolist() == [counts[value] for value in order]
    assert list(numbered.counts) == sorted(set(numbered.counts), reverse=True)
    assert numbered.rare == numbers[ids].tolist().count(0)


def write_uniques(folder: Path, texts: list[str], counts: list[int], *, parts: int = 0, null: int | None = 0) -> None:
    """Files as NVTabular 23.8 writes them; ``parts``: as a folder of so many."""
    frame = pl.DataFrame({"C1": texts, "C1_size": counts}, schema={"C1": pl.String, "C1_size": pl.Int64})
    path = folder / "unique.C1.parquet"
    if parts:
        path.mkdir()
        for number in range(parts):
            part = frame[number * len(frame) // parts : (number + 1) * len(frame) // parts]
            part.write_parquet(path / f"part.{number}.parquet")
    else:
        frame.write_parquet(path)
    kinds = {"kind": ["pad", "null", "oov", "unique"], "num_observed": [0, null, 5, sum(counts)]}
    pl.DataFrame(kinds).write_parquet(folder / "meta.C1.parquet")


@pytest.mark.parametrize("parts", [0, 1, 12])
@pytest.mark.parametrize("null", [None, 7])
def test_vocabulary_is_read_from_a_file_or_its_parts(
    tmp_path: Path, rng: np.random.Generator, parts: int, null: int | None
) -> None:
    values = rng.integers(0, 2**32, 40)
    counts = np.sort(rng.integers(1, 99, 40))[::-1]
    write_uniques(tmp_path, [f"{value:08x}" for value in values], counts.tolist(), parts=parts, null=null)
    found = read_uniques(tmp_path, "C1")
    assert found.values.tolist() == values.tolist()
    assert found.counts.tolist() == counts.tolist()
    assert (found.missing, found.rare) == (null or 0, 5)


@pytest.mark.parametrize("text", ["0A1b2c3d", "a1b2c3d", "0a1b2c3d4", "0a1b2c3g"])
def test_categories_of_another_form_are_refused(tmp_path: Path, text: str) -> None:
    write_uniques(tmp_path, ["0a1b2c3d", text], [3, 2])
    with pytest.raises(DataError, match=f"column C1: category '{text}' is not 8 hexadecimal digits in lower case"):
        read_uniques(tmp_path, "C1")


def test_a_vocabulary_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"unique\.C1\.parquet: not a vocabulary of NVTabular"):
        read_uniques(tmp_path, "C1")


def random_lines(rng: np.random.Generator, rows: int, distinct: int = 12) -> list[str]:
    """Lines with missing, negative and large integers and with missing categories."""
    lines = []
    for _ in range(rows):
        integers = ["" if value < -3 else str(value) for value in rng.integers(-5, 50, 13).tolist()]
        # Few different values, all tried: log(1 + x) and log1p(x) in 64 bits round alike to 32 for nearly all x.
        integers[3] = str(10 ** int(rng.integers(0, 16)))
        keys = [f"{value * 7_919 % 2**32:08x}" if value else "" for value in rng.integers(0, distinct, 26).tolist()]
        lines.append("\t".join([str(rng.integers(2)), *integers, *keys]))
    return lines


def write_rows(path: Path, rng: np.random.Generator, rows: int) -> Path:
    path.write_text("\n".join(random_lines(rng, rows)) + "\n")
    return path


def content(directory: Path) -> dict[str, bytes]:
    """All files of a set, the manifest's notes apart."""
    files = {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    manifest = json.loads(files.pop("dataset.json"))
    notes = [note for note in manifest.pop("notes") if not note.startswith("engine: ")]
    return {**files, "manifest": json.dumps([manifest, notes]).encode()}


def interpreter(path: Path, script: str) -> Path:
    """A program in the place of an interpreter."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("reads", ["read request; ", ""])
def test_a_failed_workflow_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, rng: np.random.Generator, reads: str
) -> None:
    python = interpreter(tmp_path / "python", f"{reads}echo first >&2; echo 'ValueError: bad rows' >&2; exit 3\n")
    inputs = CriteoInputs(train=[write_rows(tmp_path / "rows.tsv", rng, 3)])
    with pytest.raises(DataError, match=r"workflow ended with code 3 \(ValueError: bad rows\); check the rows with"):
        engine.prepare_with_nvtabular(inputs, tmp_path / "out", python=python)
    assert not (tmp_path / "out").exists()


def test_what_the_workflow_has_no_place_for_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    rows = write_rows(tmp_path / "rows.tsv", rng, 3)
    packed = write_rows(tmp_path / "rows.tsv.gz", rng, 3)
    with pytest.raises(ConfigError, match=r"--validation-fraction 0\.5: --engine nvtabular counts whole files"):
        engine.check_inputs(CriteoInputs(train=[rows], validation_fraction=0.5), make_rules())
    with pytest.raises(ConfigError, match=r"rows\.tsv\.gz: --engine nvtabular reads plain text"):
        engine.check_inputs(CriteoInputs(train=[rows], test=[packed]), make_rules())
    with pytest.raises(ConfigError, match=r"--count all: --engine nvtabular counts the training rows alone"):
        engine.check_inputs(CriteoInputs(train=[rows]), make_rules(count="all"))


def refusal(arguments: list[str], environment: dict[str, str | None]) -> str:
    done = CliRunner().invoke(app, arguments, env=environment)
    assert isinstance(done.exception, ConfigError)
    return str(done.exception)


def test_the_command_refuses_what_goes_with_the_other_engine_only(tmp_path: Path) -> None:
    own: dict[str, str | None] = {nvtabular_env.VARIABLE: None, "XDG_DATA_HOME": str(tmp_path)}
    given = ["prepare", "criteo", "--train", str(tmp_path / "rows"), "--out", str(tmp_path / "out")]
    chosen = [*given, "--engine", "nvtabular"]
    assert "--memory-limit 2GiB: --engine nvtabular keeps none" in refusal([*chosen, "--memory-limit", "2GiB"], own)
    assert "mpirun started 4 ranks" in refusal(chosen, {**own, "OMPI_COMM_WORLD_SIZE": "4"})
    assert "environment is not there; make it with `crosslane env nvtabular`" in refusal(chosen, own)
    scheduler = [*given, "--dask-scheduler", "tcp://127.0.0.1:8786"]
    assert "goes with --engine nvtabular; mpirun spreads" in refusal(scheduler, own)


def fake_environment(folder: Path) -> Path:
    interpreter(folder / "bin" / "python", f"echo '\"{nvtabular_env.PINS[0].partition('==')[2]}\"'\n")
    return folder


def test_the_environment_is_remembered_and_found_again(tmp_path: Path) -> None:
    environ = {"XDG_DATA_HOME": str(tmp_path / "data")}
    folder = fake_environment(tmp_path / "there")
    made = CliRunner().invoke(
        app, ["env", "nvtabular", str(folder), "--json"], env={**environ, nvtabular_env.VARIABLE: None}
    )
    assert made.exit_code == 0, made.output
    assert json.loads(made.output)["path"] == str(folder)
    assert nvtabular_env.find_environment(environ) == folder / "bin" / "python"
    other = fake_environment(tmp_path / "other")
    named = {**environ, nvtabular_env.VARIABLE: str(other)}
    assert nvtabular_env.find_environment(named) == other / "bin" / "python"
    (folder / "bin" / "python").unlink()
    with pytest.raises(ConfigError, match=r"no environment there, though .*nvtabular\.json names it"):
        nvtabular_env.find_environment(environ)


def test_interpreters_and_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    environ = {"XDG_DATA_HOME": str(tmp_path / "data")}
    newer = interpreter(tmp_path / "newer", "echo 3 13\n")
    with pytest.raises(ConfigError, match=r"needs Python 3\.10 or 3\.11, but .*newer is 3\.13; install one"):
        nvtabular_env.make_environment(tmp_path / "env", str(newer), environ)
    with pytest.raises(ConfigError, match=r"absent is not there"):
        nvtabular_env.make_environment(tmp_path / "env", str(tmp_path / "absent"), environ)
    assert not (tmp_path / "env").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConfigError, match="holds something else"):
        nvtabular_env.make_environment(tmp_path / "full", sys.executable, environ)
    broken = interpreter(
        tmp_path / "broken",
        '[ "$1" = -I ] && { echo 3 11; exit; }\nmkdir -p "$3/bin"; echo "ERROR: no space" >&2; exit 1\n',
    )
    with pytest.raises(ConfigError, match=r"could not make the environment \(no space\)"):
        nvtabular_env.make_environment(tmp_path / "env", str(broken), environ)
    assert not (tmp_path / "env").exists()


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """An interpreter that does by plain Python what NVTabular does."""
    script = Path(__file__).with_name("nvtabular_stand_in.py")
    return interpreter(tmp_path / "stand_in", f'exec "{sys.executable}" "{script}"\n')


RULES: list[dict[str, Any]] = [
    {},
    {"cap_modulo": 5_000, "missing_category": "zero", "dense_transform": "add2_log1p", "frequency_threshold": 1},
    {"cap_rows": 5, "missing_category": "rare", "dense_transform": "add3_log", "missing_integer": 4},
]


@pytest.mark.parametrize("options", RULES)
def test_ids_become_the_rows_of_the_other_engine(
    tmp_path: Path, rng: np.random.Generator, stand_in: Path, options: dict[str, Any]
) -> None:
    train, day = write_rows(tmp_path / "train.tsv", rng, 90), write_rows(tmp_path / "day.tsv", rng, 31)
    inputs, rules = CriteoInputs(train=[train], last_day=day), make_rules(**options)
    own = prepare_criteo(inputs, tmp_path / "own", rules=rules)
    theirs = engine.prepare_with_nvtabular(inputs, tmp_path / "theirs", python=stand_in, rules=rules)
    assert content(theirs) == content(own)
    assert "engine: NVTabular 23.08.00" in load_dataset(theirs).manifest.notes


def test_after_a_kill_only_what_follows_the_workflow_is_done_again(
    tmp_path: Path, rng: np.random.Generator, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = CriteoInputs(train=[write_rows(tmp_path / "train.tsv", rng, 40)])
    own = prepare_criteo(inputs, tmp_path / "own")
    real = engine.raw_rows

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "raw_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.prepare_with_nvtabular(inputs, tmp_path / "out", python=stand_in)
    monkeypatch.setattr(engine, "raw_rows", real)
    out = engine.prepare_with_nvtabular(inputs, tmp_path / "out", python=tmp_path / "absent")
    assert content(out) == content(own)


def test_a_label_that_is_none_is_refused(tmp_path: Path, rng: np.random.Generator, stand_in: Path) -> None:
    lines = random_lines(rng, 20)
    lines[11] = "7" + lines[11][1:]
    (tmp_path / "train.tsv").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"rows of train, as NVTabular wrote them: .*row \d+: label -1 is neither"):
        engine.prepare_with_nvtabular(CriteoInputs(train=[tmp_path / "train.tsv"]), tmp_path / "out", python=stand_in)
    assert not (tmp_path / "out").exists()


def nvtabular_python() -> Path:
    return nvtabular_env.find_environment({nvtabular_env.VARIABLE: NVTABULAR})


@with_nvtabular
@pytest.mark.skipif(not REAL_TRAIN.is_file(), reason=f"Criteo's sample is not in {REAL_ROWS} (CROSSLANE_CRITEO_DIR)")
def test_both_engines_write_the_same_bytes_of_the_real_rows(tmp_path: Path) -> None:
    inputs = CriteoInputs(train=[REAL_TRAIN], test=[REAL_TEST])
    own = prepare_criteo(inputs, tmp_path / "own")
    theirs = engine.prepare_with_nvtabular(inputs, tmp_path / "theirs", python=nvtabular_python(), block_bytes=400_000)
    assert content(theirs) == content(own)


@with_nvtabular
@pytest.mark.parametrize("options", RULES[1:])
def test_both_engines_follow_the_rules(tmp_path: Path, rng: np.random.Generator, options: dict[str, Any]) -> None:
    train, day = write_rows(tmp_path / "train.tsv", rng, 300), write_rows(tmp_path / "day.tsv", rng, 31)
    inputs, rules = CriteoInputs(train=[train], last_day=day), make_rules(**options)
    own = prepare_criteo(inputs, tmp_path / "own", rules=rules)
    theirs = engine.prepare_with_nvtabular(
        inputs, tmp_path / "theirs", python=nvtabular_python(), rules=rules, block_bytes=9_000
    )
    assert content(theirs) == content(own)


@with_nvtabular
def test_workers_of_a_dask_scheduler_write_the_same_rows(tmp_path: Path, rng: np.random.Generator) -> None:
    inputs = CriteoInputs(train=[write_rows(tmp_path / "train.tsv", rng, 300)])
    own = prepare_criteo(inputs, tmp_path / "own")
    place = tmp_path / "scheduler.json"
    dask = [str(nvtabular_python().parent / "dask")]
    scheduler = [*dask, "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
    worker = [
        *dask,
        "worker",
        "--nthreads",
        "1",
        "--nworkers",
        "2",
        "--no-dashboard",
        "--local-directory",
        str(tmp_path),
    ]
    started = [
        subprocess.Popen([*command, "--scheduler-file", str(place)], stderr=subprocess.DEVNULL)
        for command in (scheduler, worker)
    ]
    try:
        deadline = time.monotonic() + 60
        while not place.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        address = json.loads(place.read_text())["address"]
        theirs = engine.prepare_with_nvtabular(
            inputs, tmp_path / "theirs", python=nvtabular_python(), scheduler=address, block_bytes=9_000
        )
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(60)
    assert content(theirs) == content(own)


@with_nvtabular
def test_its_parquet_is_read_as_it_is(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept"

    def keep(job: Any, rules: Any, report: Any) -> Any:
        """Leave NVTabular's own files behind, then go on."""
        (job.folder / "nvtabular" / "rows").rename(kept)
        raise DataError("kept")

    monkeypatch.setattr(engine, "_encode", keep)
    train = write_rows(tmp_path / "train.tsv", rng, 200)
    with pytest.raises(DataError, match="kept"):
        engine.prepare_with_nvtabular(
            CriteoInputs(train=[train]), tmp_path / "out", python=nvtabular_python(), block_bytes=8_000
        )
    assert (kept / "train" / "schema.pbtxt").is_file()
    (kept / "train" / "_file_list.txt").unlink()  # it names the files where they were
    adopted = load_dataset(adopt_parquet({"train": [kept / "train"]}, out=tmp_path / "adopted")).manifest
    assert adopted.splits["train"].rows == 200
    assert [table.name for table in adopted.tables] == [f"C{number}" for number in range(1, 27)]
    assert all(3 < table.rows <= 3 + 12 for table in adopted.tables)  # 11 values, none of them rarer than twice


@with_nvtabular
def test_a_malformed_row_ends_the_workflow_with_a_sentence(tmp_path: Path, rng: np.random.Generator) -> None:
    lines = random_lines(rng, 40)
    lines[17] = lines[17].replace("\t", "\tx", 1)
    (tmp_path / "train.tsv").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"workflow ended with code 1 \(ValueError"):
        engine.prepare_with_nvtabular(
            CriteoInputs(train=[tmp_path / "train.tsv"]), tmp_path / "out", python=nvtabular_python()
        )


@with_nvtabular
def test_the_workflow_ends_with_whoever_started_it(tmp_path: Path, rng: np.random.Generator) -> None:
    train = write_rows(tmp_path / "train.tsv", rng, 3_000)
    words = ["prepare", "criteo", "--engine", "nvtabular", "--train", str(train), "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "service.cli", *words]
    process = subprocess.Popen(command, env={**os.environ, nvtabular_env.VARIABLE: NVTABULAR}, cwd=REPOSITORY)
    deadline = time.monotonic() + 60
    workers: list[psutil.Process] = []
    while not workers and time.monotonic() < deadline and process.poll() is None:
        workers = psutil.Process(process.pid).children()
        time.sleep(0.01)
    assert len(workers) == 1
    process.kill()
    process.wait()
    gone, _ = psutil.wait_procs(workers, timeout=60)
    assert gone == workers
