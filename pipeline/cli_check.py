"""The verb ``crosslane data check``; NumPy is loaded only when it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dlrm.errors import ConfigError, FaultyDataError
from pipeline.cli_data import phases
from pipeline.console import AsJson, print_json, print_rows, terminal
from pipeline.threads import settle_threads


def data_check(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a prepared data set.")],
    report: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Folder that gets data_check.html and .json; default: DIR.")
    ] = None,
    no_report: Annotated[bool, typer.Option("--no-report", help="Write no report.")] = False,
    checksums: Annotated[bool, typer.Option("--checksums/--no-checksums", help="Compare the files' sums.")] = True,
    drift_limit: Annotated[float, typer.Option(min=0.0, help="Stability index that is warned of.")] = 0.25,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings count as faults.")] = False,
    memory_limit: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Such as 2GiB; default: half of what is free.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a prepared data set: files, sums, values, drift; a table and a report with pictures."""
    if report is not None and no_report:
        raise ConfigError("--report and --no-report: exclude each other; leave one out")
    settle_threads()
    from pipeline.check.dataset import check_dataset
    from pipeline.check.page import write_check
    from pipeline.etl.memory import parse_size

    with phases() as progress:
        values = check_dataset(
            directory,
            memory_limit=parse_size("--memory-limit", memory_limit),
            checksums=checksums,
            drift_limit=drift_limit,
            progress=progress,
        )
    page = None if no_report else write_check(report or directory, values)[1]
    _print(values, page, as_json=as_json)
    _refuse_faults(values, strict=strict)


def _refuse_faults(values: dict[str, Any], *, strict: bool) -> None:
    """End with an exit code of its own where something is wrong.

    Raises:
        FaultyDataError: a check failed, or (``strict``) warned.
    """
    wrong = [
        check
        for status in ("failed", "warning" if strict else "failed")
        for check in values["checks"]
        if check["status"] == status
    ]
    if wrong:
        names = ", ".join(dict.fromkeys(check["check"] for check in wrong))
        raise FaultyDataError(f"data set {values['path']}: check of {names} failed; {wrong[0]['detail']}")


def _print(values: dict[str, Any], page: Path | None, *, as_json: bool) -> None:
    where = str(page.resolve()) if page else None
    if as_json:
        print_json({**values, "report": where})
        return
    from pipeline.check.page import dense_rows, split_rows, table_rows

    checks = [{"check": one["check"], "result": one["status"], "found": one["detail"]} for one in values["checks"]]
    print_rows(f"Check of {values['path']}", checks, as_json=False)
    for title, rows in (("Splits", split_rows), ("Dense columns", dense_rows), ("Tables", table_rows)):
        if found := rows(values):
            print_rows(title, found, as_json=False, folds=False)
    rate = values["bytes_per_s"] / 1e9
    terminal().print(f"{values['bytes']:,} bytes in {values['seconds']:.1f} s, {rate:.2f} GB/s", soft_wrap=True)
    if where:
        terminal().print(f"report: {where}", soft_wrap=True)
