"""Entry point of ``crosslane evaluate``, on one rank or under mpirun; light until the process is settled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dlrm.config import load_run_config
from pipeline.entry import Process, run_process
from pipeline.waking import wake_gpu


def main(
    config: str,
    *,
    overrides: Sequence[str] = (),
    checkpoint: str,
    report: str | None = None,
    scores: str | None = None,
    split: str | None = None,
    debug: bool = False,
) -> tuple[int, dict[str, Any]]:
    """Score a split with the weights of a checkpoint.

    Args:
        config: config file.
        overrides: ``field.path=value`` each.
        checkpoint: checkpoint folder; one with weights only will do.
        report: folder that gets ``report.json`` and ``report.html``.
        scores: .npy file that gets the predicted probabilities in row order.
        split: split to score; ``None``: the config's closing split.
        debug: show tracebacks.

    Returns:
        Exit code, and on rank 0 the report (empty elsewhere and on failure).
    """
    result: dict[str, Any] = {}

    def work(process: Process) -> int:
        from embedding.topology import discover

        run = load_run_config(config, overrides)
        wake_gpu(run, discover(process.comm).local_rank)

        from pipeline.checkpoint import open_checkpoint
        from pipeline.config_agreement import agree_config
        from pipeline.engine import build_engine
        from pipeline.evaluator import evaluate
        from pipeline.summary import report_of, write_report

        agree_config(run, process.comm)
        opened = open_checkpoint(Path(checkpoint), comm=process.comm)
        # On as many ranks as trained it, nothing has to be counted and measured again.
        engine = build_engine(run, comm=process.comm, threads=process.threads, saved=opened)
        engine.load_checkpoint(opened, states=False)
        evaluation = evaluate(engine, split=split, scores=Path(scores) if scores else None)
        if process.comm.rank == 0:
            result.update(report_of(engine, evaluation, stop={"checkpoint": str(opened.path), "step": opened.step}))
            if report:
                write_report(Path(report), result)
        engine.close()
        return 0

    return run_process(work, debug=debug, stoppable=False), result
