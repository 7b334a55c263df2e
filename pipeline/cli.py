"""The engine's verbs; each loads the engine only when it is called, after the threads are settled."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from dlrm.errors import ConfigError, CrosslaneError
from pipeline.cli_check import data_check
from pipeline.cli_convert import convert
from pipeline.cli_criteo import encode, prepare
from pipeline.cli_data import ManyValues, data_app, prepare_app, synth
from pipeline.cli_env import env_app
from pipeline.cli_plan import plan
from pipeline.console import AsJson, print_fields, print_json, print_rows, show_progress
from pipeline.ready_configs import ready_config, ready_configs
from pipeline.threads import settle_threads

app = typer.Typer()
checkpoint_app = typer.Typer(help="Weights in and out of checkpoints.")
config_app = typer.Typer(help="The fields of a run, and ready configs.")

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML or JSON file of a run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Set one field, such as optimizer.lr=0.1; may be repeated."),
]


def debugging() -> bool:
    """Whether tracebacks are wanted (``--debug`` or ``CROSSLANE_DEBUG``)."""
    return os.environ.get("CROSSLANE_DEBUG", "") not in {"", "0"}


def is_first_rank() -> bool:
    """Whether this process is rank 0, or the only one."""
    return (
        next(
            (os.environ[name] for name in ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK") if name in os.environ), "0"
        )
        == "0"
    )


def train_here(config: Path, overrides: Sequence[str], *, init: str | None, as_json: bool) -> None:
    """Train in this process, alone or as one of the ranks that mpirun started.

    Raises:
        typer.Exit: the run ended with an exit code other than 0.
    """
    settle_threads()
    from pipeline import train

    directory = _run_directory(config, overrides) if is_first_rank() else None
    with show_progress(directory) if directory else nullcontext():
        code = train.main(str(config), overrides=list(overrides), init=init, debug=debugging())
    if code:
        raise typer.Exit(code)
    if directory:
        print_run(directory, as_json=as_json)


def _run_directory(config: Path, overrides: Sequence[str]) -> Path | None:
    """Where the run will write; ``None`` for a config that the engine is about to refuse, once for all ranks."""
    from dlrm.config import load_run_config

    try:
        return Path(load_run_config(config, overrides).run.directory)
    except CrosslaneError:
        return None


def print_run(directory: Path, *, as_json: bool) -> None:
    """Print the report that a finished run left in its directory, without its curves."""
    path = directory / "report.json"
    if not path.is_file():  # nothing was evaluated
        print_fields("Run", {"run_directory": str(directory)}, as_json=as_json)
        return
    report = json.loads(path.read_text(encoding="utf-8"))
    print_report(report, directory, as_json=as_json)


def print_report(report: dict[str, Any], directory: Path | None, *, as_json: bool) -> None:
    """Print a report's figures, and where the page lies."""
    figures = {name: value for name, value in report.items() if name != "curves"}
    page = str((directory / "report.html").resolve()) if directory else None
    if as_json:
        print_json({**figures, "report": page})
        return
    shown = {name: value for name, value in figures.items() if not isinstance(value, dict | list)}
    print_fields("Evaluation", shown, as_json=False)
    if page:
        typer.echo(f"report: {page}")


@app.command(rich_help_panel="Engine")
def evaluate(
    config: ConfigFile,
    checkpoint: Annotated[Path, typer.Option(help="Folder of a checkpoint, or of imported weights.")],
    report: Annotated[Path | None, typer.Option(help="Folder that gets report.json and report.html.")] = None,
    scores: Annotated[Path | None, typer.Option(help=".npy file that gets the predictions in row order.")] = None,
    split: Annotated[str | None, typer.Option(help="Split to score; default: the config's eval.final_split.")] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Score a split with a checkpoint's weights; also under mpirun."""
    settle_threads()
    from pipeline import evaluate as engine

    code, result = engine.main(
        str(config),
        overrides=overrides or (),
        checkpoint=str(checkpoint),
        report=str(report) if report else None,
        scores=str(scores) if scores else None,
        split=split,
        debug=debugging(),
    )
    if code:
        raise typer.Exit(code)
    if result:
        print_report(result, report, as_json=as_json)


@checkpoint_app.command("export")
def checkpoint_export(
    checkpoint: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a checkpoint.")],
    weights: Annotated[
        Path, typer.Argument(metavar="FILE", help=".npz file to write; with --table .npy or .parquet (key, vector).")
    ],
    table: Annotated[str | None, typer.Option(metavar="NAME", help="Write this table alone.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint's weights, without the optimisers' state, as one file."""
    settle_threads()
    if table is not None:
        from pipeline.weights_table import export_table

        _print_table(export_table(checkpoint, weights, table), checkpoint, table, as_json=as_json)
        return
    from pipeline.weights import export_weights

    _print_weights("Weights", export_weights(checkpoint, weights), weights, as_json=as_json)


@checkpoint_app.command("import")
def checkpoint_import(
    weights: Annotated[
        Path, typer.Argument(metavar="FILE", help=".npz file, names as bottom.0.weight; or rows of one --table.")
    ],
    checkpoint: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the checkpoint to write.")],
    table: Annotated[
        str | None, typer.Option(metavar="NAME", help="FILE is .npy or .parquet (key, vector) of this table.")
    ] = None,
    into: Annotated[
        Path | None, typer.Option(metavar="DIR", help="With --table: the checkpoint that has all other weights.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a checkpoint of a file's weights, to be evaluated or started from."""
    if (table is None) != (into is None):
        raise ConfigError("--table and --into: go together; name the table, and the checkpoint with all other weights")
    settle_threads()
    if table is not None and into is not None:
        from pipeline.weights_table import import_table

        _print_table(import_table(weights, checkpoint, table, into=into), checkpoint, table, as_json=as_json)
        return
    from pipeline.weights import import_weights

    _print_weights("Checkpoint", import_weights(weights, checkpoint), weights, as_json=as_json)


def _print_table(path: Path, checkpoint: Path, table: str, *, as_json: bool) -> None:
    from pipeline.checkpoint import open_checkpoint

    rows, dim = open_checkpoint(checkpoint).entry(f"table.{table}").shape
    print_fields("Table", {"path": str(path.resolve()), "table": table, "rows": rows, "dim": dim}, as_json=as_json)


def _print_weights(title: str, path: Path, weights: Path, *, as_json: bool) -> None:
    from pipeline.weights import load_weights

    with load_weights(weights) as opened:
        parameters = sum(math.prod(shape) for shape in opened.shapes.values())
        fields = {"path": str(path.resolve()), "tensors": len(opened), "parameters": parameters}
    print_fields(title, fields, as_json=as_json)


@config_app.command("schema")
def config_schema(as_json: AsJson = False) -> None:  # noqa: ARG001  it is JSON either way
    """Print the JSON Schema of a run's config."""
    from dlrm.config import json_schema

    print_json(json_schema())


@config_app.command("show")
def config_show(config: ConfigFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a config and print it with every field written out."""
    import yaml

    from dlrm.config import load_run_config, to_values

    values = to_values(load_run_config(config, overrides or ()))
    if as_json:
        print_json(values)
    else:
        typer.echo(yaml.safe_dump(values, sort_keys=False), nl=False)


@config_app.command("example")
def config_example(
    name: Annotated[str | None, typer.Argument(help="Such as movielens; left out: list the names.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print a ready config, or list them."""
    if name is None:
        rows = [{"name": stem, "about": _first_comment(path)} for stem, path in ready_configs().items()]
        print_rows("Ready configs", rows, as_json=as_json)
        return
    text = ready_config(name).read_text(encoding="utf-8")
    if as_json:
        import yaml

        print_json(yaml.safe_load(text))
    else:
        typer.echo(text, nl=False)


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


prepare_app.command("criteo", cls=ManyValues)(prepare)
data_app.command("check")(data_check)
app.command(cls=ManyValues, rich_help_panel="Data")(encode)
app.add_typer(prepare_app, name="prepare", rich_help_panel="Data")
app.add_typer(data_app, name="data", rich_help_panel="Data")
app.add_typer(env_app, name="env", rich_help_panel="Data")
app.command(rich_help_panel="Data")(synth)
app.command(rich_help_panel="Data")(convert)
app.command(rich_help_panel="Engine")(plan)
app.add_typer(checkpoint_app, name="checkpoint", rich_help_panel="Engine")
app.add_typer(config_app, name="config", rich_help_panel="Engine")
