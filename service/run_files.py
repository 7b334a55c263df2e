"""What a run leaves on disk, as the service shows it: progress, output, the error that ended it."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.progress import read_records

_MOST_KEPT = 512
_BLOCK_BYTES = 65_536
_ERROR_BYTES = 262_144
_LINE_CHARACTERS = 2_000


class ProgressSummaries:
    """The latest figures of each run; a record is read once, however often they are asked for."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Path, tuple[int, dict[str, Any]]] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, run_directory: Path, start: int = 0) -> dict[str, Any]:
        """Figures of the run's records from byte ``start`` on; empty before the first one."""
        path = run_directory / "progress.jsonl"
        with self._lock:
            offset, figures = self._kept.get(path, (start, {}))
            if offset < start:
                offset, figures = start, {}
            for record, behind in _records(path, offset):
                offset = behind
                figures = {**figures, **_figures(record)}
            self._kept[path] = (offset, figures)
            self._kept.move_to_end(path)
            while len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)
            return figures


def _records(path: Path, offset: int) -> Iterator[tuple[dict[str, Any], int]]:
    """Records as far as they can be read: one job's folder that is a file, or another's, must not hide the others."""
    with contextlib.suppress(OSError):
        yield from read_records(path, offset)


def progress_page(path: Path, offset: int, limit: int) -> tuple[list[dict[str, Any]], int]:
    """Up to ``limit`` records from a byte offset on, and the offset behind them."""
    records = []
    for record, behind in _records(path, offset):
        records.append(record)
        offset = behind
        if len(records) == limit:
            break
    return records, offset


def read_part(path: Path, offset: int, limit: int) -> tuple[bytes, int]:
    """Up to ``limit`` bytes from ``offset`` on, in whole lines where they fit, and the offset behind them."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(limit)
    except FileNotFoundError:
        return b"", offset
    if len(data) == limit and b"\n" in data:
        # A reader that goes on from here must not begin inside a character.
        data = data[: data.rindex(b"\n") + 1]
    return data, offset + len(data)


def read_tail(path: Path, lines: int, most_bytes: int) -> tuple[bytes, int]:
    """The last ``lines`` lines, of at most ``most_bytes``, and the offset behind them."""
    try:
        with path.open("rb") as file:
            size = end = file.seek(0, os.SEEK_END)
            data = b""
            # One line end more than lines, since the last line's own does not separate it from another.
            while end > 0 and size - end < most_bytes and data.count(b"\n") <= lines:
                begin = max(0, end - _BLOCK_BYTES)
                file.seek(begin)
                data = file.read(end - begin) + data
                end = begin
    except FileNotFoundError:
        return b"", 0
    kept = data.splitlines(keepends=True)[-lines:] if lines else []
    return b"".join(kept)[-most_bytes:], size


def own_error(progress: Path, start: int = 0) -> str | None:
    """The message of the last ``error`` record; ``None``: the engine reported none."""
    message = None
    for record, _ in _records(progress, start):
        if record.get("type") == "error":
            message = str(record.get("message") or record.get("error"))
    return message


def last_error_line(output: Path) -> str | None:
    """The line of the output that says best why a run failed.

    The engine's last ``error:`` line; else what mpirun says of a rank that died; else the last line.
    """
    data, _ = read_tail(output, 2_000, _ERROR_BYTES)
    lines = [line.strip() for line in data.decode("utf-8", "replace").splitlines()]
    for line in reversed(lines):
        if line.lower().startswith("error:"):
            return line[len("error:") :].strip()[:_LINE_CHARACTERS]
    died = _death_notice(lines)
    if died is not None:
        return died[:_LINE_CHARACTERS]
    # mpirun frames its messages with dashes and equal signs, which say nothing.
    spoken = [line for line in lines if line.strip("-= ")]
    return spoken[-1][:_LINE_CHARACTERS] if spoken else None


def _death_notice(lines: list[str]) -> str | None:
    """Mpirun's sentence about the rank that died, which it wraps over several lines."""
    for index, line in enumerate(lines):
        if "noticed that process rank" in line or "BAD TERMINATION OF ONE OF YOUR APPLICATION PROCESSES" in line:
            sentence = [line.strip("= ")]
            for further in lines[index + 1 : index + 6]:
                if not further.strip("-= "):
                    break
                sentence.append(further.strip("= "))
            return " ".join(sentence)
    return None


def _figures(record: dict[str, Any]) -> dict[str, Any]:
    """What one record changes in the summary."""
    match record.get("type"):
        case "start":
            return _some(
                record, "step", "steps", "samples", "device", "precision", rename={"samples": "samples_planned"}
            )
        case "step":
            return _some(record, "step", "epoch", "samples", "samples_per_s", "loss", "lr", "skipped_steps")
        case "eval":
            return _some(record, "metrics", "split", rename={"split": "metrics_split"}) | {
                "metrics_step": record.get("step")
            }
        case "end":
            return _some(record, "step", "seconds", "reason", rename={"reason": "end_reason"})
        case _:
            return {}


def _some(record: dict[str, Any], *names: str, rename: dict[str, str] | None = None) -> dict[str, Any]:
    return {(rename or {}).get(name, name): record[name] for name in names if name in record}
