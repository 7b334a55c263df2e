"""JSON-lines progress records: the one thing the engine tells the service (standard library only).

Every line of ``progress.jsonl`` is one object with ``type`` and ``time`` (seconds since the epoch):

========== =====================================================================================
``start``  ``run`` (name), ``ranks`` (that train), ``eval_ranks`` (besides), ``steps`` and
           ``samples`` (planned in all),
           ``step`` (0, or where a resumed run goes on), ``precision``, ``threads`` (per rank),
           ``device`` (rank 0's), ``carrier`` (between GPUs: ``nccl``, ``staged`` or ``none``),
           ``plan`` (``label``, ``nodes``, ``all_to_all``, ``predicted_ms`` of the embedding lane,
           ``parts_ms`` of that),
           ``overlap`` (for ``train`` and ``eval``: ``overlapped``, ``depth``, ``reason``)
``step``   ``step``, ``epoch``, ``samples``, ``samples_per_s`` (since the last record, without a
           process's first step, which may compile; ``null`` if that was the only one), ``loss``
           (mean over the global batch of this step), ``lr``, ``stages_ms`` (mean per step by stage;
           on a GPU of traced steps only), with a dynamic loss scale ``skipped_steps`` (so far), on
           several GPUs ``overflows`` (batches whose lists ran over, and that were run again)
``eval``   ``step``, ``split``, ``seconds``, ``scoring_seconds`` (part of them), ``waited_seconds`` (in
           which training stood still for the metrics), ``samples``,
           ``metrics`` (see ``pipeline.metrics.Metrics``)
``save``   a checkpoint is complete: ``step``, ``path``, ``base`` (of an increment, its name),
           ``stall_s`` (the training stood still), ``write_s`` (rank 0 took to write), ``bytes``
``end``    ``step``, ``reason`` (``finished``, ``target``, ``early_stop``, ``stopped``), ``seconds``
``error``  ``error`` (class), ``message``, ``exit_code``, ``rank``
========== =====================================================================================
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

RecordType = Literal["start", "step", "eval", "save", "end", "error"]


class ProgressWriter:
    """Appends records to one file, each as a whole line at once."""

    def __init__(self, path: Path | None) -> None:
        """Open for appending; ``None`` (every rank but 0) writes nothing."""
        self._file = path.open("a", encoding="utf-8") if path else None
        self._lock = threading.Lock()  # the heartbeat and the writer of checkpoints have threads of their own
        if path and _is_torn(path):  # or the first record would be lost with the torn one
            self._write_line("")

    def write(self, record_type: RecordType, **fields: Any) -> None:
        """Append one record; non-finite numbers become ``null``, as JSON has none."""
        if self._file is None:
            return
        record = {"type": record_type, "time": time.time(), **_finite(fields)}
        self._write_line(json.dumps(record, separators=(",", ":")))

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _write_line(self, text: str) -> None:
        assert self._file is not None
        with self._lock:
            self._file.write(text + "\n")
            self._file.flush()


def read_records(path: Path, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """Complete records from a byte offset on, each with the offset behind it.

    A last line without its line end is still being written and is left for the next call; a file that is
    missing or cannot be opened has no records yet.
    """
    try:
        file = path.open("rb")
    except OSError:  # whoever writes it says why it cannot
        return
    with file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                record = json.loads(line)
            except ValueError:  # torn by a crash in the middle of a write
                continue
            if isinstance(record, dict):
                yield record, offset


def _is_torn(path: Path) -> bool:
    """Whether a crash in the middle of a write left a last line without its end."""
    with path.open("rb") as file:
        if not file.seek(0, os.SEEK_END):
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
