"""Exact metrics of an evaluation: on one or more GPUs, on the CPU, and scikit-learn's AUC of a smaller sample.

    python benchmarks/gpu_metrics.py
    mpirun -np 2 python -m mpi4py benchmarks/gpu_metrics.py --rows 89137319
    python benchmarks/gpu_metrics.py --cpu --rows 5000000        # without a GPU

Scores are made where they are ranked: a model whose logits say the truth, normal around -3.4. The default number of
rows is that of the test day of Criteo's Terabyte set. Every time is a median from the call to the result on the host;
those of all rows on the CPU and of the parts need one rank. How to read it: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.threads import launched_ranks, settle_threads

settle_threads()

import numpy as np  # noqa: E402

from embedding.comm import SingleComm  # noqa: E402
from embedding.comm_mpi import world  # noqa: E402
from embedding.topology import discover, share_of  # noqa: E402
from pipeline import score_sums  # noqa: E402
from pipeline.metrics import evaluate_scores  # noqa: E402
from pipeline.ranking import rank_scores  # noqa: E402
from pipeline.score_groups import count_bad_rows, groups_of_rows  # noqa: E402

TERABYTE_TEST_ROWS = 89_137_319


def seconds(work: Callable[[], Any], repetitions: int) -> float:
    """Median time of a call whose result is on the host when it returns, after one that compiles."""
    work()
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def make_rows(xp: Any, rows: int, seed: int) -> tuple[Any, Any]:
    """Logits and labels, both float32."""
    random = xp.random.RandomState(seed)
    logits = random.normal(-3.4, 1.3, rows).astype(np.float32)
    labels = (random.random_sample(rows) < 1 / (1 + xp.exp(-logits.astype(np.float64)))).astype(np.float32)
    return logits, labels


def parts(scores: Any, labels: Any, device: Any, repetitions: int, times: dict[str, float]) -> int:
    """Time the parts on one rank; returns the number of distinct scores."""
    ranking = rank_scores(scores, labels, SingleComm(), device)
    groups, totals = ranking.groups, (ranking.num_positives, ranking.num_negatives)
    calls: dict[str, Callable[[], Any]] = {
        "check": lambda: count_bad_rows(scores, labels, device),
        "sort and group": lambda: groups_of_rows(scores, labels, np.int32, device),
        "rank statistic (AUC)": lambda: score_sums.rank_statistic(groups, device),
        "losses": lambda: score_sums.loss_sums(groups, 1 / 64, device),
        "calibration bins": lambda: score_sums.bin_sums(groups, 0, ranking.num_rows, 20, device),
        "histogram": lambda: score_sums.histogram_sums(groups, -8.0, 2.0, 50, device),
        "average precision": lambda: score_sums.precision_sums(groups, (0, 0), device),
        "ROC points": lambda: score_sums.curve_points(groups, (0, 0), totals, (199, 199), device),
    }
    times.update({name: seconds(call, repetitions) for name, call in calls.items()})
    return len(groups)


def library_sort(device: Any, rows: int, repetitions: int) -> float:
    """Seconds of CuPy's own sort of as many 64-bit keys: what the sort of (score, label) pairs replaces."""
    keys = device.xp.random.randint(0, 2**62, rows, dtype=np.int64)

    def work() -> None:
        copy = keys.copy()
        copy.sort()
        device.to_host(copy[:1])

    return seconds(work, repetitions)


def beside_steps(scores: Any, labels: Any, device: Any, repetitions: int, times: dict[str, float]) -> None:
    """Time a hundred steps of two large products, issued two steps ahead, alone and with a scoring beside them."""
    xp = device.xp
    weight = xp.ones((8192, 8192), np.float16)
    out = xp.empty_like(weight)

    def steps() -> None:
        events = []
        for _ in range(100):
            for _ in range(2):
                xp.matmul(weight, weight, out=out)
            events.append(device.record())
            if len(events) > 2:
                events[-3].synchronize()
        events[-1].synchronize()

    def score() -> None:
        with device.on("scoring", (ready,)):
            evaluate_scores(scores, labels, SingleComm(), device)

    def both() -> None:
        thread = threading.Thread(target=score)
        thread.start()
        steps()
        thread.join()

    ready = device.record()
    times["a hundred steps alone"] = seconds(steps, repetitions)
    times["a hundred steps with a scoring"] = seconds(both, repetitions)


def on_gpu(options: argparse.Namespace) -> tuple[dict[str, float], dict[str, Any]]:
    """Times, and what they are of."""
    from dlrm.cuda import CudaDevice, count_gpus

    comm = world(launched_ranks())
    topology = discover(comm)
    device = CudaDevice(topology.local_rank % count_gpus())
    carriers: dict[str, Any] = {"staged": None}
    if comm.size > 1 and topology.local_size <= count_gpus():
        from embedding.comm_nccl import NcclComm

        carriers["NCCL"] = NcclComm(comm, device.index)
    scores, labels = make_rows(device.xp, share_of(options.rows, comm.size, comm.rank), 1 + comm.rank)
    device.synchronize()
    times = {}
    for name, carrier in carriers.items():
        work = partial(evaluate_scores, scores, labels, comm, device, carrier)
        comm.barrier()
        times["all metrics and curves" + (f", {name}" if comm.size > 1 else "")] = seconds(work, options.repetitions)
        metrics = work()[0]
    facts = {"device": device.name, "ranks": comm.size, "rows": options.rows, **metrics.to_values()}
    if comm.size == 1:
        facts["distinct scores"] = parts(scores, labels, device, options.repetitions, times)
        times["CuPy's sort of as many 64-bit keys"] = library_sort(device, options.rows, options.repetitions)
        beside_steps(scores, labels, device, options.repetitions, times)
        facts |= on_cpu(device.to_host(scores), device.to_host(labels), options, times)
        assert "AUC on the CPU" not in facts or facts["AUC on the CPU"] == facts["auc"], "the CPU's AUC has other bits"
        few = scores[: options.sample], labels[: options.sample]
        work = partial(evaluate_scores, *few, SingleComm(), device)
        times["sample, all metrics on the GPU"] = seconds(work, options.repetitions)
    elif "NCCL" in carriers:
        carriers["NCCL"].close()
    comm.barrier()
    return (times, facts) if comm.rank == 0 else ({}, {})


def on_cpu(scores: Any, labels: Any, options: argparse.Namespace, times: dict[str, float]) -> dict[str, Any]:
    """The same rows on the CPU, and a sample of them also by scikit-learn."""
    facts: dict[str, Any] = {}
    if not options.no_host:
        evaluate_scores(scores[:1000], labels[:1000], SingleComm())  # compiles
        start = time.perf_counter()
        metrics, _ = evaluate_scores(scores, labels, SingleComm())
        times["all metrics and curves on the CPU, once"] = time.perf_counter() - start
        facts |= {"AUC on the CPU": metrics.auc, "log loss on the CPU": metrics.log_loss}
    few, truth = scores[: options.sample], labels[: options.sample]
    facts["sample"] = len(few)
    work = partial(evaluate_scores, few, truth, SingleComm())
    times["sample, all metrics on the CPU"] = seconds(work, 3)
    try:
        from sklearn.metrics import roc_auc_score
    except ImportError:
        print("scikit-learn is not installed: its figures are left out", file=sys.stderr)
        return facts
    times["sample, scikit-learn's AUC alone"] = seconds(partial(roc_auc_score, truth, few), 3)
    facts["sample, AUC less scikit-learn's"] = work()[0].auc - roc_auc_score(truth, few)
    return facts


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=TERABYTE_TEST_ROWS, help="of all ranks")
    parser.add_argument("--sample", type=int, default=5_000_000, help="rows that scikit-learn gets")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--cpu", action="store_true", help="no GPU")
    parser.add_argument("--no-host", action="store_true", help="leave out all rows on the CPU")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    if options.cpu:
        times: dict[str, float] = {}
        facts = {"rows": options.rows, **on_cpu(*make_rows(np, options.rows, 1), options, times)}
    else:
        times, facts = on_gpu(options)
    for name, value in facts.items():
        print(f"{name:<50} {value}")
    for name, value in times.items():
        print(f"{name:<50} {value * 1e3:12,.3f} ms")
    if options.json and facts:
        options.json.write_text(json.dumps({**facts, "seconds": times}, indent=1) + "\n")


if __name__ == "__main__":
    main()
