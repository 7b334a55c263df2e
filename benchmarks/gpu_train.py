"""Training speed on GPUs: the product's own trainer against every fast form of a PyTorch DLRM, in one run.

    python benchmarks/gpu_train.py --json figures.json
    python benchmarks/gpu_train.py --sections ours fbgemm --forms "fbgemm compile" --batches 65536
    python benchmarks/gpu_train.py --merge first.json second.json --results table.md

Everything measured is a process of its own: a failure is printed and spoils nothing else. Results are written after
each, and nothing starts that would not end within ``--budget`` seconds. How to read it: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PEERS = HERE / "peers"
sys.path[:0] = [str(HERE.parent), str(PEERS)]

from gpu_runs import OwnRuns, last_line, running  # noqa: E402
from gpu_train_report import markdown, print_table  # noqa: E402

from pipeline.generated import SHAPES, describe_synthetic  # noqa: E402

MODEL = {"embedding_dim": 128, "bottom_mlp": [512, 256, 128], "top_mlp": [1024, 1024, 512, 256, 1]}
SMALL_MODEL = {"embedding_dim": 16, "bottom_mlp": [32, 16], "top_mlp": [64, 1]}
"""To test this program without a GPU."""
SECTIONS = ("ours", "eval", "raw", "bags", "full", "ranks", "torch", "fbgemm")
BAGS = "criteo-multihot"
TORCH_FORMS = ("eager", "compile", "reduce-overhead", "graph", "compile + graph")
FBGEMM_FORMS = ("eager", "compile", "reduce-overhead", "graph", "compile + graph")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured case; ``error`` instead of a rate where it failed.

    Attributes:
        section: of ``SECTIONS``.
        form: whose, and how it ran.
        batch: rows of one GPU's share.
        exponent: of the keys' power law; 0: evenly.
        samples_per_s: median over windows, of all GPUs together.
        windows: each window's rate.
    """

    section: str
    form: str
    batch: int
    exponent: float
    samples_per_s: float | None = None
    windows: Sequence[float] = ()
    gpus: int = 1
    error: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One process to start: the figures that it should give, and how."""

    section: str
    form: str
    cases: Sequence[tuple[int, float]]
    """Batch and exponent of each figure."""
    run: Callable[[], list[Figure]]
    estimate_s: float
    gpus: int = 1


def own_jobs(options: argparse.Namespace, runs: OwnRuns) -> Iterator[Job]:
    """The product's cases, one process each."""

    def job(
        section: str, form: str, batch: int, exponent: float, data: Callable[[], Mapping[str, Any]], **rest: Any
    ) -> Job:
        ranks, sections = rest.pop("ranks", 1), rest

        def run() -> list[Figure]:
            config = runs.config(data(), batch * ranks, **sections)
            measured = runs.evaluate(config) if section == "eval" else runs.train(config, ranks=ranks)
            return [Figure(section=section, form=form, batch=batch, exponent=exponent, gpus=ranks, **measured)]

        return Job(
            section=section, form=form, cases=[(batch, exponent)], run=run, estimate_s=options.own_estimate, gpus=ranks
        )

    def made(exponent: float, *, cap: bool = True) -> Callable[[], Mapping[str, Any]]:
        kept = {"on_device": True} if options.device == "cuda" else {}
        return lambda: {"path": runs.synthetic(exponent, cap=cap), **kept}

    for batch in options.batches:
        for exponent in options.exponents:
            yield job("ours", "crosslane", batch, exponent, made(exponent))
    law = options.exponents[0]
    largest = max(options.batches)
    yield job(
        "eval", "crosslane, forward", largest, law, made(law),
        train={"eval_every": 20}, eval={"batch_size": largest, "split": "validation"},
    )  # fmt: skip
    for form, how in (
        ("Raw file, in its order", {"shuffle": False}),
        ("Raw file, blocks of 1,024 shuffled", {"shuffle_block": 1024}),
    ):

        def files(how: Mapping[str, Any] = how) -> Mapping[str, Any]:
            return {"path": str(runs.raw_files()), "readers": options.readers, "prefetch": 8, **how}

        yield job("raw", form, largest, law, files)
    yield from bag_jobs(options, runs, job)
    for kept in options.full_tables:
        yield job(
            "full", f"crosslane, all rows, {kept} tables", largest, law, made(law, cap=False),
            embedding={"table_precision": kept},
        )  # fmt: skip
    for batch in options.batches:
        yield job("ranks", f"crosslane, {options.ranks} GPUs", batch, law, made(law), ranks=options.ranks)


def bag_jobs(options: argparse.Namespace, runs: OwnRuns, job: Callable[..., Job]) -> Iterator[Job]:
    """DCNv2's tables, 214 keys a row, replayed and issued; row-wise Adagrad, whatever else is the common shape."""
    law, kept = options.exponents[0], {"on_device": options.device == "cuda"}
    tables = {"optimizer": {"kind": "rowwise_adagrad", "lr": 0.004}}

    def made() -> Mapping[str, Any]:
        return {"path": runs.synthetic(law, like=BAGS, rows=options.bag_rows), **kept}

    for batch in options.batches:
        for form, graphs in (("graphs", True), ("issued", False)):
            name = f"crosslane, 214 keys a row, {form}"
            yield job("bags", name, batch, law, made, cuda={"graphs": graphs}, embedding=tables)


def peer_jobs(options: argparse.Namespace, folder: Path) -> Iterator[Job]:
    """PyTorch's cases: a process for each form."""
    shape = {
        "rows": table_rows(options),
        "dim": options.model["embedding_dim"],
        "num_dense": 13,
        "bottom": options.model["bottom_mlp"],
        "top": options.model["top_mlp"],
    }
    cases = [(batch, exponent) for batch in options.batches for exponent in options.exponents]
    for section, forms in (("torch", TORCH_FORMS), ("fbgemm", FBGEMM_FORMS)):
        for name in forms:
            form = name if section == "torch" else f"fbgemm {name}"
            job = {
                "form": form, "shape": shape, "batches": options.batches, "exponents": options.exponents,
                "half": options.precision == "fp16", "windows": options.windows, "device": options.device,
                "scale": 1024.0 if options.precision == "fp16" else 1.0,
                "forward": name in {"compile", "reduce-overhead"}, "window_s": options.window_s,
            }  # fmt: skip

            def run(section: str = section, form: str = form, job: Mapping[str, Any] = job) -> list[Figure]:
                return run_peer(section, form, cases, job, options, folder)

            estimate = options.peer_estimate * (1.5 if "compile" in form or "reduce" in form else 1.0)
            yield Job(section=section, form=form, cases=cases, run=run, estimate_s=estimate)


def run_peer(
    section: str,
    form: str,
    cases: Sequence[tuple[int, float]],
    job: Mapping[str, Any],
    options: argparse.Namespace,
    folder: Path,
) -> list[Figure]:
    """One PyTorch process; cases that it did not come to carry its last words."""
    stem = form.replace(" ", "_")
    file, log = folder / f"{stem}.json", folder / f"{stem}.log"
    file.write_text(json.dumps(job))
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    command = [options.torch_python, str(PEERS / "torch_gpu_rate.py"), str(file)]
    reason = ""
    with running(command, environment, log) as process:
        try:
            process.wait(timeout=options.timeout)
        except subprocess.TimeoutExpired:
            reason = f"took longer than {options.timeout} s"
    figures = []
    for line in log.read_text(errors="replace").splitlines():
        if not line.startswith('{"form"'):
            continue
        values = json.loads(line)
        common = {"section": section, "batch": values["batch"], "exponent": values["exponent"]}
        if rate := values.get("forward_samples_per_s"):
            figures.append(Figure(form=f"{form}, forward", samples_per_s=rate, **common))
        details = {name: values[name] for name in ("loss", "prepare_s", "version")}
        rates = {"samples_per_s": values["samples_per_s"], "windows": values["windows"]}
        figures.append(Figure(form=form, details=details, **rates, **common))
    done = {(figure.batch, figure.exponent) for figure in figures}
    for batch, exponent in cases:
        if (batch, exponent) not in done:
            why = reason or last_line(log)
            figures.append(Figure(section=section, form=form, batch=batch, exponent=exponent, error=why))
    return figures


def table_rows(options: argparse.Namespace) -> list[int]:
    """Rows of each table."""
    manifest = describe_synthetic(options.like, rows=20, cap=options.cap)
    return [table.rows for table in manifest.tables]


def run_jobs(jobs: Sequence[Job], budget: float, save: Callable[[Sequence[Figure]], None]) -> list[Figure]:
    """All jobs that the budget in seconds allows, in order."""
    begun, missing = time.perf_counter(), ""
    figures: list[Figure] = []
    for job in jobs:
        left = budget - (time.perf_counter() - begun)
        why = missing if job.section == "fbgemm" else ""
        if left < job.estimate_s:
            why = why or f"left out: {left:.0f} s of the budget are left and it may take {job.estimate_s:.0f}"
        if why:
            made = [
                Figure(section=job.section, form=job.form, batch=batch, exponent=exponent, gpus=job.gpus, error=why)
                for batch, exponent in job.cases
            ]
        else:
            print(f"{job.section}: {job.form} {job.cases} ...", file=sys.stderr, flush=True)
            made = attempt(job)
        figures += made
        for figure in made:
            text = figure.error or f"{(figure.samples_per_s or 0) / 1e6:.2f} M samples/s"
            case = f"{figure.form}, batch {figure.batch}, exponent {figure.exponent:g}"
            print(f"  {case}: {text}", file=sys.stderr, flush=True)
            if figure.section == "fbgemm" and figure.error and "No module named" in figure.error:
                missing = figure.error
        save(figures)
    return figures


def attempt(job: Job) -> list[Figure]:
    """The job's figures, or its failure as figures."""
    try:
        return job.run()
    except Exception as error:  # noqa: BLE001  whatever it was, the other jobs go on
        return [
            Figure(
                section=job.section, form=job.form, batch=batch, exponent=exponent, gpus=job.gpus,
                error=f"{type(error).__name__}: {error}",
            )
            for batch, exponent in job.cases
        ]  # fmt: skip


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """What it ran on."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        gpus = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.strip().splitlines()
    except (OSError, subprocess.SubprocessError):
        gpus = ["no GPU found"]
    return {
        "gpus": gpus,
        "cores": os.cpu_count(),
        "date": dt.datetime.now(dt.UTC).strftime("%Y-%m-%d"),
        "command": "python benchmarks/gpu_train.py " + shlex.join(sys.argv[1:]),
        "rows": sum(table_rows(options)),
        "windows": options.windows,
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=["ours", "eval", "raw", "torch", "fbgemm"])
    parser.add_argument("--forms", nargs="+", help="PyTorch forms, as printed; default: all")
    parser.add_argument("--batches", type=int, nargs="+", default=[65536, 6912], help="rows of one GPU's share")
    parser.add_argument("--exponents", type=float, nargs="+", default=[1.1, 0.0], help="0: uniform keys")
    parser.add_argument("--precision", choices=["fp16", "fp32"], default="fp16")
    parser.add_argument(
        "--full-tables", nargs="+", choices=["fp16", "bf16", "fp32"], default=["fp16"],
        help="of the section 'full': in float32 they take 96 GB",
    )  # fmt: skip
    parser.add_argument("--like", choices=list(SHAPES), default="criteo-terabyte")
    parser.add_argument("--cap", type=int, default=4_000_000, help="most rows of a table")
    parser.add_argument("--rows", type=int, default=80_000_000, help="synthetic rows, 90 %% of them for training")
    parser.add_argument("--bag-rows", type=int, default=10_000_000, help="rows of 214 keys, 912 bytes each")
    parser.add_argument("--raw-rows", type=int, default=20_000_000, help="rows of the Raw files, 160 bytes each")
    parser.add_argument("--readers", type=int, default=4, help="threads that read the Raw files")
    parser.add_argument("--ranks", type=int, default=2, help="GPUs of the section 'ranks'")
    parser.add_argument("--windows", type=int, default=15, help="of which the median is taken")
    parser.add_argument("--record-rows", type=int, default=6_000_000, help="rows of one of our windows")
    parser.add_argument("--window-s", type=float, default=0.3, help="seconds of PyTorch's windows")
    parser.add_argument("--evaluations", type=int, default=7, help="of which the median is taken")
    parser.add_argument("--budget", type=float, default=540, help="seconds for all")
    parser.add_argument("--timeout", type=float, default=170, help="seconds for one process")
    parser.add_argument("--own-estimate", type=float, default=35, help="seconds that a run of ours may take")
    parser.add_argument("--peer-estimate", type=float, default=50, help="seconds that a PyTorch form may take")
    parser.add_argument("--torch-python", default=sys.executable, help="an interpreter that has PyTorch")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to test this program")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--results", type=Path, help="write the text for RESULTS.md there")
    parser.add_argument("--merge", type=Path, nargs="+", help="measure nothing; show what earlier runs wrote")
    options = parser.parse_args()
    options.model = MODEL if options.device == "cuda" else SMALL_MODEL
    return options


def main() -> None:
    """Measure, print, write."""
    options = parse()
    if options.merge:
        loaded = [json.loads(path.read_text()) for path in options.merge]
        about = {**loaded[0]["machine"], "command": "; ".join(each["machine"]["command"] for each in loaded)}
        values = [figure for each in loaded for figure in each["figures"]]
    else:
        about = machine(options)

        def save(figures: Sequence[Figure]) -> None:
            if options.json:
                options.json.write_text(json.dumps({"machine": about, "figures": [asdict(f) for f in figures]}))

        with tempfile.TemporaryDirectory() as folder:
            jobs = [*own_jobs(options, OwnRuns(options, Path(folder))), *peer_jobs(options, Path(folder))]
            chosen = [job for job in jobs if job.section in options.sections and is_wanted(job, options.forms)]
            values = [asdict(figure) for figure in run_jobs(chosen, options.budget, save)]
    print_table(about, values)
    if options.results:
        options.results.write_text(markdown(about, values))


def is_wanted(job: Job, forms: Sequence[str] | None) -> bool:
    """Whether a PyTorch form was asked for; ours are chosen by section."""
    return job.section not in {"torch", "fbgemm"} or not forms or job.form in forms


if __name__ == "__main__":
    main()
