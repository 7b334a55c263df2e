"""Synthetic rows to the disk, beside what the disk takes: as many bytes out of memory, by the same process and run.

    python benchmarks/synth.py --folder DIR --rows 20000000 --repetitions 3

Disk: one thread hands over pieces of a chunk's size, past the page cache, and brings the file to the disk at the end.
Making: one thread makes rows into the same memory again and again; nothing is written.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline import generated
from pipeline.checksums import Checksum
from pipeline.formats.record_files import PAGE, page_aligned
from pipeline.generated import SHAPES, describe_synthetic, generator_of, write_synthetic
from pipeline.manifest import Manifest, row_words


def disk_rate(folder: Path, num_bytes: int, chunk: int) -> float:
    """Bytes a second of direct writes of one thread, the file's way to the disk included."""
    path = folder / "disk.bin"
    data = page_aligned(np.empty(chunk + PAGE, np.uint8), chunk)
    data[:] = np.frombuffer(np.random.default_rng().bytes(chunk), np.uint8)
    descriptor = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_DIRECT)
    try:
        start = time.perf_counter()
        for place in range(0, num_bytes - chunk + 1, chunk):
            written = os.pwrite(descriptor, data.data, place)
            assert written == chunk, "the disk is full"
        os.fsync(descriptor)
        return (num_bytes // chunk * chunk) / (time.perf_counter() - start)
    finally:
        os.close(descriptor)
        path.unlink()


def synth_rate(folder: Path, manifest: Manifest, num_bytes: int) -> tuple[float, float]:
    """Bytes a second of the whole set, the manifest included, and the cores that it took."""
    cpu, start = time.process_time(), time.perf_counter()
    write_synthetic(folder / "set", manifest)
    seconds = time.perf_counter() - start
    cores = (time.process_time() - cpu) / seconds
    shutil.rmtree(folder / "set")
    return num_bytes / seconds, cores


def making_ns(manifest: Manifest, rows: int) -> tuple[float, float]:
    """Nanoseconds a row of one thread: to make it, and to sum it; the best of ten."""
    generator = generator_of(manifest)
    numbers = np.arange(rows, dtype=np.int64)
    records = np.empty((rows, generator.row_words), np.uint32)
    best = [float("inf")] * 2
    for _ in range(10):
        start = time.perf_counter()
        generator.write(numbers, records)
        middle = time.perf_counter()
        Checksum().update(records.data)
        best = [min(best[0], middle - start), min(best[1], time.perf_counter() - middle)]
    return best[0] / rows * 1e9, best[1] / rows * 1e9


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Alternate the disk and the set; the first round does not count."""
    manifest = describe_synthetic(options.like, rows=options.rows, exponents=(options.exponent,))
    num_bytes = 4 * row_words(manifest) * options.rows
    chunk = generated.CHUNK_ROWS * 4 * row_words(manifest)
    disk, synth, cores = [], [], []
    for repetition in range(options.repetitions + 1):
        before = disk_rate(options.folder, num_bytes, chunk)
        rate, busy = synth_rate(options.folder, manifest, num_bytes)
        if repetition:
            disk.append(before)
            synth.append(rate)
            cores.append(busy)
            print(f"disk {before / 1e9:.2f} GB/s, synth {rate / 1e9:.2f} GB/s on {busy:.2f} cores", flush=True)
    make, total = making_ns(manifest, generated.CHUNK_ROWS)
    return {
        "rows": options.rows,
        "bytes": num_bytes,
        "cores": len(os.sched_getaffinity(0)),
        "disk_bytes_per_s": disk,
        "synth_bytes_per_s": synth,
        "cores_busy": cores,
        "make_ns_per_row": make,
        "sum_ns_per_row": total,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to be measured")
    parser.add_argument("--like", choices=sorted(SHAPES), default="criteo-terabyte")
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--exponent", type=float, default=1.1)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    found = measure(options)
    disk, synth = (statistics.median(found[f"{name}_bytes_per_s"]) for name in ("disk", "synth"))
    bound = found["cores"] / found["make_ns_per_row"] * found["bytes"] / options.rows * 1e9
    print(f"median: disk {disk / 1e9:.2f} GB/s, synth {synth / 1e9:.2f} GB/s, {synth / disk:.0%} of the disk")
    print(
        f"a row: {found['make_ns_per_row']:.1f} ns to make, {found['sum_ns_per_row']:.1f} to sum; {found['cores']} "
        f"cores that only make rows would give {bound / 1e9:.2f} GB/s"
    )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
