"""Scaling over the GPUs of one host: the product's own trainer and evaluator on 1, 2, 4, 8 of them, beside NVIDIA's.

    python benchmarks/gpu_scaling.py --json figures.json --results table.md --picture docs/scaling.svg
    python benchmarks/gpu_scaling.py --sections weak plans --counts 1 2 --budget 200
    python benchmarks/gpu_scaling.py --device cpu --counts 1 2 4 8

Runs on as many GPUs as it finds. Everything measured is a run of its own under mpirun, in the order of importance;
what does not fit ``--budget`` seconds is left out by name. How to read it: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from gpu_runs import OwnRuns  # noqa: E402
from gpu_scaling_report import markdown, picture, print_report  # noqa: E402
from gpu_train import MODEL, SMALL_MODEL, Figure, Job, machine, run_jobs  # noqa: E402
from time_to_auc import make_set, own_config, watch_ours  # noqa: E402

from pipeline.generated import SHAPES, describe_synthetic, write_recipe  # noqa: E402
from pipeline.manifest import SplitInfo  # noqa: E402

SECTIONS = ("weak", "mlperf", "eval", "plans", "auc")
MLPERF_BATCH = 55_296
"""Of NVIDIA's submissions on 8 GPUs."""
MLPERF_EVALUATION_ROWS = 89_137_319
TRACED = tuple(range(15, 20))
"""Steps that a GPU run times stage by stage; they lie in its first window, which is not counted."""
LEAST_STEPS = 25
"""Of a window, so that the traced steps lie in the first one."""
LAW = 1.1
CALIBRATION_ROWS = 2_000_000
"""That a plan counts."""
ROW_BYTES = 160
SHARE_FOR_TABLES = 0.8
"""Of what a GPU has besides the training rows that it keeps; activations and exchange need the rest."""

CPU_DEFAULTS: dict[str, Any] = {
    "batches": [2048, 512], "mlperf_batch": 4096, "plan_batch": 512, "cap": 20_000, "full_cap": 100_000,
    "rows": 400_000, "eval_rows": 200_000, "eval_batch": 2048, "record_rows": 10_000, "samples": 200_000,
    "held_out": 20_000, "auc_batch": 2048, "target": 0.55, "lr": 0.5, "table_lr": 10.0, "windows": 3,
    "evaluations": 2,
}  # fmt: skip
GPU_DEFAULTS: dict[str, Any] = {
    "batches": [65_536, 6_912], "mlperf_batch": MLPERF_BATCH, "plan_batch": 6_912, "cap": 4_000_000, "full_cap": None,
    "rows": 80_000_000, "eval_rows": MLPERF_EVALUATION_ROWS, "eval_batch": 65_536, "record_rows": 6_000_000,
    "samples": 200_000_000, "held_out": 2_000_000, "auc_batch": 65_536, "target": 0.75, "lr": 1.0, "table_lr": 100.0,
    "windows": 9, "evaluations": 3,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpus:
    """What there is to run on.

    Attributes:
        count: of GPUs; CPU runs: most ranks.
        memory_bytes: of the smallest; CPU runs: 0, which limits nothing.
    """

    count: int
    memory_bytes: int = 0


def find_gpus() -> Gpus:
    """The GPUs that runs may see; none where nvidia-smi finds none."""
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return Gpus(count=0)
    mebibytes = [int(line) for line in text.split()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = len(mebibytes) if visible is None else len([name for name in visible.split(",") if name.strip()])
    return Gpus(count=min(count, len(mebibytes)), memory_bytes=min(mebibytes, default=0) << 20)


def default_counts(most: int) -> list[int]:
    """1, 2, 4, ... and all of them."""
    return sorted({*(2**power for power in range(most.bit_length()) if 2**power <= most), most}) if most else []


class Scaling:
    """The runs of this program."""

    def __init__(self, options: argparse.Namespace, gpus: Gpus, folder: Path) -> None:
        """Nothing is started yet."""
        self.options, self.gpus, self.folder = options, gpus, folder
        self.runs = OwnRuns(options, folder)
        self.most = max(options.counts)

    def data(self, *, cap: int | None = None) -> dict[str, Any]:
        """Where training rows come from: synthetic ones, on a GPU kept in its memory."""
        options = self.options
        limit = f"&cap={cap}" if cap else ""
        values: dict[str, Any] = {
            "path": f"synthetic:{options.like}?rows={options.rows}&seed=1&exponent={LAW:g}{limit}",
            "shuffle_block": options.shuffle_block,
        }
        return values | ({"on_device": True} if options.device == "cuda" else {})

    def config(self, data: Mapping[str, Any], batch: int, count: int, **sections: Any) -> dict[str, Any]:
        """A run's config for a global batch on so many ranks."""
        every = max(LEAST_STEPS, round(self.options.record_rows * count / batch))
        embedding: dict[str, Any] = {"calibration_batches": max(1, CALIBRATION_ROWS // batch)}
        if self.options.device == "cuda":
            # On a GPU every occurrence of a key travels, and no plan is tried out on the host.
            embedding |= {"deduplicate": False, "trial_steps": 0}
            if self.options.precision != "fp32":
                embedding["exchange_precision"] = self.options.precision
        values = self.runs.config(
            data, batch, train={"progress_every": every}, embedding=embedding, trace={"steps": list(TRACED)}
        )
        for name, section in sections.items():
            values[name] = values.get(name, {}) | section
        return values

    def train(self, section: str, form: str, config: Mapping[str, Any], batch: int, count: int) -> Figure:
        """Median rate over the windows of a run."""
        measured = self.runs.train(config, ranks=count)
        return Figure(section=section, form=form, batch=batch, exponent=LAW, gpus=count, **measured)

    # --- the sections

    def weak(self, batch: int, count: int) -> Figure:
        """So many rows on each of so many GPUs."""
        config = self.config(self.data(cap=self.options.cap), batch * count, count)
        return self.train("weak", "plan by itself", config, batch, count)

    def mlperf(self, count: int) -> Figure:
        """MLPerf's global batch and rows, spread over so many GPUs.

        Raises:
            RuntimeError: the tables fit in no precision.
        """
        options = self.options
        precision = self.table_precision(count)
        embedding = {"table_precision": precision}
        config = self.config(self.data(cap=options.full_cap), options.mlperf_batch, count)
        config["embedding"] |= embedding
        form = f"all rows, global batch {options.mlperf_batch:,}, {precision} tables"
        return self.train("mlperf", form, config, options.mlperf_batch // count, count)

    def table_precision(self, count: int) -> str:
        """The widest in which all rows fit.

        Raises:
            RuntimeError: none.
        """
        manifest = describe_synthetic(self.options.like, rows=20, cap=self.options.full_cap)
        numbers = sum(table.rows for table in manifest.tables) * self.options.model["embedding_dim"]
        if not self.gpus.memory_bytes:
            return "fp32"
        room = SHARE_FOR_TABLES * (self.gpus.memory_bytes - 0.9 * self.options.rows * ROW_BYTES) * count
        for precision, size in (("fp32", 4), ("fp16", 2)):
            if numbers * size <= room:
                return precision
        raise RuntimeError(
            f"{2 * numbers / 1e9:.0f} GB of float16 tables do not fit {count} GPUs ({room / 1e9:.0f} GB)"
        )

    def evaluation(self, form: str, *, overlapped: bool) -> Figure:
        """A whole evaluation, its AUC awaited, on all GPUs."""
        options, count = self.options, self.most
        config = self.config(
            self.evaluation_data(), options.eval_batch * count, count,
            overlap={"eval": "always" if overlapped else False},
            eval={"split": "validation", "final_split": None, "batch_size": options.eval_batch * count},
            train={"eval_every": LEAST_STEPS, "target": {"metric": "auc", "value": 1.0}},
        )  # fmt: skip
        records, details = self.runs.records(config, "eval", 1 + options.evaluations, ranks=count)
        rates = [record["samples"] / record["seconds"] for record in records[1:]]
        details["samples"] = records[-1]["samples"]
        details["auc"] = records[-1]["metrics"]["auc"]
        for name in ("seconds", "scoring_seconds"):
            details[f"evaluation_{name}"] = statistics.median(record[name] for record in records[1:])
        return Figure(
            section="eval", form=form, batch=options.eval_batch, exponent=LAW, gpus=count, windows=rates,
            samples_per_s=statistics.median(rates), details=details,
        )  # fmt: skip

    def evaluation_data(self) -> dict[str, Any]:
        """A set whose validation split is as large as MLPerf's."""
        folder = self.folder / "evaluated"
        options = self.options
        if not folder.exists():
            manifest = describe_synthetic(options.like, rows=20, exponents=(LAW,), cap=options.cap)
            counts = {"train": options.rows // 8, "validation": options.eval_rows}
            splits = {name: SplitInfo(rows=rows, files=()) for name, rows in counts.items()}
            write_recipe(folder, replace(manifest, splits=splits))
        return self.data() | {"path": str(folder)}

    def plan(self, form: str, embedding: Mapping[str, Any]) -> Figure:
        """The batch for plans on all GPUs, placed or exchanged as it says."""
        options, count = self.options, self.most
        config = self.config(self.data(cap=options.cap), options.plan_batch * count, count)
        config["embedding"] |= embedding
        return self.train("plans", form, config, options.plan_batch, count)

    def time_to_auc(self, count: int) -> Figure:
        """From process start to the target's AUC; started once before, so that caches are warm.

        Raises:
            RuntimeError: the target was not seen.
        """
        options = self.options
        rest = argparse.Namespace(
            **{name: getattr(options, name) for name in ("samples", "held_out", "cap", "target", "lr", "table_lr")},
            **{name: getattr(options, name) for name in ("device", "model", "timeout")},
            seed=1, batch=options.auc_batch, epochs=1, checkpoint_every=0,
        )  # fmt: skip
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        path, _ = make_set(rest, folder)
        config = own_config(rest, path, options.precision)
        config["embedding"] |= self.config({}, options.auc_batch, count)["embedding"]
        watch_ours(config, count, folder, rest, warm=True)
        result = watch_ours(config, count, folder, rest, warm=False)
        if "error" in result:
            raise RuntimeError(f"target {options.target} not seen: {result['error']}")
        return Figure(
            section="auc", form=f"to AUC {options.target}", batch=options.auc_batch // count, exponent=LAW, gpus=count,
            samples_per_s=result["samples"] / result["seconds"], details=result,
        )  # fmt: skip


def jobs_of(scaling: Scaling) -> Iterator[Job]:
    """Everything that there is to measure, what tells most first."""
    options, most = scaling.options, scaling.most
    ends = sorted({1, most} & set(options.counts), reverse=True)
    between = [count for count in options.counts if count not in ends]
    large = options.batches[0]

    def job(section: str, form: str, batch: int, count: int, measure: Callable[[], Figure], cost: float = 1.0) -> Job:
        return Job(
            section=section, form=form, cases=[(batch, LAW)], run=lambda: [measure()], gpus=count,
            estimate_s=cost * options.estimate,
        )  # fmt: skip

    def weak(batch: int, count: int) -> Job:
        return job("weak", "plan by itself", batch, count, lambda: scaling.weak(batch, count))

    yield from (weak(large, count) for count in ends)
    mlperf = options.mlperf_batch
    yield job("mlperf", "all rows", mlperf // most, most, lambda: scaling.mlperf(most), 1.5)
    for overlapped, form in ((True, "overlapped"), (False, "sequential")):
        yield job(
            "eval", form, options.eval_batch, most,
            lambda form=form, overlapped=overlapped: scaling.evaluation(form, overlapped=overlapped), 1.5,
        )  # type: ignore[misc]  # fmt: skip
    yield from (weak(batch, count) for batch in options.batches[1:] for count in ends)
    for form, embedding in plan_forms(most).items():
        yield job(
            "plans", form, options.plan_batch, most,
            lambda form=form, embedding=embedding: scaling.plan(form, embedding),
        )  # type: ignore[misc]  # fmt: skip
    yield job("auc", f"to AUC {options.target}", options.auc_batch // most, most, lambda: scaling.time_to_auc(most), 2)
    yield from (weak(batch, count) for batch in options.batches for count in between)
    for count in (count for count in options.counts if count != most):
        batch = options.auc_batch // count
        yield job("auc", f"to AUC {options.target}", batch, count, lambda count=count: scaling.time_to_auc(count), 2)  # type: ignore[misc]


def plan_forms(count: int) -> dict[str, dict[str, Any]]:
    """What ``embedding`` says, by name; by node only where nodes of several ranks can be made."""
    forms: dict[str, dict[str, Any]] = {}
    if count > 1:
        forms = {
            "table_wise, flat": {"placement": "table_wise"},
            "row_wise, flat": {"placement": "row_wise"},
            "hybrid auto, flat": {"placement": "auto"},
        }
    for nodes in sorted({2, count // 2}):
        if nodes > 1 and count % nodes == 0 and count // nodes > 1:
            forms[f"hybrid auto, hierarchical, {nodes} x {count // nodes}"] = {
                "placement": "auto", "all_to_all": "hierarchical", "nodes": nodes,
            }  # fmt: skip
    return forms


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; what is not given depends on the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--counts", type=int, nargs="+", help="GPUs to run on; default: 1, 2, 4, ... and all")
    parser.add_argument("--batches", type=int, nargs="+", help="rows of a GPU, weak scaling")
    parser.add_argument("--mlperf-batch", type=int, help="global batch of MLPerf's configuration")
    parser.add_argument("--plan-batch", type=int, help="rows of a GPU, plans")
    parser.add_argument("--precision", choices=["fp16", "bf16", "fp32"], default="fp16")
    parser.add_argument("--like", choices=list(SHAPES), default="criteo-terabyte")
    parser.add_argument("--cap", type=int, help="most rows of a table, but in MLPerf's configuration")
    parser.add_argument("--full-cap", type=int, help="the same there; default: none on GPUs")
    parser.add_argument("--rows", type=int, help="synthetic rows, 90 %% of them for training")
    parser.add_argument("--shuffle-block", type=int, default=1024, help="rows that a shuffle leaves together")
    parser.add_argument("--eval-rows", type=int, help="rows of an evaluation")
    parser.add_argument("--eval-batch", type=int, help="rows of a GPU, evaluation")
    parser.add_argument("--record-rows", type=int, help="rows of a GPU in one window")
    parser.add_argument("--windows", type=int, help="of which the median is taken")
    parser.add_argument("--evaluations", type=int, help="of which the median is taken")
    parser.add_argument("--samples", type=int, help="rows of an epoch, time to AUC")
    parser.add_argument("--held-out", type=int, help="rows evaluated, time to AUC")
    parser.add_argument("--auc-batch", type=int, help="global batch, time to AUC")
    parser.add_argument("--target", type=float, help="AUC; fix it beforehand")
    parser.add_argument("--lr", type=float, help="of the dense part, time to AUC")
    parser.add_argument("--table-lr", type=float, help="of the tables, time to AUC")
    parser.add_argument("--budget", type=float, default=560, help="seconds for all")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one run")
    parser.add_argument("--estimate", type=float, default=20, help="seconds that a plain run may take")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: ranks of this machine's cores")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--results", type=Path, help="write the text for RESULTS.md there")
    parser.add_argument("--picture", type=Path, help="write the rates over the number of GPUs there, SVG")
    options = parser.parse_args(arguments)
    for name, value in (GPU_DEFAULTS if options.device == "cuda" else CPU_DEFAULTS).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.model = MODEL if options.device == "cuda" else SMALL_MODEL
    if options.device == "cpu":
        options.precision = "fp32"
    if options.counts is not None and min(options.counts) < 1:
        parser.error(f"--counts: {min(options.counts)}; must be at least 1")
    return options


def settle_counts(options: argparse.Namespace) -> Gpus:
    """Find the GPUs, and settle on how many of them to run.

    Raises:
        SystemExit: there are none, or fewer than asked for.
    """
    gpus = find_gpus() if options.device == "cuda" else Gpus(count=max(options.counts or [8]))
    if not gpus.count:
        sys.exit("no GPU found; --device cpu tries the program on CPU ranks")
    options.counts = sorted(set(options.counts or default_counts(gpus.count)))
    if max(options.counts) > gpus.count:
        sys.exit(f"--counts: {max(options.counts)} GPUs are asked for, but there are {gpus.count}")
    return gpus


def main() -> None:
    """Measure, print, write."""
    options = parse()
    gpus = settle_counts(options)
    about = machine(options) | {
        "command": "python benchmarks/gpu_scaling.py " + " ".join(sys.argv[1:]),
        "device": options.device,
        "budget": options.budget,
    }

    def save(figures: Sequence[Figure]) -> None:
        if options.json:
            options.json.write_text(json.dumps({"machine": about, "figures": [asdict(f) for f in figures]}))

    with tempfile.TemporaryDirectory() as folder:
        chosen = [job for job in jobs_of(Scaling(options, gpus, Path(folder))) if job.section in options.sections]
        values = [asdict(figure) for figure in run_jobs(chosen, options.budget, save)]
    print_report(about, values)
    if options.results:
        options.results.write_text(markdown(about, values))
    if options.picture and (drawn := picture(about, values)):
        options.picture.write_text(drawn)


if __name__ == "__main__":
    main()
