"""The check of a prepared data set: what was verified, what was found, and the figures of its report.

Shapes: T tables, N dense columns.
"""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dlrm.errors import ConfigError, DataError
from pipeline.check.columns import Faults
from pipeline.check.counters import Counters
from pipeline.check.describe import Describer
from pipeline.check.scan import Scanner, SplitScan
from pipeline.check.stream import RING_BYTES, Stream
from pipeline.formats.record_files import prefers_direct
from pipeline.host_memory import default_memory_limit, held_memory
from pipeline.manifest import MANIFEST_NAME, Manifest, read_manifest
from pipeline.threads import threads_per_rank

Status = Literal["ok", "warning", "failed"]
ProgressCallback = Callable[[str, int, int], None]
"""Called with the phase, bytes done and bytes in all."""

DRIFT_LIMIT = 0.25
_RESERVE = 64 << 20


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was verified.

    Attributes:
        check: what.
        status: ``failed``: training would refuse it, or read something else than was written; ``warning``: it trains,
            but somebody should look.
        detail: a sentence; of a fault the first one, with file, row and byte.
        faults: how many.
    """

    check: str
    status: Status
    detail: str
    faults: int = 0


def check_dataset(
    path: str | Path,
    *,
    memory_limit: int | None = None,
    checksums: bool = True,
    drift_limit: float = DRIFT_LIMIT,
    progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """Check a prepared data set.

    Every file is read once, in chunks, by one thread, hashed by another and counted by as many as there are. Memory:
    two bytes for each row of every table, or less, and about 100 MiB.

    Args:
        path: folder with ``dataset.json``.
        memory_limit: bytes of this process; ``None``: what it holds already and half of what is
            free. Where that is too little, rows of large tables beyond the first 65,536 are counted every second,
            fourth, ...
        checksums: compare sums.
        drift_limit: population stability index from which on a column is warned of.
        progress: called as files are read.

    Returns:
        Plain values: what ``data_check.json`` holds; docs/data.md describes it.

    Raises:
        DataError: there is no manifest, or a file cannot be read to its end.
        ConfigError: the memory limit is too low.
    """
    started, directory = time.perf_counter(), Path(path)
    manifest, finding = _manifest(directory)
    if manifest is None:
        return _values(directory.resolve().name, directory, [finding], started, 0, {})
    if manifest.layout == "synthetic":
        raise DataError(
            f"data set {directory}: layout 'synthetic' has no files to check, since its rows are made as they are "
            "read; write them with `crosslane synth` without --recipe-only"
        )
    reference = "train" if "train" in manifest.splits else next(iter(manifest.splits), None)
    counters = Counters([table.rows for table in manifest.tables], _budget(memory_limit))
    scans, num_bytes = _scan(directory, manifest, counters, reference, checksums, progress)
    figures: dict[str, Any] = {"splits": {}, "dense": [], "tables": []}
    findings = [finding, *_hard_findings(manifest, scans, checksums)]
    if reference is not None:
        describer = Describer(manifest, counters, scans, reference, threads_per_rank())
        figures = describer.figures()
        findings += _soft_findings(manifest, figures, reference, drift_limit)
    return _values(manifest.name, directory, findings, started, num_bytes, figures | {"reference": reference})


def _manifest(directory: Path) -> tuple[Manifest | None, Finding]:
    """The manifest and what is to say about it; none where it is there and wrong."""
    if not (directory / MANIFEST_NAME).is_file():
        read_manifest(directory)  # says what is missing
    try:
        manifest = read_manifest(directory)
    except DataError as error:
        return None, Finding("manifest", "failed", str(error), 1)
    text = (
        f"{manifest.layout} rows, {len(manifest.splits)} splits, {len(manifest.dense.names)} dense columns, "
        f"{len(manifest.tables)} tables of {sum(table.rows for table in manifest.tables):,} rows"
    )
    if not manifest.splits:
        return manifest, Finding("manifest", "warning", f"{text}; without a split there is nothing to train on", 1)
    return manifest, Finding("manifest", "ok", text)


def _budget(memory_limit: int | None) -> int:
    limit = default_memory_limit() if memory_limit is None else memory_limit
    taken = held_memory() + RING_BYTES + _RESERVE
    if limit <= taken:
        raise ConfigError(
            f"--memory-limit: {limit / 2**20:.0f} MiB, but a check needs at least {taken / 2**20 + 1:.0f} MiB"
        )
    return int(limit - taken)


def _scan(
    directory: Path,
    manifest: Manifest,
    counters: Counters,
    reference: str | None,
    checksums: bool,
    progress: ProgressCallback | None,
) -> tuple[dict[str, SplitScan], int]:
    """Read every split, the reference first; the bytes that were read."""
    total = sum(file.bytes for split in manifest.splits.values() for file in split.files)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress("check", done, max(done, total))

    threads = threads_per_rank()
    order = sorted(manifest.splits, key=lambda name: name != reference)
    with Stream(threads, direct=prefers_direct(total), progress=advance) as stream:
        scanner = Scanner(directory, manifest, counters, stream, threads, hashed=checksums)
        scans = {name: scanner.scan(manifest.splits[name], learn=name == reference) for name in order}
    return {name: scans[name] for name in manifest.splits}, done


def _hard_findings(manifest: Manifest, scans: dict[str, SplitScan], checksums: bool) -> list[Finding]:
    """What training would refuse."""
    found = list(scans.values())
    files = sum(len(split.files) for split in manifest.splits.values())
    rows, keys = sum(scan.rows for scan in found), int(sum(scan.totals[:, :3].sum() for scan in found))
    values = rows * len(manifest.dense.names)
    findings = [
        _finding("sizes", [scan.sizes for scan in found], f"{files} files are as long as the manifest says"),
        _finding("labels", [scan.head.label_faults for scan in found], f"{rows:,} are 0 or 1"),
        _finding("dense values", [scan.head.dense_faults for scan in found], f"{values:,} are finite"),
        _finding("keys", [scan.keys for scan in found], f"{keys:,} lie in their tables"),
    ]
    if manifest.weighted:
        findings.append(_finding("weights", [scan.weights for scan in found], "all are finite"))
    if manifest.layout == "jagged":
        findings.append(_finding("offsets", [scan.offsets for scan in found], "all bags follow one another"))
    unsummed = sum(scan.unsummed for scan in found)
    read = files - sum(scan.unread for scan in found)
    text = f"{read} files have the sums of the manifest" + ("" if read == files else "; the others were not read")
    sums = _finding("checksums", [scan.checksums for scan in found], text)
    if not checksums and sums.status == "ok":
        sums = Finding("checksums", "warning", "not compared, as was asked for")
    elif unsummed and sums.status == "ok":
        text = f"{unsummed} of {files} files have none in the manifest; adopt them again with --checksums"
        sums = Finding("checksums", "warning", text, unsummed)
    return [findings[0], sums, *findings[1:]]


def _finding(check: str, faults: list[Faults], good: str) -> Finding:
    count = sum(fault.count for fault in faults)
    if not count:
        return Finding(check, "ok", good)
    firsts = [fault.first for fault in faults if fault.count]
    more = f" (the first of {count:,})" if count > 1 else ""
    return Finding(check, "failed", firsts[0] + more, count)


def _soft_findings(manifest: Manifest, figures: dict[str, Any], reference: str, limit: float) -> list[Finding]:
    """What trains, but not well."""
    one_class = [name for name, split in figures["splits"].items() if split["base_rate"] in (0, 1)]
    findings = [
        Finding("classes", "warning", f"split {one_class[0]!r} has labels of one class only", len(one_class))
        if one_class
        else Finding("classes", "ok", "every split has both labels")
    ]
    if any(table.frequency_ordered for table in manifest.tables):
        wrong = [table for table in figures["tables"] if table["disorder"]]
        text = "counts fit the numbering of every table that is said to be ordered by frequency"
        if wrong:
            earlier, count, later, more = wrong[0]["disorder"]
            text = (
                f"table {wrong[0]['name']!r} is said to be ordered by frequency, but row {later} is looked up {more:,} "
                f"times and row {earlier} before it {count:,}; set frequency_ordered to false"
            )
        findings.append(Finding("frequency order", "warning" if wrong else "ok", text, len(wrong)))
    if len(manifest.splits) > 1:
        drifts = [
            (index, f"{kind} {column['name']!r}", split)
            for kind, columns in (("dense column", figures["dense"]), ("table", figures["tables"]))
            for column in columns
            for split, index in column["drift"].items()
            if index is not None
        ]
        above = [entry for entry in drifts if entry[0] > limit]
        index, name, split = max(drifts, default=(0.0, "", ""))
        text = f"largest index {index:.3f}: {name}, {reference} to {split}" if name else "nothing to compare"
        if above:
            text += f"; {len(above)} lie above {limit:g}"
        findings.append(Finding("drift", "warning" if above else "ok", text, len(above)))
    return findings


def _values(
    name: str, directory: Path, findings: list[Finding], started: float, num_bytes: int, figures: dict[str, Any]
) -> dict[str, Any]:
    seconds = time.perf_counter() - started
    statuses = {finding.status for finding in findings}
    return {
        "name": name,
        "path": str(directory.resolve()),
        "status": next(status for status in ("failed", "warning", "ok") if status in statuses),
        "created": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "seconds": seconds,
        "bytes": num_bytes,
        "bytes_per_s": num_bytes / seconds,
        "checks": [
            {"check": one.check, "status": one.status, "faults": one.faults, "detail": one.detail} for one in findings
        ],
        "reference": None,
        "splits": {},
        "dense": [],
        "tables": [],
        **figures,
    }
