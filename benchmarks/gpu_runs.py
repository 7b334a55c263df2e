"""Processes of the GPU benchmarks: the product's trainer, watched through its progress records.

Used by ``gpu_train.py`` and ``time_to_auc.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.generated import describe_synthetic, write_synthetic
from pipeline.progress import read_records
from service.launchers.mpi import engine_command, engine_environment
from service.launchers.session import end_session

_TRACEBACK_LINES = 40

LEFT_OUT_WINDOWS = 2
"""Windows at the start of a run of ours that are not counted: capture, tuning, a cold clock."""


@contextmanager
def running(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A program in a session of its own, of which nothing is left afterwards."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(command), env=dict(environment), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            end_session(process.pid, patience=0.0)


def last_line(log: Path) -> str:
    """What a failed program said last, preferring its error line: mpirun has more to say behind it."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("error: ")]
    errors = own or [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["it said nothing"])[-1][:300]


def show_fault(log: Path) -> None:
    """Print the first traceback of a program that failed."""
    lines = log.read_text(errors="replace").splitlines()
    start = next((number for number, line in enumerate(lines) if line.startswith("Traceback")), None)
    if start is not None:
        print(*lines[start : start + _TRACEBACK_LINES], sep="\n", file=sys.stderr)


def stages_of(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Milliseconds of each stage: medians over the windows that count.

    On a GPU only the steps of a trace are timed stage by stage, and their window alone tells, wherever it stands.
    """
    timed = [record["stages_ms"] for record in records if record.get("stages_ms")]
    counted = timed[LEFT_OUT_WINDOWS:] or timed
    return {stage: statistics.median(each[stage] for each in counted) for stage in (counted[0] if counted else {})}


class OwnRuns:
    """Runs the product's trainer and reads its progress; the trainer is killed once enough is known.

    Killed and not asked to stop, since a stop writes a checkpoint of 12 GB.
    """

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        """Nothing is started yet."""
        self.options, self.folder = options, folder
        self.raw: Path | None = None
        self._runs = 0

    def synthetic(self, exponent: float, *, cap: bool = True, like: str = "", rows: int = 0) -> str:
        """The ``data.path`` of rows that are made on the device; shape and number are the options' where not given."""
        limit = f"&cap={self.options.cap}" if cap else ""
        shape, count = like or self.options.like, rows or self.options.rows
        return f"synthetic:{shape}?rows={count}&seed=1&exponent={exponent:g}{limit}"

    def raw_files(self) -> Path:
        """A prepared set of Raw files, written once, so that the page cache holds it."""
        if self.raw is None:
            start = time.perf_counter()
            manifest = describe_synthetic(
                self.options.like, rows=self.options.raw_rows, exponents=(1.1,), cap=self.options.cap
            )
            self.raw = write_synthetic(self.folder / "raw", manifest)
            print(f"  wrote {self.options.raw_rows:,} rows in {time.perf_counter() - start:.1f} s", file=sys.stderr)
        return self.raw

    def config(self, data: Mapping[str, Any], batch: int, **sections: Any) -> dict[str, Any]:
        """A run's config: the shape, SGD, a progress record every ``record_rows`` rows."""
        every = max(5, round(self.options.record_rows / batch))
        values: dict[str, Any] = {
            "name": "gpu_train",
            "device": self.options.device,
            "precision": self.options.precision,
            "model": self.options.model,
            "optimizer": {"kind": "sgd", "lr": 0.1},
            "data": {"batch_size": batch, "drop_last": True, **data},
            "train": {"epochs": None, "max_steps": 100_000_000, "progress_every": every},
        }
        if self.options.precision == "fp16":
            values["loss_scale"] = 1024
        for name, section in sections.items():
            values[name] = values.get(name, {}) | section if isinstance(section, dict) else section
        return values

    def records(
        self, config: Mapping[str, Any], wanted: str, count: int, *, ranks: int = 1
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The first ``count`` records of a type, and how the run began.

        Raises:
            RuntimeError: the run ended or took too long before; with what it said last.
        """
        self._runs += 1
        directory = self.folder / f"run{self._runs}"
        directory.mkdir()
        file = directory / "config.json"  # JSON is YAML
        file.write_text(json.dumps({**config, "run": {"directory": str(directory / "out")}}))
        progress, log = directory / "out" / "progress.jsonl", directory / "log"
        start = time.perf_counter()
        command = engine_command(file, ranks, debug=True)
        with running(command, engine_environment(os.environ), log) as process:
            ended = False
            while True:
                all_records = [record for record, _ in read_records(progress)]
                found = [record for record in all_records if record["type"] == wanted]
                if len(found) >= count:
                    break
                if errors := [record["message"] for record in all_records if record["type"] == "error"]:
                    show_fault(log)
                    raise RuntimeError(errors[0])
                if ended:
                    show_fault(log)
                    raise RuntimeError(f"ended with {process.returncode}: {last_line(log)}")
                if time.perf_counter() - start > self.options.timeout:
                    raise RuntimeError(f"{len(found)} of {count} records in {self.options.timeout} s; {last_line(log)}")
                ended = process.poll() is not None  # its last records are read once more
                time.sleep(0.1)
        seconds = {"seconds": time.perf_counter() - start}
        first = next(record for record in all_records if record["type"] == "start")
        about = {name: first.get(name) for name in ("overlap", "precision", "device", "plan")}
        return found[:count], {**seconds, **about, "stages_ms": stages_of(all_records)}

    def train(self, config: Mapping[str, Any], *, ranks: int = 1) -> dict[str, Any]:
        """Median rate over the windows of a run."""
        records, details = self.records(config, "step", LEFT_OUT_WINDOWS + self.options.windows, ranks=ranks)
        counted = [record["samples_per_s"] for record in records[LEFT_OUT_WINDOWS:] if record["samples_per_s"]]
        details["loss"] = [records[0]["loss"], records[-1]["loss"]]
        return {"samples_per_s": statistics.median(counted), "windows": counted, "details": details}

    def evaluate(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Median rate of the forward passes; the first, which reads the rows and captures, is not counted."""
        records, details = self.records(config, "eval", 1 + self.options.evaluations)
        counted = [record["samples"] / (record["seconds"] - record["scoring_seconds"]) for record in records[1:]]
        details["samples"] = records[0]["samples"]
        details["scoring_s"] = statistics.median(record["scoring_seconds"] for record in records[1:])
        details["auc"] = records[-1]["metrics"]["auc"]
        return {"samples_per_s": statistics.median(counted), "windows": counted, "details": details}
