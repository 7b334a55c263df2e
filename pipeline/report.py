"""The evaluation report: ``report.json`` for programs, ``report.html`` for people.

The page is one file without script or request: charts are inline SVG, colours follow the reader's light or
dark setting, and it prints. docs/report.md explains every key and every figure.
"""

from __future__ import annotations

import datetime as dt
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dlrm.errors import CrosslaneError
from pipeline import report_charts
from pipeline.curves import Curves
from pipeline.lanes_chart import caption, lanes_chart
from pipeline.metrics import Metrics
from pipeline.page import count, duration, finite, render_page, replace_file, show_value

# Above this many step records the report keeps every second, third, ... and the last.
MAX_STEP_RECORDS = 2000

_HISTORY_FIELDS = (
    *("type", "step", "epoch", "samples", "samples_per_s", "loss", "lr", "skipped_steps"),
    *("split", "seconds", "metrics"),
)


def build_report(
    *,
    metrics: Metrics,
    curves: Curves,
    seconds: float,
    config: Mapping[str, Any],
    dataset_summary: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]] = (),
    run_info: Mapping[str, Any] | None = None,
    samples_per_s: float | None = None,
    lanes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The values of ``report.json``.

    Args:
        metrics: of the evaluated split.
        curves: of the evaluated split.
        seconds: wall time of the run, or of the evaluation alone.
        config: the run's config, every field written out.
        dataset_summary: what is known of the data set.
        history: ``step`` and ``eval`` records of ``progress.jsonl``, in order.
        run_info: ranks, threads, machine, versions, plan, stop reason, stage times and the like.
        samples_per_s: training samples per second over the run; ``None`` without training.
        lanes: what ran beside what, by ``train`` and ``eval`` (``run_trace.read_lanes``); ``None``: nothing was traced.

    Returns:
        Plain JSON values; numbers that are not finite have become ``None``.
    """
    report = {
        **metrics.to_values(),
        "samples_per_s": samples_per_s,
        "seconds": seconds,
        "created": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "config": dict(config),
        "dataset": dict(dataset_summary),
        "curves": curves.to_values(),
        "history": _thin(history),
        "lanes": dict(lanes or {}),
        "run": dict(run_info or {}),
    }
    cleaned: dict[str, Any] = finite(report)
    return cleaned


def write_report(directory: str | Path, report: Mapping[str, Any]) -> tuple[Path, ...]:
    """Write ``report.json`` and ``report.html``, each appearing only once complete.

    A run does not fail for its page: where jinja2 is not installed, a line on standard error says that it is missing.

    Args:
        directory: folder to write into; made if missing.
        report: what ``build_report`` returned.

    Returns:
        The files written.

    Raises:
        CrosslaneError: they cannot be written.
    """
    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(report, indent=1, allow_nan=False) + "\n"
        written = replace_file(folder / "report.json", text)
        try:
            page = render_html(report)
        except ImportError:
            print("warning: report.html is not written, since jinja2 is not installed", file=sys.stderr)
            return (written,)
        return written, replace_file(folder / "report.html", page)
    except OSError as error:
        raise CrosslaneError(
            f"report {error.filename or folder}: {error.strerror or error}; name a folder that can be written"
        ) from None


def render_html(report: Mapping[str, Any]) -> str:
    """The report as one self-contained HTML page."""
    from markupsafe import Markup

    charts = {
        name: Markup(getattr(report_charts, f"{name}_chart")(report))  # noqa: S704 every text in it is escaped there
        for name in ("roc", "precision_recall", "calibration", "histogram", "loss", "auc")
    }
    run, dataset = report["run"], report["dataset"]
    return render_page(
        "report.html",
        report=report,
        name=str(report["config"].get("name", "run")),
        charts=charts,
        headline=headline(report),
        run_rows=run_rows(report),
        dataset_rows=dataset_rows(dataset),
        stages=stage_rows(run.get("stages_ms")),
        lanes=[
            {**figure, "chart": Markup(figure["chart"])}  # noqa: S704 every text in it is escaped there
            for figure in lanes_figures(report["lanes"])
        ],
        plan=run.get("plan") or [],
        config=yaml.safe_dump(report["config"], sort_keys=False, allow_unicode=True),
        source=dataset.get("source"),
        licence=dataset.get("licence"),
        notes=[str(note) for note in dataset.get("notes") or ()],
    )


def headline(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """The large numbers: label, value, and how to read it."""
    one_class = "not defined: the split has one class only" if report["samples"] else "not defined: no rows"
    rate = report["base_rate"]

    def tile(label: str, key: str, digits: int, note: str, missing: str = one_class) -> dict[str, str]:
        number = report[key]
        return {
            "label": label,
            "value": "\N{EN DASH}" if number is None else f"{number:.{digits}f}",
            "note": missing if number is None else note,
        }

    tiles = [
        tile("AUC", "auc", 5, "0.5 is chance, 1 is perfect"),
        tile("Log loss", "log_loss", 5, "nats per row; lower is better"),
        tile("Normalised entropy", "normalized_entropy", 4, "below 1 beats the base rate"),
        tile("Calibration", "calibration", 4, "mean prediction / base rate; 1 is perfect"),
        tile("Accuracy", "accuracy", 4, _majority(rate)),
    ]
    speed = report["samples_per_s"]
    if speed is not None:
        tiles.append({"label": "Training speed", "value": count(speed), "note": "samples per second"})
    return tiles


def run_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The table of the run: label and text."""
    run = dict(report["run"])
    shown = [
        ("Evaluated split", run.pop("split", None)),
        ("Rows evaluated", count(report["samples"])),
        ("Positives", f"{count(report['positives'])}{_rate_text(report['base_rate'])}"),
        ("Steps trained", run.pop("step", None)),
        ("Samples trained", run.pop("samples", None)),
        ("Ended because", _REASONS.get(str(run.get("reason")), run.get("reason"))),
        ("Wall time", duration(report["seconds"])),
        ("Training time", run.pop("train_seconds", None)),
        ("Evaluation time", run.pop("evaluation_seconds", None)),
        ("Device", run.pop("device", None)),
        ("Ranks", run.pop("ranks", None)),
        ("Threads per rank", run.pop("threads", None)),
        ("Dense parameters", run.pop("dense_parameters", None)),
        ("Embedding parameters", run.pop("table_parameters", None)),
        ("Precision", _precision(report["config"])),
        ("Steps skipped", run.pop("skipped_steps", None)),
        ("Exchange between GPUs", run.pop("carrier", None)),
        ("Batches run again", run.pop("overflows", None)),
        ("Machine", run.pop("machine", None)),
        ("Versions", run.pop("versions", None)),
        ("Checkpoint", run.pop("checkpoint", None)),
    ]
    for key in ("reason", "seconds", "samples_per_s", "stages_ms", "plan"):
        run.pop(key, None)
    shown += [(key.replace("_", " ").capitalize(), value) for key, value in run.items()]
    return [
        (label, duration(value) if label.endswith(" time") and not isinstance(value, str) else show_value(value))
        for label, value in shown
        if value is not None
    ]


def _precision(config: Mapping[str, Any]) -> str | None:
    """Of products, of tables where they differ, and the loss scale where there is one."""
    precision = config.get("precision")
    if precision is None:
        return None
    words = [str(precision)]
    tables = (config.get("embedding") or {}).get("table_precision")
    if tables not in (None, precision):
        words.append(f"tables {tables}")
    if precision == "fp16":
        words.append(f"loss scale {config.get('loss_scale')}")
    return ", ".join(words)


_REASONS = {
    "finished": "all steps were done",
    "target": "the target metric was reached",
    "early_stop": "the metric no longer improved",
    "stopped": "it was asked to stop",
}


def dataset_rows(dataset: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The table of the data set: label and text; what is long stands below the tables."""
    rows = []
    left_out = {"notes", "hotness", "licence", "source"}
    if not dataset.get("num_dense"):
        left_out |= {"dense_dtype", "dense_transform"}
    for key, value in dataset.items():
        if value is None or key in left_out:
            continue
        if key == "table_rows" and isinstance(value, Mapping):
            rows.append(("Rows of all tables", count(sum(value.values()))))
        else:
            label = key.removeprefix("num_").replace("_", " ").capitalize()
            rows.append((_LABELS.get(key, label), show_value(value)))
    return rows


_LABELS = {
    "num_dense": "Dense columns",
    "num_tables": "Embedding tables",
    "dense_dtype": "Dense type",
    "key_dtype": "Key type",
}


def stage_rows(stages_ms: Mapping[str, float] | None) -> list[dict[str, str]]:
    """Time of each stage: name, milliseconds per step, share of the sum and of the longest in percent."""
    stages = {name: value for name, value in (stages_ms or {}).items() if value}
    total, longest = sum(stages.values()), max(stages.values(), default=1.0)
    digits = 2 if longest >= 1 else 3
    return [
        {
            "name": name.replace("_", " "),
            "ms": f"{value:.{digits}f}",
            "percent": f"{100 * value / total:.1f}",
            "width": f"{100 * value / longest:.1f}",
        }
        for name, value in stages.items()
    ]


def lanes_figures(lanes: Mapping[str, Any]) -> list[dict[str, str]]:
    """Pictures of the two lanes: title, SVG and what lies below it."""
    figures = []
    for what, word, title in (("train", "step", "training steps"), ("eval", "batch", "evaluation batches")):
        if chart := lanes_chart(lanes[what], f"lanes-{what}", word) if what in lanes else "":
            numbers = ", ".join(f"{tick:,}" for tick in lanes[what]["ticks"][:12])
            more = " and more" if len(lanes[what]["ticks"]) > 12 else ""
            figures.append(
                {
                    "title": f"The two lanes: {title} {numbers}{more}",
                    "chart": chart,
                    "caption": caption(lanes[what]),
                }
            )
    return figures


def _majority(rate: float | None) -> str:
    return "" if rate is None else f"the larger class alone: {max(rate, 1 - rate):.4f}"


def _rate_text(rate: float | None) -> str:
    return "" if rate is None else f" ({100 * rate:.4g} %)"


def _thin(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    steps = sum(record.get("type") == "step" for record in history)
    stride = -(-steps // MAX_STEP_RECORDS) or 1
    kept, seen = [], 0
    for record in history:
        if record.get("type") == "step":
            seen += 1
            if seen % stride and seen != steps:
                continue
        kept.append({key: record[key] for key in _HISTORY_FIELDS if key in record})
    return kept
