"""The whole command line as one Typer app: the engine's verbs, the jobs' verbs, and the two that join them."""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from dlrm.errors import ConfigError
from pipeline import cli as engine
from pipeline import stop
from pipeline.console import AsJson, print_fields, print_json, show_progress
from pipeline.threads import launched_ranks
from service import job_verbs

EPILOG = (
    "Exit codes: 0 done; 1 unexpected failure; 2 wrong config, option or argument; 3 data; 4 device; "
    "5 communication between ranks; 6 checkpoint; 7 launch, or a rank died; 8 control service; 9 faulty data; "
    "75 stopped on request after a checkpoint (the same command resumes); 130 interrupted."
)

app = typer.Typer(
    help="Train, evaluate and serve the training of DLRM click-through-rate models.",
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"crosslane {importlib.metadata.version('crosslane')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; also CROSSLANE_DEBUG=1.")] = False,
) -> None:
    """Options of every command; ``service.cli.main`` has acted on ``--debug`` already."""


@app.command(rich_help_panel="Start here")
def demo(
    home: Annotated[
        Path | None, typer.Option(help="Folder for the service's store, the data and the run; default: user data.")
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, help="MPI ranks to train on.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Fetch MovieLens, prepare it, train on MPI ranks through the REST service, evaluate, and clean up."""
    from service.demo import run_demo

    run_demo(home=home, ranks=ranks, as_json=as_json)


@app.command(rich_help_panel="Engine")
def train(
    config: engine.ConfigFile,
    overrides: engine.Overrides = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Start this many MPI ranks; left out: this process, or mpirun's ranks.")
    ] = None,
    init: Annotated[Path | None, typer.Option(help="Weights (.npz) to start from.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train, evaluate and report; the same command under mpirun is one of its ranks."""
    if ranks is not None and launched_ranks() > 1:
        raise ConfigError(
            f"--ranks {ranks}: this process is one of {launched_ranks()} ranks of mpirun already; leave --ranks out"
        )
    if ranks is None or ranks == 1:
        engine.train_here(config, overrides or (), init=str(init) if init else None, as_json=as_json)
    else:
        train_on_ranks(config, overrides or [], ranks=ranks, init=init, as_json=as_json)


@app.command(rich_help_panel="Start here")
def doctor(
    require_gpu: Annotated[bool, typer.Option("--require-gpu", help="Exit with 4 where no GPU is visible.")] = False,
    as_json: AsJson = False,
) -> None:
    """Look at driver, GPUs, CUDA packages and MPI; say what to do about each problem."""
    from service.doctor import as_fields, examine, exit_code, to_values

    checks = examine()
    if as_json:
        print_json({"checks": to_values(checks), "exit_code": exit_code(checks, require_gpu=require_gpu)})
    else:
        print_fields("What training can use here", as_fields(checks), as_json=False)
    if code := exit_code(checks, require_gpu=require_gpu):
        raise typer.Exit(code)


def train_on_ranks(config: Path, overrides: list[str], *, ranks: int, init: Path | None, as_json: bool) -> None:
    """Start the ranks under mpirun, show their progress, print what they leave.

    Raises:
        typer.Exit: the run ended with an exit code other than 0.
    """
    from dlrm.config import load_run_config, to_values
    from service.launchers.local import run_and_wait

    given = [*overrides, f"run.init={init}"] if init else overrides
    run = load_run_config(config, given)
    directory = Path(run.run.directory)
    with tempfile.TemporaryDirectory(prefix="crosslane-") as folder:
        resolved = Path(folder) / "config.json"
        resolved.write_text(json.dumps(to_values(run)), encoding="utf-8")
        if stop.requested():  # from here on the launcher listens
            raise typer.Abort
        with show_progress(directory):
            code = run_and_wait(resolved, ranks, directory, debug=engine.debugging())
    if code:
        raise typer.Exit(code)
    engine.print_run(directory, as_json=as_json)


app.add_typer(engine.app)
app.add_typer(job_verbs.app)
