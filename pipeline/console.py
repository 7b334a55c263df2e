"""What commands print: results as a table or as JSON, and the progress of a run as a bar or as plain lines."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Self

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from pipeline.progress import read_records
from pipeline.threads import launched_ranks

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
"""Of every command that prints a result."""

_PLAIN_LINE_EVERY_S = 5.0
_WIDEST = 10_000
_ENDS = {
    "target": "the target metric was reached at step {step}",
    "early_stop": "ended at step {step}, since the metric no longer improved",
    "stopped": "stopped at step {step} after a checkpoint; started again, the run goes on from there",
}


def terminal(*, errors: bool = False) -> Console:
    """Standard output, or standard error; text is printed as it is, since names and errors hold brackets too.

    Open MPI gives its ranks a terminal of their own, wherever its output goes: they print plainly.
    """
    plain = False if launched_ranks() > 1 else None
    return Console(stderr=errors, markup=False, highlight=False, force_terminal=plain)


def print_json(value: Any) -> None:
    """Print one JSON document on standard output; non-finite numbers become ``null``."""
    sys.stdout.write(json.dumps(_finite(value), indent=2, ensure_ascii=False) + "\n")


def print_fields(title: str, fields: Mapping[str, Any], *, as_json: bool) -> None:
    """Print one result: a table of two columns, or a JSON object."""
    if as_json:
        print_json(fields)
        return
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in fields.items():
        table.add_row(name.replace("_", " "), text_of(value))
    terminal().print(table)


def print_rows(title: str, rows: Sequence[Mapping[str, Any]], *, as_json: bool, folds: bool = True) -> None:
    """Print a list of like results: a table with a column per field of the first, or a JSON array.

    Args:
        title: above the table.
        rows: all with the same fields.
        as_json: print the array.
        folds: fit the table into the terminal; ``False``: numbers stay whole, whatever its width.
    """
    if as_json:
        print_json(list(rows))
        return
    if not rows:
        terminal().print(title)
        return
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(text_of(value) for value in row.values()))
    console = terminal()
    if not folds:
        unbounded = console.options.update(max_width=_WIDEST)
        console.width = max(console.width, console.measure(table, options=unbounded).maximum)
    console.print(table)


def text_of(value: Any) -> str:
    """A value for people: digits grouped, floats short, lists in one line."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.5g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {text_of(item)}" for name, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(text_of(item) for item in value)
    return str(value)


class RunProgress:
    """Shows the progress records of one run: a live bar on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console | None = None) -> None:
        """Write to ``console``, standard error by default."""
        self.console = console or terminal(errors=True)
        self._bar = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(),
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._task: TaskID | None = None
        self._name = "train"
        self._steps = 0
        self._live = self.console.is_terminal
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        """Start drawing where there is a terminal."""
        if self._live:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the last state on the screen."""
        if self._live:
            self._bar.stop()

    def feed(self, record: Mapping[str, Any]) -> None:
        """Show one record of ``pipeline.progress``."""
        match record.get("type"):
            case "start":
                self._start(record)
            case "step":
                self._step(record)
            case "eval":
                metrics = record.get("metrics") or {}
                self._say(
                    f"evaluation at step {record.get('step', 0):,} on {record.get('split')}: "
                    f"AUC {text_of(metrics.get('auc'))}, log loss {text_of(metrics.get('log_loss'))}"
                )
            case "end":
                self._end(record)
            case _:
                pass

    def _start(self, record: Mapping[str, Any]) -> None:
        self._name = str(record.get("run", "train"))
        self._steps = int(record.get("steps") or 0)
        ranks, threads = record.get("ranks"), record.get("threads")
        device = record.get("device", "CPU")
        where = f"threads each {threads}" if device == "CPU" else f"{record.get('precision')} on {device}"
        self._say(f"{self._name}: {self._steps:,} steps, ranks {ranks}, {where}")
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(
            self._name, total=self._steps or None, completed=int(record.get("step") or 0), figures=""
        )

    def _end(self, record: Mapping[str, Any]) -> None:
        step = int(record.get("step") or 0)
        if self._task is not None:
            self._bar.update(self._task, completed=step)
        if words := _ENDS.get(str(record.get("reason"))):
            self._say(f"{self._name}: {words.format(step=f'{step:,}')}")

    def _step(self, record: Mapping[str, Any]) -> None:
        step = int(record.get("step") or 0)
        figures = f"loss {text_of(record.get('loss'))}, {text_of(record.get('samples_per_s'))} samples/s"
        if self._task is not None:
            self._bar.update(self._task, completed=step, figures=figures)
        if not self._live and time.monotonic() - self._last_line >= _PLAIN_LINE_EVERY_S:
            self._last_line = time.monotonic()
            self._say(f"{self._name}: step {step:,}/{self._steps:,}, {figures}")

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def show_progress(directory: Path) -> Iterator[None]:
    """Show what is appended to ``directory/progress.jsonl`` while the body runs, from a thread of its own."""
    path = directory / "progress.jsonl"
    offset = path.stat().st_size if path.exists() else 0
    ended = threading.Event()

    def follow(view: RunProgress) -> None:
        at = offset
        while True:
            last = ended.is_set()
            for record, behind in read_records(path, at):
                at = behind
                view.feed(record)
            if last:
                return
            ended.wait(0.2)

    with RunProgress() as view:
        thread = threading.Thread(target=follow, args=(view,), name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(timeout=5)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
