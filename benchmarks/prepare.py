"""Preparing Criteo's rows: ``crosslane prepare criteo`` beside DuckDB, Polars, pandas and NVTabular on the same file.

    python benchmarks/prepare.py --folder DIR [--rows 5000000] [--only engines memory phases ranks kill] [--json FILE]
                                 [--engines crosslane duckdb polars pandas nvtabular] [--repetitions 3]

Writes a file of Criteo's form, makes the peers' environments in DIR from the package index, runs each engine in a
process of its own, in turns, and compares what they wrote row by row. ``memory``: 50 million distinct values under
``--memory-limit 2GiB``. ``phases``: time of each pass. ``ranks``: 1, 2 and 4 ranks. ``kill``: kill -9 in each pass,
then the same command again. How to read it: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE / "peers")]

from criteo_text import write_rows  # noqa: E402
from measured import Measured, measure, size_of  # noqa: E402

PEERS = ("duckdb", "polars", "pandas")
PACKAGES = ("duckdb", "polars", "pandas", "pyarrow")
ENGINES = ("crosslane", *PEERS, "nvtabular")
AIMS = {"nvtabular": 15.0, "best of DuckDB and Polars": 1.5}
RATE_AIM = 500_000
"""Rows per second on two cores."""
THRESHOLD = 10
LIMIT = "2GiB"
WIDE = 10
"""Columns in which every row has a value of its own, where memory is measured."""
_COMPARED_ROWS = 1 << 18

_PHASES = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
from pipeline.threads import settle_threads
settle_threads()
from pathlib import Path
from pipeline.etl.criteo import CriteoInputs, prepare_criteo
from pipeline.etl.rules import Rules
begin = time.perf_counter()
ends = {}
def progress(phase, done, total):
    ends[phase] = time.perf_counter() - begin
prepare_criteo(CriteoInputs(train=[Path(sys.argv[2])]), Path(sys.argv[3]), progress=progress,
               rules=Rules(frequency_threshold=int(sys.argv[4])))
print(json.dumps(ends))
"""


def crosslane(*words: str) -> list[str]:
    """The command under this interpreter."""
    return [sys.executable, "-m", "service.cli", *words]


def preparation(source: Path, out: Path, *words: str) -> list[str]:
    """``crosslane prepare criteo`` of a file."""
    return crosslane("prepare", "criteo", "--train", str(source), "--out", str(out), "--json",
                     "--frequency-threshold", str(THRESHOLD), *words)  # fmt: skip


def peers_python(folder: Path) -> str:
    """Interpreter of the environment of DuckDB, Polars and pandas, made where missing."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *PACKAGES], check=True)
    return str(python)


def nvtabular_python(folder: Path) -> str:
    """Interpreter of NVTabular's environment, made where missing; not remembered beyond the folder."""
    from pipeline.etl.nvtabular_env import VARIABLE, find_environment, make_environment

    made = make_environment(folder, environ={"XDG_DATA_HOME": str(folder.parent.absolute() / "notes")})
    return str(find_environment({VARIABLE: str(made)}))


def run_engine(engine: str, source: Path, out: Path, given: argparse.Namespace) -> Measured:
    """One preparation, from the text to encoded rows on the disk."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    if engine == "crosslane":
        out.parent.mkdir(exist_ok=True)
        return measure(preparation(source, out), out)
    out.mkdir(parents=True)
    if engine in PEERS:
        python = peers_python(given.peers or given.folder / "peers")
        return measure([python, str(HERE / "peers" / "prepare_peers.py"), engine, str(source), str(out),
                        str(THRESHOLD)], out)  # fmt: skip
    from pipeline.etl import nvtabular_worker
    from pipeline.etl.criteo_nvtabular import BLOCK_BYTES

    python = nvtabular_python(given.nvtabular or given.folder / "nvtabular")
    request = {"splits": {"train": [str(source.absolute())]}, "out": str(out.absolute()), "threshold": THRESHOLD,
               "modulo": None, "fill_category": None, "floor": 0, "fill": 0, "block_bytes": BLOCK_BYTES,
               "scheduler": None}  # fmt: skip
    return measure([python, "-I", nvtabular_worker.__file__], out, request=json.dumps(request))


def shards(out: Path) -> list[Path]:
    """The files of the training rows, in order."""
    from pipeline.manifest import read_manifest

    return [out / file.path for file in read_manifest(out).splits["train"].files]


def row_blocks(paths: list[Path]) -> Iterator[Any]:
    """Rows [B, 40] int32 of Raw files, one after the other."""
    import numpy as np

    for path in paths:
        rows = np.memmap(path, "<i4", "r").reshape(-1, 40)
        for start in range(0, len(rows), _COMPARED_ROWS):
            yield rows[start : start + _COMPARED_ROWS]


def same_rows(engine: str, out: Path, own: Path) -> bool:
    """Whether a peer wrote the rows that we wrote; dense values may differ in the last place."""
    import numpy as np
    import polars as pl

    if engine == "pandas":
        theirs = np.memmap(out / "rows.bin", "<i4", "r").reshape(-1, 40)
    else:
        frame = pl.read_parquet(out / "rows.parquet", glob=False)
        if "row" in frame.columns:
            frame = frame.sort("row").drop("row")
        theirs = np.empty((frame.height, 40), np.int32)
        for place, name in enumerate(frame.columns):
            values = frame[name].to_numpy()
            theirs[:, place] = values.astype(np.float32).view(np.int32) if 0 < place < 14 else values
    first = 0
    for block in row_blocks(shards(own)):
        other = theirs[first : first + len(block)]
        first += len(block)
        exact = np.delete(np.arange(40), np.arange(1, 14))
        if len(other) != len(block) or (other[:, exact] != block[:, exact]).any():
            return False
        if (np.abs(other[:, 1:14].astype(np.int64) - block[:, 1:14]) > 1).any():
            return False
    return first == len(theirs)


def engines(given: argparse.Namespace) -> dict[str, Any]:
    """All engines on the same file, in turns."""
    source = write_rows(given.folder / f"rows-{given.rows}.tsv", given.rows)
    for block in iter_blocks(source):  # into the page cache
        del block
    found: dict[str, list[Measured]] = {engine: [] for engine in given.engines}
    sizes: dict[str, int] = {}
    same: dict[str, bool] = {}
    for repetition in range(given.repetitions):
        turn = repetition % len(given.engines)
        for engine in given.engines[turn:] + given.engines[:turn]:
            out = given.folder / "out" / engine
            found[engine].append(run_engine(engine, source, out, given))
            sizes[engine] = size_of(out)
            print(f"{engine:10} {given.rows / found[engine][-1].seconds:>12,.0f} rows/s", flush=True)
    own = given.folder / "out" / "crosslane"
    for engine in given.engines:
        if engine in PEERS and own.exists():
            same[engine] = same_rows(engine, given.folder / "out" / engine, own)
    return {
        engine: {
            "rows": given.rows,
            "seconds": [one.seconds for one in runs],
            "cpu_seconds": [one.cpu_seconds for one in runs],
            "peak_bytes": max(one.peak_bytes for one in runs),
            "disk_bytes": max(one.disk_bytes for one in runs),
            "result_bytes": sizes[engine],
            "same_rows": same.get(engine),
        }
        for engine, runs in found.items()
    }


def together(earlier: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Runs of two calls: an engine that both have keeps the runs of both."""
    whole = {**earlier, **found}
    for engine in earlier.keys() & found.keys():
        one, other = earlier[engine], found[engine]
        if one["rows"] == other["rows"]:
            joined = {name: one[name] + other[name] for name in ("seconds", "cpu_seconds")}
            whole[engine] = {**other, **joined, "peak_bytes": max(one["peak_bytes"], other["peak_bytes"])}
    return whole


def iter_blocks(path: Path) -> Iterator[bytes]:
    """A file in blocks."""
    with path.open("rb") as file:
        while block := file.read(8 << 20):
            yield block


def print_engines(found: dict[str, Any]) -> None:
    """The table, and how we stand to the peers."""
    heads = {"rows/s best": 14, "median": 12, "CPU-s/M": 10, "MiB": 8, "disk MB": 10, "result MB": 11}
    print(f"{'engine':12}" + "".join(f"{head:>{width}}" for head, width in heads.items()) + "  same rows")
    best: dict[str, float] = {}
    for engine, one in found.items():
        best[engine] = one["rows"] / min(one["seconds"])
        median = one["rows"] / statistics.median(one["seconds"])
        cpu = min(one["cpu_seconds"]) / one["rows"] * 1e6
        print(f"{engine:12}{best[engine]:>14,.0f}{median:>12,.0f}{cpu:>10.2f}{one['peak_bytes'] / 2**20:>8.0f}"
              f"{one['disk_bytes'] / 1e6:>10.0f}{one['result_bytes'] / 1e6:>11.0f}  {one['same_rows']}")  # fmt: skip
    if "crosslane" not in best:
        return
    print(f"crosslane: {best['crosslane']:,.0f} rows/s; asked for {RATE_AIM:,}")
    peers = {engine: rate for engine, rate in best.items() if engine != "crosslane"}
    if fast := [rate for engine, rate in peers.items() if engine in ("duckdb", "polars")]:
        peers["best of DuckDB and Polars"] = max(fast)
    for engine, rate in peers.items():
        aim = f"; asked for {AIMS[engine]}" if engine in AIMS else ""
        print(f"to {engine}: {best['crosslane'] / rate:.2f}{aim}")


def memory(given: argparse.Namespace) -> dict[str, Any]:
    """Many distinct values under a limit."""
    source = write_rows(given.folder / f"wide-{given.rows}.tsv", given.rows, WIDE)
    out = given.folder / "out" / "wide"
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(exist_ok=True)
    found = measure(preparation(source, out, "--frequency-threshold", "1", "--memory-limit", LIMIT), out)
    table_rows = json.loads(found.output)["table_rows"]
    print(f"{table_rows:,} distinct values, limit {LIMIT}: peak {found.peak_bytes / 2**20:.0f} MiB, "
          f"{given.rows / found.seconds:,.0f} rows/s, disk {found.disk_bytes / 1e6:.0f} MB")  # fmt: skip
    shutil.rmtree(out)
    return {"distinct": table_rows, "peak_bytes": found.peak_bytes, "seconds": found.seconds, "rows": given.rows,
            "disk_bytes": found.disk_bytes, "below_limit": found.peak_bytes < 2 << 30}  # fmt: skip


def phases(given: argparse.Namespace) -> dict[str, Any]:
    """What each pass takes a row, without the start of the process: usual values, and nearly all of them distinct."""
    found = {}
    out = given.folder / "out" / "phases"
    for kind, wide, threshold in (("rows", 0, THRESHOLD), ("wide", WIDE, 1)):
        source = write_rows(given.folder / f"{kind}-{given.rows}.tsv", given.rows, wide)
        best: dict[str, float] = {}
        for _ in range(given.repetitions):
            shutil.rmtree(out, ignore_errors=True)
            command = [sys.executable, "-c", _PHASES, str(ROOT), str(source), str(out), str(threshold)]
            ends = json.loads(measure(command, given.folder).output)
            begin = 0.0
            for phase, end in ends.items():
                best[phase] = min(best.get(phase, end), end - begin)
                begin = end
        found[kind] = {phase: seconds / given.rows * 1e6 for phase, seconds in best.items()}
        print(f"{kind}: " + ", ".join(f"{phase} {us:.3f} us a row" for phase, us in found[kind].items()), flush=True)
    shutil.rmtree(out)
    return found


def digest(out: Path) -> str:
    """SHA-256 of all files of a set, with their names."""
    whole = hashlib.sha256()
    for path in sorted(out.rglob("*")):
        if path.is_file():
            whole.update(str(path.relative_to(out)).encode())
            for block in iter_blocks(path):
                whole.update(block)
    return whole.hexdigest()


def ranks(given: argparse.Namespace) -> dict[str, Any]:
    """The same file with 1, 2 and 4 ranks."""
    from service.launchers.mpi import engine_environment, find_mpirun

    source = write_rows(given.folder / f"rows-{given.rows}.tsv", given.rows)
    digests, seconds = {}, {}
    for number in (1, 2, 4):
        out = given.folder / "out" / "ranks"
        shutil.rmtree(out, ignore_errors=True)
        command = preparation(source, out)
        begin = time.perf_counter()
        if number > 1:
            command = [*find_mpirun().arguments(number), *command]
        subprocess.run(command, env=engine_environment(os.environ), stdout=subprocess.DEVNULL, check=True)
        seconds[number] = time.perf_counter() - begin
        digests[number] = digest(out)
        print(
            f"{number} rank(s): {given.rows / seconds[number]:,.0f} rows/s, sha256 {digests[number][:16]}", flush=True
        )
    shutil.rmtree(out)
    return {"seconds": seconds, "sha256": digests, "equal": len(set(digests.values())) == 1}


def kill(given: argparse.Namespace) -> dict[str, Any]:
    """Kill -9 in each pass, the same command again, and what an undisturbed one writes."""
    source = write_rows(given.folder / f"rows-{given.rows}.tsv", given.rows)
    out = given.folder / "out" / "killed"
    work = out / ".preparing"
    moments: dict[str, Callable[[], bool]] = {
        "count": lambda: (work / "job.json").exists(),
        "number": lambda: any((work / "counts").glob("[!.]*.json")),
        "encode": lambda: len(list((work / "shards").glob("[!.]*.json"))) >= 20,
    }
    shutil.rmtree(out, ignore_errors=True)
    subprocess.run(preparation(source, out), stdout=subprocess.DEVNULL, check=True)
    digests = {"undisturbed": digest(out)}
    passes = {}
    for name, reached in moments.items():
        shutil.rmtree(out, ignore_errors=True)
        process = subprocess.Popen(preparation(source, out), stdout=subprocess.DEVNULL)
        while process.poll() is None and not reached():
            time.sleep(0.002)
        time.sleep(0.5 if name == "count" else 0.02)
        process.send_signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            raise SystemExit(
                f"{given.rows} rows: the preparation was over before it could be killed; give it more rows"
            )
        passes[name] = pass_of(work)
        subprocess.run(preparation(source, out), stdout=subprocess.DEVNULL, check=True)
        digests[name] = digest(out)
        print(f"killed in {passes[name]}, resumed: sha256 {digests[name][:16]}", flush=True)
    shutil.rmtree(out)
    return {"killed_in": passes, "sha256": digests, "equal": len(set(digests.values())) == 1}


def pass_of(work: Path) -> str:
    """The pass that a killed preparation was in, by its marks."""
    if not any((work / "counts").glob("[!.]*.json")) and not (work / "numbered.json").exists():
        return "count"
    return "encode" if (work / "numbered.json").exists() else "number"


PARTS = {"engines": engines, "memory": memory, "phases": phases, "ranks": ranks, "kill": kill}


def main() -> None:
    """Measure the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, required=True, help="for the file, the results and the environments")
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--peers", type=Path, help="environment with DuckDB, Polars and pandas")
    parser.add_argument("--nvtabular", type=Path, help="environment of `crosslane env nvtabular`")
    parser.add_argument("--json", type=Path, help="where the figures go, added to those that are there")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    print(f"load average {os.getloadavg()[0]:.2f}, {len(os.sched_getaffinity(0))} cores")
    figures = json.loads(given.json.read_text(encoding="utf-8")) if given.json and given.json.exists() else {}
    for part in given.only:
        found = PARTS[part](given)
        if part == "engines":
            found = together(figures.get(part, {}), found)
            print_engines(found)
        else:
            print(json.dumps(found))
        figures[part] = found
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
