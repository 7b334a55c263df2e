"""How fast the loader hands over Criteo-shaped rows, beside what copying memory and reading files allow at all.

    python benchmarks/loader.py [--gib 2] [--batch 65536] [--readers 2] [--repetitions 5] [--folder DIR] [--only WORD]
        [--json FILE]

Cold: the files are dropped from the page cache before each run, outside the time; before all others they are read into
it. Parquet: the first 2^20 of the same rows, snappy, row groups of 2^18, opened anew for each run. Every line: best and
median of the repetitions in GB/s of Raw rows and rows/s, and the CPU time it took as a share of one core.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from pipeline.threads import settle_threads  # noqa: E402

settle_threads()

import numpy as np  # noqa: E402
import polars as pl  # noqa: E402

from dlrm.device import HostDevice  # noqa: E402
from pipeline.adopt_parquet import adopt_parquet  # noqa: E402
from pipeline.dataset import Split, load_dataset  # noqa: E402
from pipeline.formats.record_files import PAGE, page_aligned  # noqa: E402
from pipeline.loader import Loader  # noqa: E402
from pipeline.manifest import DenseInfo, FileInfo, Manifest, SplitInfo, TableInfo, write_manifest  # noqa: E402
from pipeline.record_loader import RecordLoader  # noqa: E402

WORDS = 40
TABLE_ROWS = 1000
PREFETCH = 4


def write_rows(folder: Path, rows: int) -> Split:
    """Rows of Criteo's shape (160 bytes) in two files, whose content any reader accepts."""
    rng = np.random.default_rng(1)
    block = np.empty((1 << 16, WORDS), np.int32)
    block[:, 0] = rng.integers(0, 2, len(block))
    block[:, 1:14] = rng.normal(size=(len(block), 13)).astype(np.float32).view(np.int32)
    block[:, 14:] = rng.integers(0, TABLE_ROWS, (len(block), 26))
    files = []
    for name, count in (("a.bin", rows // 2), ("b.bin", rows - rows // 2)):
        with (folder / name).open("wb") as file:
            for at in range(0, count, len(block)):
                file.write(block[: min(len(block), count - at)].tobytes())
        files.append(FileInfo(path=name, rows=count, bytes=count * WORDS * 4))
    write_manifest(
        folder,
        Manifest(
            name="loader benchmark",
            layout="raw",
            dense=DenseInfo(names=tuple(f"I{n}" for n in range(13))),
            tables=tuple(TableInfo(name=f"C{t}", rows=TABLE_ROWS) for t in range(26)),
            splits={"train": SplitInfo(rows=rows, files=tuple(files))},
        ),
    )
    return load_dataset(folder).split("train")


def write_parquet(split: Split, folder: Path, rows: int) -> Path:
    """The first rows of a split as a Parquet file."""
    folder.mkdir()
    batch = split.read(slice(0, rows))
    keys = batch.keys.keys.reshape(26, -1)
    columns = {"label": batch.labels} | {f"I{n}": np.ascontiguousarray(batch.dense[:, n]) for n in range(13)}
    columns |= {f"C{t}": keys[t].astype(np.int64) for t in range(26)}
    pl.DataFrame(columns).write_parquet(folder / "0.parquet", compression="snappy", row_group_size=1 << 18)
    return adopt_parquet({"train": [folder]}, out=folder, table_rows=[TABLE_ROWS] * 26)


def drop(split: Split, folder: Path) -> None:
    """Have the system forget the files' pages, which it does only where nobody has them mapped."""
    split.release(0, split.rows)
    for name in ("a.bin", "b.bin"):
        descriptor = os.open(folder / name, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def fetch(folder: Path) -> None:
    """Have the files in the page cache, which a cold line before may have emptied."""
    for name in ("a.bin", "b.bin"):
        with (folder / name).open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def in_threads(work: Callable[[int], None], threads: int) -> None:
    """Run ``work(number)`` on so many threads at once."""
    started = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()


def ring(size: int, threads: int) -> list[np.ndarray[Any, Any]]:
    """Buffers as the loader has them."""
    return [page_aligned(np.zeros(size + PAGE, np.uint8), size) for _ in range(PREFETCH + 1 + threads)]


def copying(split: Split, batch: int, readers: int) -> Callable[[], int]:
    """Memory to memory: a source that no cache holds, into the ring."""
    size = batch * WORDS * 4
    source = np.ones(min(split.rows * WORDS * 4, 1 << 30) // size * size, np.uint8)
    buffers = ring(size, readers)

    def run() -> int:
        def work(number: int) -> None:
            for turn in range(number, len(source) // size, readers):
                np.copyto(buffers[turn % len(buffers)], source[turn * size : (turn + 1) * size])

        in_threads(work, readers)
        return len(source)

    return run


def preading(folder: Path, batch: int, readers: int) -> Callable[[], int]:
    """The file into the ring and nothing else."""
    size = batch * WORDS * 4
    buffers = ring(size, readers)
    path = folder / "a.bin"
    turns = path.stat().st_size // size

    def run() -> int:
        def work(number: int) -> None:
            descriptor = os.open(path, os.O_RDONLY)
            for turn in range(number, turns, readers):
                os.preadv(descriptor, [buffers[turn % len(buffers)].data], turn * size)
            os.close(descriptor)

        in_threads(work, readers)
        return turns * size

    return run


def loading(source: Split | Path, batch: int, readers: int, *, records: bool, **options: Any) -> Callable[[], int]:
    """One epoch through a loader."""
    arguments: dict[str, Any] = {
        "batch_size": batch, "rank": 0, "ranks": 1, "seed": 1, "shuffle": False, "window": 1 << 22, "drop_last": False,
        "prefetch": PREFETCH, "readers": readers, "epochs": 1, **options,
    }  # fmt: skip

    def run() -> int:
        rows = 0
        split = load_dataset(source).split("train") if isinstance(source, Path) else source
        made = RecordLoader(split, device=HostDevice(), **arguments) if records else Loader(split, **arguments)
        with made as loader:
            for loaded in loader:
                rows += loaded.global_rows
        assert rows == split.rows
        return rows * WORDS * 4

    return run


def measure(
    runs: dict[str, Callable[[], int]], repetitions: int, before: dict[str, Callable[[], None]]
) -> dict[str, dict[str, float]]:
    """Take turns, so that a busy minute of the machine meets all; the first round is thrown away."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    shares: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(repetitions + 1):
        for name, run in runs.items():
            before.get(name, lambda: None)()
            cpu, start = time.process_time(), time.perf_counter()
            size = run()
            seconds = time.perf_counter() - start
            if repetition:
                rates[name].append(size / seconds / 1e9)
                shares[name].append((time.process_time() - cpu) / seconds)
    return {
        name: {
            "best": max(rates[name]),
            "median": statistics.median(rates[name]),
            "cpu": statistics.median(shares[name]),
        }
        for name in runs
    }


def main() -> None:
    """Write the rows, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--batch", type=int, default=65_536)
    parser.add_argument("--readers", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the rows are written; default: the system's temporary one")
    parser.add_argument("--only", help="lines whose name has this word, beside the first")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        split = write_rows(folder, int(given.gib * 2**30) // (WORDS * 4))
        usual = (split, given.batch, given.readers)
        of_parquet = (write_parquet(split, folder / "parquet", min(split.rows, 1 << 20)), *usual[1:])
        made = load_dataset("synthetic:criteo-terabyte?rows=1100000").split("train")
        runs = {
            "copy, memory to memory": copying(*usual),
            "preadv alone": preading(folder, given.batch, given.readers),
            "records, file order": loading(*usual, records=True),
            "records, blocks of 1,024 shuffled": loading(*usual, records=True, shuffle=True, block=1024),
            "records, single rows shuffled": loading(*usual, records=True, shuffle=True),
            "records, cold, page cache": loading(*usual, records=True, direct=False),
            "records, cold, O_DIRECT": loading(*usual, records=True, direct=True),
            "decoded, file order": loading(*usual, records=False),
            "decoded, single rows shuffled": loading(*usual, records=False, shuffle=True),
            "Parquet, decoded, file order": loading(*of_parquet, records=False),
            "Parquet, decoded, shuffled": loading(*of_parquet, records=False, shuffle=True),
            "synthetic records, made as read": loading(made, *usual[1:], records=True),
        }
        print(f"{split.rows:,} rows, {given.gib:g} GiB, batch {given.batch:,}, {given.readers} readers, "
              f"load {os.getloadavg()[0]:.2f}")  # fmt: skip
        runs = {
            name: run
            for name, run in runs.items()
            if given.only is None or given.only in name or name.startswith("copy")
        }
        before = {name: partial(drop, split, folder) if "cold" in name else partial(fetch, folder) for name in runs}
        figures = measure(runs, given.repetitions, before)
    print(f"{'':36}{'best GB/s':>10}{'median':>8}{'M rows/s':>10}{'CPU':>7}{'of copy':>9}")
    limit = figures["copy, memory to memory"]["median"]
    for name, figure in figures.items():
        rows = figure["median"] / (WORDS * 4) * 1e3
        print(f"{name:36}{figure['best']:10.2f}{figure['median']:8.2f}{rows:10.1f}{figure['cpu']:7.0%}"
              f"{figure['median'] / limit:9.2f}")  # fmt: skip
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
