"""The engine's verbs about data: prepare, fetch, adopt, synthesise; NumPy is loaded only when one is called."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from typer.core import TyperCommand

from dlrm.errors import ConfigError
from pipeline.console import AsJson, print_fields, print_rows, terminal
from pipeline.threads import settle_threads

if TYPE_CHECKING:
    from pipeline.manifest import Manifest
    from pipeline.synthetic import SyntheticTable

_TABLE = re.compile(r"(\d+)(?::(\d+\.?\d*|\.\d+)(?::(\d+))?)?")

prepare_app = typer.Typer(help="Turn rows on disk into a prepared data set.")
data_app = typer.Typer(help="Data sets by name, and data that is there already.")

Out = Annotated[Path, typer.Option(help="Folder of the prepared data set.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a data set that is in --out.")]


class ManyValues(TyperCommand):
    """A command whose list options take every value up to the next option: ``--train a.tsv b.tsv --out data``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the option before each further value, as Typer wants it."""
        lists = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        spread: list[str] = []
        current: str | None = None
        for word in args:
            if word.startswith("-"):
                current = word if word in lists else None
            elif current and spread[-1] != current:
                spread.append(current)
            spread.append(word)
        return super().parse_args(ctx, spread)


@contextmanager
def phases() -> Iterator[Callable[[str, int, int], None]]:
    """A progress callback ``(phase, done, total)`` that draws one bar a phase on a terminal, nothing elsewhere."""
    console = terminal(errors=True)
    columns = (
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:

        def on_progress(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=total)
            bar.update(tasks[phase], completed=done, total=total)

        yield on_progress


def print_dataset(directory: Path, *, as_json: bool, **figures: Any) -> None:
    """Print what a prepared data set holds."""
    from pipeline.manifest import read_manifest

    manifest = read_manifest(directory)
    fields: dict[str, Any] = {
        "name": manifest.name,
        "path": str(directory.resolve()),
        "layout": manifest.layout,
        "splits": {name: split.rows for name, split in manifest.splits.items()},
        "dense_columns": len(manifest.dense.names),
        "tables": len(manifest.tables),
        "table_rows": sum(table.rows for table in manifest.tables),
    }
    if manifest.licence and (as_json or "\n" not in manifest.licence):  # whole pages have been shown already
        fields["licence"] = manifest.licence
    print_fields("Prepared data set", {**fields, **figures}, as_json=as_json)


@prepare_app.command("table", cls=ManyValues)
def prepare_table(
    schema: Annotated[Path, typer.Option(metavar="FILE", help="YAML or JSON file that says what the columns are.")],
    out: Out,
    rows: Annotated[
        list[Path] | None,
        typer.Option("--input", metavar="FILE...", help="CSV, Parquet or npz rows that the schema's split divides."),
    ] = None,
    train: Annotated[list[Path] | None, typer.Option(metavar="FILE...", help="Or: rows of 'train',")] = None,
    validation: Annotated[list[Path] | None, typer.Option(metavar="FILE...", help="of 'validation',")] = None,
    test: Annotated[list[Path] | None, typer.Option(metavar="FILE...", help="and of 'test'.")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Any CSV, Parquet or npz table, through a small schema."""
    settle_threads()
    from pipeline.etl.table import prepare_table as prepare

    given = {"input": rows, "train": train, "validation": validation, "test": test}
    inputs = {split: files for split, files in given.items() if files}
    if rows and len(inputs) > 1:
        raise ConfigError("--input: goes without --train, --validation and --test; the schema's split divides its rows")
    if not inputs:
        raise ConfigError("no rows: name files with --input, or with --train, --validation and --test")
    with phases() as progress:
        directory = prepare(schema, inputs, out, overwrite=overwrite, progress=progress)
    print_dataset(directory, as_json=as_json)


@data_app.command("list")
def data_list(as_json: AsJson = False) -> None:
    """List the data sets that can be fetched by name."""
    from pipeline.sources import list_sources

    sources = [asdict(source) for source in list_sources()]
    if not as_json:  # the terms are long; fetching prints them
        sources = [{name: value for name, value in source.items() if name != "licence"} for source in sources]
    print_rows("Data sets", sources, as_json=as_json)


@data_app.command("fetch")
def data_fetch(
    name: Annotated[str, typer.Argument(help="Name of the data set, as `crosslane data list` has it.")],
    out: Annotated[Path | None, typer.Option(help="Prepare it into this folder; left out: only fetch it.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder of fetched sets; default: the user's cache.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random split.")] = 1,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Fetch a data set by name, and prepare it; prints its licence."""
    from pipeline.sources import fetch, list_sources, prepare_source

    folder = fetch(name, cache)
    source = next(source for source in list_sources() if source.name == name)
    terminal(errors=True).print(f"Licence of {source.title}\n{source.licence}\n", soft_wrap=True)
    if out is None:
        fields = {"name": name, "path": str(folder.resolve()), "rows": source.rows, "licence": source.licence}
        print_fields("Fetched data set", fields, as_json=as_json)
        return
    settle_threads()
    with phases() as progress:
        directory = prepare_source(name, out, cache_dir=cache, seed=seed, overwrite=overwrite, progress=progress)
    print_dataset(directory, as_json=as_json)


@data_app.command("adopt", cls=ManyValues)
def data_adopt(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Training rows, in order.")],
    layout: Annotated[Literal["hugectr-raw", "dlrm-bin", "parquet"], typer.Option(help="What the files are.")],
    rows: Annotated[
        str | None,
        typer.Option(metavar="R1,R2,...", help="Rows of each table, in column order; parquet: default as found."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder that gets the manifest; default: that of the first file.")
    ] = None,
    validation: Annotated[list[Path] | None, typer.Option(metavar="FILE...", help="Rows of 'validation'.")] = None,
    test: Annotated[list[Path] | None, typer.Option(metavar="FILE...", help="Rows of 'test'.")] = None,
    dense: Annotated[int, typer.Option(help="Dense columns.")] = 13,
    dense_dtype: Annotated[Literal["int32", "float32"], typer.Option(help="Type of the dense columns.")] = "int32",
    label_dtype: Annotated[Literal["int32", "float32"], typer.Option(help="Type of the label.")] = "int32",
    hotness: Annotated[
        str | None, typer.Option(metavar="H1,H2,...", help="Key columns of each table; default: 1 each.")
    ] = None,
    key_dtype: Annotated[Literal["int32", "int64"], typer.Option(help="Type of the keys.")] = "int32",
    missing_keys: Annotated[bool, typer.Option("--missing-keys", help="-1 (no key) may stand in the rows.")] = False,
    checksums: Annotated[bool, typer.Option("--checksums", help="Read the files whole and note their sums.")] = False,
    name: Annotated[str | None, typer.Option(help="Name of the data set; default: the folder's.")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a manifest over existing Raw or Parquet files; nothing is copied."""
    settle_threads()
    from pipeline.adopt import adopt
    from pipeline.adopt_parquet import adopt_parquet

    every = {"train": files, "validation": validation, "test": test}
    splits = {split: paths for split, paths in every.items() if paths}
    if layout == "parquet":
        directory = adopt_parquet(
            splits,
            out=out or (files[0] if files[0].is_dir() else files[0].parent),
            table_rows=parse_counts("--rows", rows) if rows is not None else None,
            name=name,
            checksums=checksums,
            overwrite=overwrite,
        )
        print_dataset(directory, as_json=as_json)
        return
    if rows is None:
        raise ConfigError(f"--rows: missing; {layout} files do not say how many rows each table has")
    directory = adopt(
        splits,
        layout=layout,
        rows_per_table=parse_counts("--rows", rows),
        out=out or files[0].parent,
        num_dense=dense,
        dense_dtype=dense_dtype,
        label_dtype=label_dtype,
        hotness=parse_counts("--hotness", hotness) if hotness is not None else None,
        key_dtype=key_dtype,
        missing_keys=missing_keys,
        name=name,
        checksums=checksums,
        overwrite=overwrite,
    )
    print_dataset(directory, as_json=as_json)


def parse_counts(option: str, text: str) -> list[int]:
    """Integers separated by commas.

    Raises:
        ConfigError: a part is none.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option}: {text!r} must be integers separated by commas") from None


def synth(
    out: Out,
    rows: Annotated[int, typer.Option(help="Samples in all splits.")],
    tables: Annotated[
        str | None,
        typer.Option(metavar="SPEC,...", help="One ROWS[:EXPONENT[:HOTNESS]] a table, such as 1000:1.1,20:0.9:3."),
    ] = None,
    dense: Annotated[int, typer.Option(help="Dense columns.")] = 13,
    seed: Annotated[int, typer.Option(help="Seed of the teacher and of the rows.")] = 1,
    control: Annotated[bool, typer.Option("--control", help="Permute the categories over the rows.")] = False,
    name: Annotated[str, typer.Option(help="Name of the data set.")] = "synthetic",
    like: Annotated[
        str | None,
        typer.Option(metavar="SHAPE", help="At scale: criteo-terabyte, criteo-terabyte-full or criteo-multihot."),
    ] = None,
    exponent: Annotated[float, typer.Option(help="With --like: power law of all tables.")] = 1.1,
    scale: Annotated[int, typer.Option(help="With --like: tables have so many times fewer rows.")] = 1,
    cap: Annotated[int | None, typer.Option(help="With --like: most rows of a table.")] = None,
    recipe_only: Annotated[
        bool, typer.Option("--recipe-only", help="With --like: no rows on disk; they are made as they are read.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Make Criteo-shaped rows with a planted teacher, whose best possible AUC the manifest tells."""
    settle_threads()
    if like is not None:
        if tables is not None or control or dense != 13:
            raise ConfigError("--like: goes without --tables, --dense and --control, which it settles")
        from pipeline.generated import describe_synthetic

        manifest = describe_synthetic(like, rows=rows, seed=seed, exponents=(exponent,), scale=scale, cap=cap)
        synth_like(out, manifest, recipe_only=recipe_only, overwrite=overwrite, as_json=as_json)
        return
    from pipeline.synthetic import DEFAULT_TABLES, synthesize

    made = synthesize(
        out,
        rows=rows,
        tables=parse_tables(tables) if tables is not None else DEFAULT_TABLES,
        num_dense=dense,
        seed=seed,
        control=control,
        overwrite=overwrite,
        name=name,
    )
    figures: dict[str, Any] = {"seconds": made.seconds, "rows_per_s": made.rows_per_s}
    if made.ceilings is not None:
        figures["ceilings"] = asdict(made.ceilings)
    print_dataset(made.path, as_json=as_json, **figures)


def synth_like(out: Path, manifest: Manifest, *, recipe_only: bool, overwrite: bool, as_json: bool) -> None:
    """Write a set of a known shape, from the generator that also makes rows without a disk."""
    from pipeline.generated import write_recipe, write_synthetic

    if recipe_only:
        print_dataset(write_recipe(out, manifest, overwrite=overwrite), as_json=as_json)
        return
    start = time.perf_counter()
    with phases() as progress:
        directory = write_synthetic(out, manifest, overwrite=overwrite, progress=progress)
    seconds = time.perf_counter() - start
    rows = sum(split.rows for split in manifest.splits.values())
    print_dataset(directory, as_json=as_json, seconds=seconds, rows_per_s=rows / seconds)


def parse_tables(text: str) -> list[SyntheticTable]:
    """Tables from ``ROWS[:EXPONENT[:HOTNESS]]``, separated by commas.

    Raises:
        ConfigError: a part is no number, or there are too many of them.
    """
    from pipeline.synthetic import SyntheticTable

    tables = []
    for spec in text.split(","):
        match = _TABLE.fullmatch(spec.strip())
        if match is None:
            raise ConfigError(f"--tables: {spec!r} must have the form ROWS[:EXPONENT[:HOTNESS]], such as 1000:1.1:3")
        usual = SyntheticTable(rows=int(match[1]))
        exponent = usual.exponent if match[2] is None else float(match[2])
        hotness = usual.hotness if match[3] is None else int(match[3])
        tables.append(SyntheticTable(rows=usual.rows, exponent=exponent, hotness=hotness))
    return tables
