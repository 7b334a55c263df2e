"""The engine's verbs about Criteo's rows: prepare and encode."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dlrm.errors import ConfigError
from pipeline.cli_data import Out, Overwrite, phases, print_dataset
from pipeline.console import AsJson, terminal
from pipeline.threads import launched_ranks, settle_threads

if TYPE_CHECKING:
    from embedding.comm import Comm

_LINE_EVERY_S = 10.0

MemoryLimit = Annotated[
    str | None,
    typer.Option(help="Memory of all ranks on a machine together, such as 2GiB; default: half of what is free."),
]


Engine = Annotated[
    Literal["crosslane", "nvtabular"],
    typer.Option(help="Crosslane's own, or NVTabular's workflow in the environment of `crosslane env nvtabular`."),
]
DaskScheduler = Annotated[
    str | None, typer.Option(metavar="ADDRESS", help="nvtabular: a running Dask scheduler, tcp://host:8786.")
]


@contextmanager
def long_phases() -> Iterator[Callable[[str, int, int], None]]:
    """As ``phases``; where there is no terminal, a line every ten seconds with the time that is left."""
    if terminal(errors=True).is_terminal:
        with phases() as on_progress:
            yield on_progress
        return
    started: dict[str, tuple[float, int]] = {}
    told = time.monotonic()

    def on_line(phase: str, done: int, total: int) -> None:
        nonlocal told
        now = time.monotonic()
        since, first = started.setdefault(phase, (now, done))
        if now - told < _LINE_EVERY_S or done <= first:
            return
        told = now
        left = (now - since) / (done - first) * (total - done)
        print(f"{phase}: {100 * done / max(total, 1):.1f} %, {left:.0f} s left", file=sys.stderr, flush=True)

    yield on_line


def prepare(
    train: Annotated[list[Path], typer.Option(metavar="FILE...", help="Training rows, in time order; plain or .gz.")],
    out: Out,
    test: Annotated[list[Path] | None, typer.Option(metavar="FILE...", help="Rows of the split 'test'.")] = None,
    validation: Annotated[list[Path] | None, typer.Option(metavar="FILE...", help="Rows of 'validation'.")] = None,
    validation_fraction: Annotated[
        float, typer.Option(help="Or: this last part of the training rows becomes 'validation'.")
    ] = 0.0,
    last_day: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Or: first half is 'test', second half 'validation'.")
    ] = None,
    frequency_threshold: Annotated[
        int, typer.Option(help="Categories seen less often in the counted rows share number 0.")
    ] = 2,
    count: Annotated[
        Literal["train", "all"],
        typer.Option(help="Rows whose categories are counted: of 'train', or of all splits (as in MLPerf's counts)."),
    ] = "train",
    cap_modulo: Annotated[
        int | None, typer.Option(help="Take categories modulo this first (MLPerf: 40000000).")
    ] = None,
    cap_rows: Annotated[int | None, typer.Option(help="Rows of a table at most: the most frequent stay.")] = None,
    dense_transform: Annotated[
        Literal["clip_log1p", "add2_log1p", "add3_log"], typer.Option(help="What becomes of integers.")
    ] = "clip_log1p",
    missing_integer: Annotated[
        int | None, typer.Option(help="What an empty integer counts as; default: as the transform's convention has it.")
    ] = None,
    missing_category: Annotated[
        Literal["own", "zero", "rare"], typer.Option(help="Empty category: of its own, value 00000000, or number 0.")
    ] = "own",
    memory_limit: MemoryLimit = None,
    engine: Engine = "crosslane",
    dask_scheduler: DaskScheduler = None,
    name: Annotated[str, typer.Option(help="Name of the data set.")] = "criteo",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Criteo's rows: label, 13 integers, 26 hexadecimal categories; also under mpirun, and again after a kill."""
    python = _nvtabular(memory_limit) if engine == "nvtabular" else None
    if dask_scheduler and python is None:
        raise ConfigError(f"--dask-scheduler {dask_scheduler}: goes with --engine nvtabular; mpirun spreads the other")
    rules = {
        "frequency_threshold": frequency_threshold,
        "count": count,
        "cap_modulo": cap_modulo,
        "cap_rows": cap_rows,
        "dense_transform": dense_transform,
        "missing_integer": missing_integer,
        "missing_category": missing_category,
    }
    given = {
        "train": train,
        "validation": validation or [],
        "test": test or [],
        "last_day": last_day,
        "validation_fraction": validation_fraction,
    }
    common = {"name": name, "overwrite": overwrite}
    settle_threads()
    if python is not None:
        _prepare_with_nvtabular(given, rules, out, python=python, scheduler=dask_scheduler, **common)
        print_dataset(out, as_json=as_json)
        return

    def work(comm: Comm | None) -> None:
        _prepare(given, rules, out, memory_limit, comm, **common)
        if comm is None or comm.rank == 0:
            print_dataset(out, as_json=as_json)

    _on_ranks(work)


def _prepare(
    files: dict[str, Any],
    options: dict[str, Any],
    out: Path,
    memory_limit: str | None,
    comm: Comm | None,
    **common: Any,
) -> None:
    """Crosslane's own engine, on this rank."""
    from pipeline.etl.criteo import CriteoInputs, prepare_criteo
    from pipeline.etl.memory import parse_size
    from pipeline.etl.rules import make_rules

    rules, inputs = make_rules(**options), CriteoInputs(**files)
    first = comm is None or comm.rank == 0
    with long_phases() as progress:
        prepare_criteo(
            inputs,
            out,
            rules=rules,
            memory_limit=parse_size("--memory-limit", memory_limit),
            comm=comm,
            progress=progress if first else None,
            **common,
        )


def _prepare_with_nvtabular(files: dict[str, Any], options: dict[str, Any], out: Path, **common: Any) -> None:
    """NVTabular's engine."""
    from pipeline.etl.criteo import CriteoInputs
    from pipeline.etl.criteo_nvtabular import prepare_with_nvtabular
    from pipeline.etl.rules import make_rules

    rules, inputs = make_rules(**options), CriteoInputs(**files)
    with long_phases() as progress:
        prepare_with_nvtabular(inputs, out, rules=rules, progress=progress, **common)


def _nvtabular(memory_limit: str | None) -> Path:
    """NVTabular's interpreter.

    Raises:
        ConfigError: there is none, or something is asked for that this engine cannot do.
    """
    if memory_limit is not None:
        raise ConfigError(
            f"--memory-limit {memory_limit}: --engine nvtabular keeps none; leave it out, or use --engine crosslane"
        )
    if (ranks := launched_ranks()) > 1:
        raise ConfigError(
            f"--engine nvtabular: it is no program of MPI, but mpirun started {ranks} ranks; start it once, with "
            "--dask-scheduler for several machines"
        )
    from pipeline.etl.nvtabular_env import find_environment

    return find_environment()


def encode(
    rows: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Criteo's rows, plain or .gz.")],
    like: Annotated[Path, typer.Option(help="Prepared set whose vocabulary encodes them, or its folder 'encoding'.")],
    out: Out,
    split: Annotated[str, typer.Option(help="Name of the new set's split.")] = "test",
    unlabelled: Annotated[bool, typer.Option("--unlabelled", help="The rows have no label column.")] = False,
    memory_limit: MemoryLimit = None,
    name: Annotated[str, typer.Option(help="Name of the new data set.")] = "criteo",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Encode further Criteo rows as a prepared set's were; also under mpirun, and again after a kill."""
    settle_threads()
    from pipeline.etl.encode_rows import encode_rows
    from pipeline.etl.memory import parse_size

    def work(comm: Comm | None) -> None:
        first = comm is None or comm.rank == 0
        with long_phases() as progress:
            encode_rows(
                rows,
                like,
                out,
                split=split,
                labelled=not unlabelled,
                name=name,
                overwrite=overwrite,
                memory_limit=parse_size("--memory-limit", memory_limit),
                comm=comm,
                progress=progress if first else None,
            )
        if first:
            print_dataset(out, as_json=as_json)

    _on_ranks(work)


def _on_ranks(work: Callable[[Comm | None], None]) -> None:
    """Do the work of this process, or of this rank where mpirun started several.

    Raises:
        typer.Exit: a rank failed.
    """
    if launched_ranks() == 1:
        work(None)
        return
    from pipeline.cli import debugging
    from pipeline.entry import Process, run_process

    def on_rank(process: Process) -> int:
        work(process.comm)
        return 0

    if code := run_process(on_rank, debug=debugging(), stoppable=False):
        raise typer.Exit(code)
