"""The verb ``crosslane convert``; NumPy is loaded only when it is called."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from pipeline.cli_data import parse_counts, phases
from pipeline.console import AsJson, print_json, print_rows, terminal
from pipeline.threads import settle_threads

if TYPE_CHECKING:
    from pipeline.convert import Conversion
    from pipeline.formats.interchange import Loss

Width = Literal["int32", "int64"]
_FORMATS = "raw, jagged, norm, parquet, split-binary, torchrec-npy, facebook-npz, criteo-tsv"


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="File, file list or folder.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Folder that is made.")],
    to: Annotated[str, typer.Option(metavar="FORMAT", help=f"Format to write: {_FORMATS}.")] = "raw",
    from_format: Annotated[
        str | None, typer.Option("--from", metavar="FORMAT", help="Format of SRC; left out: found out.")
    ] = None,
    allow: Annotated[
        list[str] | None, typer.Option(metavar="LOSS", help="Allow a loss, such as fp16-dense; may be repeated.")
    ] = None,
    rows: Annotated[
        str | None, typer.Option(metavar="R1,R2,...", help="Rows of each table; left out: as found in SRC.")
    ] = None,
    source_key_dtype: Annotated[Width | None, typer.Option(help="Norm: width of SRC's keys.")] = None,
    source_offset_keys: Annotated[
        bool | None,
        typer.Option(
            "--source-offset-keys/--no-source-offset-keys", help="Norm: SRC's keys are raised by the tables before."
        ),
    ] = None,
    key_dtype: Annotated[Width | None, typer.Option(help="Raw, jagged, Norm: width of DST's keys.")] = None,
    label_dtype: Annotated[Literal["int32", "float32"], typer.Option(help="Raw: type of DST's label.")] = "int32",
    check_sum: Annotated[bool, typer.Option("--check-sum", help="Norm: frame samples with length and sum.")] = False,
    offset_keys: Annotated[
        bool, typer.Option("--offset-keys/--no-offset-keys", help="Norm: raise DST's keys by the tables before.")
    ] = True,
    rows_per_file: Annotated[int | None, typer.Option(min=1, help="Norm, Parquet: rows of one file.")] = None,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Read DST back and compare.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST if it is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Convert a data set from one format into another; prints counts and sums of both sides."""
    settle_threads()
    from pipeline.convert import convert as run
    from pipeline.formats.interchange import ReadOptions, WriteOptions

    read = ReadOptions(
        table_rows=tuple(parse_counts("--rows", rows)) if rows is not None else None,
        key_dtype=source_key_dtype,
        offset_keys=source_offset_keys,
    )
    write = WriteOptions(
        key_dtype=key_dtype,
        label_dtype=label_dtype,
        check_sum=check_sum,
        offset_keys=offset_keys,
        rows_per_file=rows_per_file,
    )
    with phases() as progress:
        done = run(
            source,
            target,
            to=to,
            from_format=from_format,
            allow=cast("frozenset[Loss]", frozenset(allow or ())),
            read=read,
            write=write,
            overwrite=overwrite,
            verify=verify,
            progress=progress,
        )
    _print(done, target, as_json=as_json)


def _print(done: Conversion, target: Path, *, as_json: bool) -> None:
    if as_json:
        fields: dict[str, Any] = {"path": str(target.resolve()), **asdict(done)}
        print_json(fields)
        return
    rows = [
        {
            "split": split,
            "rows": both.rows,
            f"sum of {done.source_format}": both.source_sum,
            f"sum of {done.target_format}" + (", read back" if done.verified else ", as written"): both.target_sum,
        }
        for split, both in done.splits.items()
    ]
    print_rows(f"{target}: {done.source_format} to {done.target_format}", rows, as_json=False)
    lost = f"lost, as allowed: {', '.join(done.losses)}" if done.losses else "nothing lost"
    terminal().print(f"{lost}; {done.source_bytes:,} bytes became {done.target_bytes:,}", soft_wrap=True)
