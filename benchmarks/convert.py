"""How fast ``crosslane convert`` goes from format to format, and how much memory it takes however many rows there are.

    python benchmarks/convert.py [--rows 2000000] [--repetitions 3] [--pairs raw:norm ...] [--folder DIR] [--json FILE]

Every conversion is a process of its own. ``converted`` reads, checks, sums, writes and sums what was written;
``verified`` reads the result back besides, as the command does unless told otherwise. Peak memory is that of the
process, with all rows and with a quarter of them. The peer is a plain NumPy script that holds a file in memory
(``plain``), for Raw and split binary.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

PAIRS = (
    *("raw:split-binary", "split-binary:raw", "raw:norm", "norm:raw", "raw:parquet", "parquet:raw"),
    *("raw:torchrec-npy", "torchrec-npy:raw", "raw:jagged", "jagged:raw"),
    *("counts:criteo-tsv", "criteo-tsv:raw", "counts:facebook-npz", "facebook-npz:raw"),
)
AIMS = {"split-binary": 1e6, "norm": 3e5, "criteo-tsv": 3e5}
"""Rows per second on two cores that were asked for, to and from Raw."""

SUPPOSED = 40_000
"""Rows of every table: int32 in split binary."""

_CHILD = """
import json, resource, sys, time
sys.path.insert(0, sys.argv[1])
from pipeline.threads import settle_threads
settle_threads()
from pathlib import Path
from pipeline.convert import convert
given = json.loads(sys.argv[2])
begin = time.perf_counter()
done = convert(Path(given["source"]), Path(given["target"]), to=given["to"], allow=frozenset(given["allow"]),
               overwrite=True, verify=given["verify"])
print(json.dumps({"seconds": time.perf_counter() - begin, "rows": sum(one.rows for one in done.splits.values()),
                  "bytes": done.target_bytes, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""

_PLAIN = """
import json, resource, sys, time
from pathlib import Path
import numpy as np
given = json.loads(sys.argv[2])
begin = time.perf_counter()
source, target = Path(given["source"]), Path(given["target"])
target.mkdir(parents=True)
record = np.dtype([("label", "<i4"), ("dense", "<f4", 13), ("keys", "<i4", 26)])
if given["to"] == "split-binary":
    rows = np.fromfile(source / "train.bin", record)
    rows["label"].astype(bool).tofile(target / "label.bin")
    rows["dense"].astype("<f2").tofile(target / "numerical.bin")
    for t in range(26):
        rows["keys"][:, t].astype("<i4").tofile(target / f"cat_{t}.bin")
else:
    labels = np.fromfile(source / "train" / "label.bin", bool)
    rows = np.empty(labels.size, record)
    rows["label"] = labels
    rows["dense"] = np.fromfile(source / "train" / "numerical.bin", "<f2").reshape(-1, 13)
    for t in range(26):
        rows["keys"][:, t] = np.fromfile(source / "train" / f"cat_{t}.bin", "<i4")
    rows.tofile(target / "train.bin")
print(json.dumps({"seconds": time.perf_counter() - begin, "rows": len(rows), "bytes": 0,
                  "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""


def write_source(folder: Path, rows: int, *, counts: bool) -> Path:
    """A Raw set of Criteo's shape: float dense columns, or counts of which some are missing."""
    import numpy as np

    from pipeline.manifest import TableInfo
    from pipeline.writer import DatasetWriter

    rng = np.random.default_rng(1)
    tables = [TableInfo(name=f"C{t + 1}", rows=SUPPOSED) for t in range(26)]
    names = [f"I{n + 1}" for n in range(13)]
    dense_dtype: Any = "int32" if counts else "float32"
    with DatasetWriter(folder, name="benchmark", dense_names=names, tables=tables, dense_dtype=dense_dtype) as writer:
        for start in range(0, rows, 1 << 16):
            size = min(1 << 16, rows - start)
            dense = rng.normal(size=(size, 13)).astype(np.float32)
            if counts:
                dense = (10 ** rng.uniform(0, 5, (size, 13))).astype(np.int32) - 1
            keys = np.minimum(rng.pareto(0.3, (size, 26)), SUPPOSED - 1).astype(np.int32)
            writer.write("train", rng.integers(0, 2, size), dense, keys)
        writer.finish()
    return folder


def run(program: str, **given: Any) -> dict[str, float]:
    """One conversion in a process of its own."""
    shutil.rmtree(given["target"], ignore_errors=True)
    os.sync()
    done = subprocess.run(
        [sys.executable, "-c", program, str(ROOT), json.dumps({**given, "source": str(given["source"]),
                                                               "target": str(given["target"])})],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{given['source']} to {given['to']}: {done.stderr[-2000:]}")
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def sources(folder: Path, rows: int, wanted: set[str]) -> dict[str, Path]:
    """What is converted, by format: Raw floats, Raw counts, and what they were converted to before."""
    made = {"raw": write_source(folder / "raw", rows, counts=False)}
    counted = {"counts", "criteo-tsv", "facebook-npz"}
    if wanted & counted:
        made["counts"] = write_source(folder / "counts", rows, counts=True)
    for name in sorted(wanted - {"raw", "counts"}):
        target = folder / f"from-{name}"
        allow = ["fp16-dense"] if name == "split-binary" else []
        run(_CHILD, source=made["counts" if name in counted else "raw"], target=target, to=name, allow=allow,
            verify=False)  # fmt: skip
        made[name] = target
    return made


def measure(pair: str, full: dict[str, Path], small: dict[str, Path], folder: Path, repetitions: int) -> dict[str, Any]:
    """Rates and peaks of one conversion."""
    source, to = pair.split(":")
    allow = ["fp16-dense"] if to == "split-binary" else []
    given = {"target": folder / "out", "to": to, "allow": allow}
    runs: dict[str, list[dict[str, float]]] = {"converted": [], "verified": [], "plain": []}
    for _ in range(repetitions):
        runs["converted"].append(run(_CHILD, source=full[source], verify=False, **given))
        runs["verified"].append(run(_CHILD, source=full[source], verify=True, **given))
        if {source, to} == {"raw", "split-binary"}:
            runs["plain"].append(run(_PLAIN, source=full[source], verify=False, **given))
    rates = {kind: [one["rows"] / one["seconds"] for one in found] for kind, found in runs.items() if found}
    few = run(_CHILD, source=small[source], verify=True, **given)
    shutil.rmtree(folder / "out")
    return {
        "rows": runs["converted"][0]["rows"],
        "best": {kind: max(found) for kind, found in rates.items()},
        "median": {kind: statistics.median(found) for kind, found in rates.items()},
        "peak_bytes": max(one["peak"] for one in runs["verified"]),
        "peak_bytes_of_a_quarter": few["peak"],
        "aim": next((aim for name, aim in AIMS.items() if name in pair), None),
    }


def main() -> None:
    """Write the rows, convert, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), metavar="FROM:TO")
    parser.add_argument("--folder", type=Path, help="where the rows are written; default: the system's temporary one")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    figures = {}
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder, begin = Path(name), time.perf_counter()
        wanted = {pair.split(":")[0] for pair in given.pairs}
        full, small = (sources(folder / str(rows), rows, wanted) for rows in (given.rows, given.rows // 4))
        print(f"{given.rows:,} rows of 160 bytes in Raw, load {os.getloadavg()[0]:.2f}, "
              f"set up in {time.perf_counter() - begin:.0f} s")  # fmt: skip
        print(f"{'median rows/s (best)':28}{'converted':>23}{'verified':>23}{'aim':>11}{'of aim':>8}"
              f"{'plain':>12}{'to plain':>9}{'peak MiB':>10}{'of 1/4':>8}")  # fmt: skip
        for pair in given.pairs:
            found = figures[pair] = measure(pair, full, small, folder, given.repetitions)
            shown = [f"{found['median'][kind]:,.0f} ({found['best'][kind]:,.0f})" for kind in ("converted", "verified")]
            aim, plain = found["aim"], found["median"].get("plain")
            rate = found["median"]["converted"]
            print(f"{pair:28}{shown[0]:>23}{shown[1]:>23}{aim or 0:>11,.0f}{rate / aim if aim else 0:>8.2f}"
                  f"{plain or 0:>12,.0f}{rate / plain if plain else 0:>9.2f}"
                  f"{found['peak_bytes'] / 2**20:>10.0f}{found['peak_bytes_of_a_quarter'] / 2**20:>8.0f}",
                  flush=True)  # fmt: skip
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
