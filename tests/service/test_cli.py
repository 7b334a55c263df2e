"""The command line: verbs, errors, exit codes, lightness, documents."""

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from dlrm import errors
from dlrm.config import json_schema, load_run_config, parse_run_config
from service import cli
from service.commands import app

ROOT = Path(__file__).parents[2]
COMMAND = typer.main.get_command(app)


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CROSSLANE_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("data: {path: nowhere}\noptimizer: {kind: adagrad, lr: 0.25}\n")
    return path


def verbs(command: object = COMMAND, prefix: str = "") -> Iterator[str]:
    """Every verb, such as ``train`` and ``checkpoint export``."""
    for name, below in getattr(command, "commands", {}).items():
        if hasattr(below, "commands"):
            yield from verbs(below, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}"


def crosslane(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "service.cli", *words],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def one_error_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    assert len(lines) == 1, text
    assert lines[0].startswith("error: ")
    return lines[0]


def test_every_promised_verb_is_there() -> None:
    promised = """demo train evaluate serve submit jobs status logs cancel report synth
        prepare_criteo prepare_table data_list data_fetch data_adopt checkpoint_export checkpoint_import
        config_schema config_show config_example"""
    assert {verb.replace("_", " ") for verb in promised.split()} <= set(verbs())


def test_every_verb_is_documented() -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert [verb for verb in verbs() if f"`crosslane {verb}" not in text] == []


@pytest.mark.parametrize("document", ["README.md", "docs/hand.md", "docs/cli.md"])
def test_commands_in_the_documents_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    groups = {verb.split()[0] for verb in verbs() if " " in verb}
    named = set()
    for first, second in re.findall(r"(?:^ {4}|`|np \d+ |idle 1 )crosslane ([a-z]+)(?: ([a-z]+))?", text, re.MULTILINE):
        named.add(f"{first} {second}" if first in groups else first)
    assert len(named) >= 3
    assert named <= set(verbs())


def test_every_verb_has_help_and_every_option_a_description() -> None:
    def bare(command: object, path: str) -> Iterator[str]:
        if not getattr(command, "help", None):
            yield path
        for option in getattr(command, "params", ()):
            if not getattr(option, "help", None) and option.name not in {"help", "install_completion"}:
                yield f"{path} {option.name}"
        for name, below in getattr(command, "commands", {}).items():
            yield from bare(below, f"{path} {name}")

    assert list(bare(COMMAND, "crosslane")) == []


def test_exit_codes_are_documented_in_help_and_in_the_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0
    shown = capsys.readouterr().out
    document = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind is not errors.CrosslaneError]
    assert len(kinds) >= 7
    for kind in kinds:
        assert f"| {kind.exit_code} | `{kind.__name__}`" in document
        assert re.search(rf"\b{kind.exit_code}\b", shown)
    assert f"| {errors.STOPPED} |" in document
    assert str(errors.STOPPED) in shown


def test_help_and_job_verbs_load_no_engine() -> None:
    program = (
        "import sys; from service.cli import run; codes = [run(words) for words in "
        "(['--help'], ['jobs', '--help'], ['jobs'], ['train', '--help'], ['config', 'schema'])]; "
        "print('loaded', *sorted({'numpy', 'numba', 'polars', 'mpi4py'} & set(sys.modules)), codes)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"CROSSLANE_URL": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.stdout.splitlines()[-1] == "loaded [0, 0, 8, 0, 0]", done.stdout + done.stderr


def test_training_catches_the_stop_signal_before_anything_slow_is_loaded() -> None:
    program = (
        "import sys; from pipeline import stop; slow = {'typer', 'rich', 'pydantic', 'numpy'};"
        "stop.install = lambda *, single: print(single, *sorted(slow & set(sys.modules)));"
        "from service.cli import main; main(['train', '--help'])"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMPI_", "PMI"))}
    for launched, single in (({}, "True"), ({"OMPI_COMM_WORLD_SIZE": "2"}, "False")):
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env=environment | launched,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.stdout.splitlines()[0] == single, done.stdout + done.stderr


def test_wrong_option_is_one_line_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", "run.yaml", "--rank", "2"]) == 2
    assert "--rank" in one_error_line(capsys.readouterr().err)


def test_unknown_command_is_one_line_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["trian"]) == 2
    assert "trian" in one_error_line(capsys.readouterr().err)


def test_missing_config_is_one_line_and_code_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.run(["config", "show", str(tmp_path / "missing.yaml")]) == 2
    assert "missing.yaml" in one_error_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("optimizer.lrate=1", "optimizer.lrate"),
        ("data.batch_size=0", "data.batch_size"),
        ("model.bottom_mlp=[8]", "model.bottom_mlp"),
        ("no_equals_sign", "no_equals_sign"),
    ],
)
def test_wrong_field_is_named_by_its_path(
    config: Path, override: str, field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["config", "show", str(config), "--set", override]) == 2
    assert field in one_error_line(capsys.readouterr().err)


@pytest.mark.parametrize("kind", [errors.DataError, errors.DeviceError, errors.CommError, errors.CheckpointError])
def test_errors_become_their_exit_code(
    kind: type[errors.CrosslaneError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise kind("the sentence\nof two lines")

    monkeypatch.setattr("dlrm.config.json_schema", fail)
    assert cli.run(["config", "schema"]) == kind.exit_code
    assert one_error_line(capsys.readouterr().err) == "error: the sentence of two lines"


def test_unexpected_failure_has_a_traceback_only_with_debug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise ZeroDivisionError("of something")

    monkeypatch.setattr("dlrm.config.json_schema", fail)
    assert cli.run(["config", "schema"]) == 1
    assert "ZeroDivisionError: of something" in one_error_line(capsys.readouterr().err)
    monkeypatch.setenv("CROSSLANE_DEBUG", "1")
    assert cli.run(["config", "schema"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_interrupt_is_code_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dlrm.config.json_schema", interrupt)
    assert cli.run(["config", "schema"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_unreadable_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["config", "show", str(tmp_path)]) == 2
    assert str(tmp_path) in one_error_line(capsys.readouterr().err)


def test_debug_works_anywhere_on_the_line(config: Path) -> None:
    done = crosslane("config", "show", str(config), "--set", "seed=-1", "--debug")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: seed")
    assert "Traceback" not in crosslane("config", "show", str(config), "--set", "seed=-1").stderr


def test_a_reader_that_has_enough_ends_it_quietly() -> None:
    words = [sys.executable, "-m", "service.cli", "config", "schema"]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()  # before it has written anything
        assert process.stderr.read() == b""
        assert process.wait(timeout=240) == 1


def test_version_is_the_distributions() -> None:
    done = crosslane("--version")
    if done.returncode:  # a checkout that was not installed has no version to tell
        assert "crosslane" in one_error_line(done.stderr)
    else:
        assert re.fullmatch(r"crosslane \d+\.\d+\.\d+\S*\n", done.stdout)


def test_schema_is_the_run_configs(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ([], ["--json"]):
        assert cli.run(["config", "schema", *flag]) == 0
        assert json.loads(capsys.readouterr().out) == json_schema()


def test_every_verb_that_prints_a_result_takes_json() -> None:
    def options(words: str) -> set[str]:
        command: Any = COMMAND
        for word in words.split():
            command = command.commands[word]
        return {name for parameter in command.params for name in parameter.opts}

    assert [verb for verb in verbs() if "--json" not in options(verb)] == ["serve"]


def test_shown_config_is_whole_and_reads_back_the_same(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["config", "show", str(config), "--set", "optimizer.lr=0.5", "--set", "train.max_steps=7"]
    expected = load_run_config(config, ["optimizer.lr=0.5", "train.max_steps=7"])
    for flag in ([], ["--json"]):
        assert cli.run([*words, *flag]) == 0
        again = tmp_path / "again.yaml"
        again.write_text(capsys.readouterr().out)
        assert load_run_config(again) == expected
    assert expected.optimizer.lr == 0.5
    assert expected.train.max_steps == 7


def test_examples_are_listed_printed_and_valid(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.run(["config", "example", "--json"]) == 0
    listed = [row["name"] for row in json.loads(capsys.readouterr().out)]
    assert set(listed) >= {"movielens", "criteo_sample", "mlperf_dlrm", "synthetic_small"}
    for name in listed:
        assert cli.run(["config", "example", name]) == 0
        path = tmp_path / f"{name}.yaml"
        path.write_text(capsys.readouterr().out)
        printed = load_run_config(path)
        assert printed == load_run_config(ROOT / "examples" / f"{name}.yaml")
        assert cli.run(["config", "example", name, "--json"]) == 0
        assert parse_run_config(json.loads(capsys.readouterr().out)) == printed


def test_unknown_example_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["config", "example", "movielense"]) == 2
    assert "movielens" in one_error_line(capsys.readouterr().err)


def test_mlperf_example_has_the_submissions_values() -> None:
    run = load_run_config(ROOT / "examples" / "mlperf_dlrm.yaml")
    rate, train = run.learning_rate, run.train
    assert (run.data.batch_size, run.optimizer.lr, run.optimizer.kind) == (55_296, 24.0, "sgd")
    assert (rate.warmup_steps, rate.decay_start, rate.decay_steps, rate.decay_power) == (2750, 49_315, 27_772, 2.0)
    assert run.model.embedding_dim == 128
    assert run.model.bottom_mlp == (512, 256, 128)
    assert run.model.top_mlp == (1024, 1024, 512, 256, 1)
    assert train.target is not None
    assert (train.target.metric, train.target.value, train.eval_every) == ("auc", 0.8025, 3793)


def test_ranks_inside_mpirun_are_refused(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    assert cli.run(["train", str(config), "--ranks", "2"]) == 2
    assert "--ranks 2" in one_error_line(capsys.readouterr().err)
