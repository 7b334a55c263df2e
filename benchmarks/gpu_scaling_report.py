"""What ``gpu_scaling.py`` prints, writes for RESULTS.md and draws, from its figures as plain values."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.charts import Axis, Mark, draw, linear_axis

Figure = Mapping[str, Any]
Table = tuple[str, Sequence[str], list[list[str]]]
"""A title, the columns' heads, rows of cells."""

GROUPS = {
    "exchange": ("input_dist", "output_dist", "grad_dist", "reduce_replicated"),
    "look-up": ("lookup",),
    "update": ("sum_replicated", "sparse_update"),
    "all-reduce": ("reduce_top", "reduce_bottom"),
    "dense": (
        "bottom_forward", "top_forward", "loss", "top_backward", "bottom_backward", "top_weight_backward",
        "dense_update",
    ),
}  # fmt: skip
EMBEDDING_LANE = ("exchange", "look-up", "update")

NVIDIA_TRAINING = (
    ("8 H100, HugeCTR, MLPerf v2.1, without evaluation", 8, 64.4e6),
    ("8 H100, HugeCTR, MLPerf v2.1, with evaluation", 8, 59.2e6),
    ("8 A100, HugeCTR, MLPerf v2.0", 8, 37.1e6),
)
"""Published: name, GPUs, samples/s of all at a global batch of 55,296 and 187.8 M rows."""
NVIDIA_EVALUATION = ("8 H100, HugeCTR, MLPerf v2.1", 8, 317e6)
MLPERF_TRAINING_ROWS = 4_195_197_692
MLPERF_EVALUATIONS = 20
"""An epoch's: one every 5 %."""
AIM_SHARE, AIM_RATE, AIM_COUNT = 0.9, 70e6, 8

_STYLE = (
    "<style>.chart{font:12.5px system-ui,sans-serif;background:#fff}.grid path{stroke:#ddd}"
    ".frame{stroke:#555;fill:none}.tick text,.axis text,.legend text{fill:#333}"
    ".line,.rule{fill:none;stroke-width:2}.rule{stroke-dasharray:5 4;stroke:#888}"
    ".line.tone-a{stroke:#1f6fb4}.line.tone-b{stroke:#c7502c}.line.tone-c{stroke:#2c8a4b}.line.tone-d{stroke:#7a4fa3}"
    ".dots.tone-a{fill:#1f6fb4}.dots.tone-b{fill:#c7502c}.dots.tone-c{fill:#2c8a4b}.dots.tone-d{fill:#7a4fa3}</style>"
)


def groups_ms(figure: Figure) -> dict[str, float]:
    """Milliseconds of a step by group of stages; empty where no stage was timed."""
    stages = (figure["details"] or {}).get("stages_ms") or {}
    return (
        {name: sum(stages.get(stage, 0.0) for stage in members) for name, members in GROUPS.items()} if stages else {}
    )


def step_ms(figure: Figure) -> float:
    """Milliseconds of a step, from its rate."""
    return 1e3 * figure["batch"] * figure["gpus"] / float(figure["samples_per_s"])


def of_section(figures: Sequence[Figure], section: str) -> list[Figure]:
    """Figures of a section that have a rate."""
    return [figure for figure in figures if figure["section"] == section and figure["samples_per_s"]]


def alone(figures: Sequence[Figure], batch: int) -> Figure | None:
    """One GPU with so many rows."""
    found = [f for f in of_section(figures, "weak") if (f["batch"], f["gpus"]) == (batch, 1)]
    return found[0] if found else None


def share_of_one(figures: Sequence[Figure], figure: Figure) -> float | None:
    """A GPU's rate over that of one alone with as many rows; ``None`` where that was not measured."""
    one = alone(figures, figure["batch"])
    return None if one is None else figure["samples_per_s"] / figure["gpus"] / one["samples_per_s"]


def predicted_ms(figures: Sequence[Figure], figure: Figure) -> tuple[float | None, float | None]:
    """What the plan expects of the embedding lane, and with one GPU's dense part the step, nothing overlapped."""
    lane = ((figure["details"] or {}).get("plan") or {}).get("predicted_ms")
    one = alone(figures, figure["batch"])
    dense = groups_ms(one).get("dense") if one else None
    return lane, None if lane is None or dense is None else lane + dense


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _stage_cells(figure: Figure) -> list[str]:
    groups = groups_ms(figure)
    return [_number(groups.get(name), 3) for name in GROUPS]


def weak_table(figures: Sequence[Figure]) -> Table:
    """Rates over the number of GPUs."""
    rows = [
        [
            str(f["gpus"]), f"{f['batch']:,}", _number(f["samples_per_s"] / 1e6),
            _number(f["samples_per_s"] / f["gpus"] / 1e6), _percent(share_of_one(figures, f)),
            _number(step_ms(f), 3), *_stage_cells(f),
        ]
        for f in sorted(of_section(figures, "weak"), key=lambda f: (-f["batch"], f["gpus"]))
    ]  # fmt: skip
    heads = ["GPUs", "rows a GPU", "M samples/s", "a GPU", "of one GPU's", "step, ms", *GROUPS]
    return "Weak scaling; stages in ms, each alone on its stream, lanes lie beside each other", heads, rows


def mlperf_table(figures: Sequence[Figure], *, peers: bool) -> Table:
    """MLPerf's configuration, with ``peers`` beside NVIDIA's published figures."""
    rows = []
    for f in of_section(figures, "mlperf"):
        rows.append([f"{f['gpus']} here, {f['form']}", *_rates(f["samples_per_s"], f["gpus"]), *_stage_cells(f)])
        evaluations = [e for e in of_section(figures, "eval") if e["gpus"] == f["gpus"]]
        if evaluations and peers:  # of MLPerf's rows
            best = max(evaluations, key=lambda e: e["samples_per_s"])
            seconds = MLPERF_EVALUATIONS * best["details"]["evaluation_seconds"]
            rate = MLPERF_TRAINING_ROWS / (MLPERF_TRAINING_ROWS / f["samples_per_s"] + seconds)
            name = f"the same, and {MLPERF_EVALUATIONS} evaluations an epoch ({best['form']}), computed"
            rows.append([name, *_rates(rate, f["gpus"]), *[""] * len(GROUPS)])
    if rows and peers:
        rows += [[name, *_rates(rate, count), *[""] * len(GROUPS)] for name, count, rate in NVIDIA_TRAINING]
    note = "; NVIDIA's are published" if peers else ""
    return f"MLPerf v2.0's configuration{note}", ["", "M samples/s", "a GPU", *GROUPS], rows


def _rates(rate: float, count: int) -> list[str]:
    return [_number(rate / 1e6), _number(rate / count / 1e6)]


def plan_table(figures: Sequence[Figure]) -> Table:
    """Plans, predicted and measured."""
    rows = []
    for f in of_section(figures, "plans"):
        groups, (lane, step) = groups_ms(f), predicted_ms(figures, f)
        measured = sum(groups[name] for name in EMBEDDING_LANE) if groups else None
        label = ((f["details"] or {}).get("plan") or {}).get("label", "-")
        rows.append(
            [
                f"{f['form']}: {label}", str(f["gpus"]), f"{f['batch']:,}", _number(f["samples_per_s"] / 1e6),
                _number(lane, 3), _number(measured, 3), _number(step, 3), _number(step_ms(f), 3),
            ]
        )  # fmt: skip
    heads = [
        "plan", "GPUs", "rows a GPU", "M samples/s", "lane predicted, ms", "measured", "step predicted", "measured",
    ]  # fmt: skip
    title = "Plans; a predicted step is the lane's prediction and one GPU's dense part, without overlap and all-reduce"
    return title, heads, rows


def evaluation_table(figures: Sequence[Figure], *, peers: bool) -> Table:
    """Evaluations with their AUC, with ``peers`` beside NVIDIA's."""
    rows = []
    for f in of_section(figures, "eval"):
        details = f["details"]
        scoring, seconds = details["evaluation_scoring_seconds"], details["evaluation_seconds"]
        forward = details["samples"] / (seconds - scoring) / 1e6
        rows.append(
            [
                f"{f['gpus']} here, {f['form']}", f"{details['samples']:,}", _number(f["samples_per_s"] / 1e6),
                _number(forward), _number(1e3 * scoring, 1), _number(seconds, 3),
            ]
        )  # fmt: skip
    if rows and peers:
        name, _, rate = NVIDIA_EVALUATION
        rows.append([f"{name}, published", "89,137,319", _number(rate / 1e6), "", "", ""])
    heads = ["", "rows", "M rows/s, AUC in it", "forward alone", "AUC, ms", "seconds"]
    return "Evaluation", heads, rows


def auc_table(figures: Sequence[Figure]) -> Table:
    """Time to a target."""
    rows = [
        [
            str(f["gpus"]), f["form"], _number(f["details"]["seconds"], 1), f"{f['details']['samples']:,}",
            _number(f["details"]["start_up_s"], 1), _percent(f["details"]["evaluation_share"]),
        ]
        for f in sorted(of_section(figures, "auc"), key=lambda f: f["gpus"])
    ]  # fmt: skip
    return "Time to AUC, from process start", ["GPUs", "", "seconds", "samples", "start-up, s", "evaluations"], rows


def tables(about: Mapping[str, Any], figures: Sequence[Figure]) -> Iterator[Table]:
    """All that have rows; what CPU ranks reach stands beside no GPU's."""
    peers = about["device"] == "cuda"
    made = (
        weak_table(figures),
        mlperf_table(figures, peers=peers),
        plan_table(figures),
        evaluation_table(figures, peers=peers),
        auc_table(figures),
    )
    for title, heads, rows in made:
        if rows:
            yield title, heads if peers else [head.replace("GPU", "rank") for head in heads], rows


def aims(figures: Sequence[Figure]) -> Iterator[str]:
    """What was asked for on eight GPUs, where it was measured."""
    for f in of_section(figures, "weak"):
        share = share_of_one(figures, f)
        if (f["gpus"], f["batch"]) == (AIM_COUNT, 65_536) and share is not None:
            yield f"{AIM_COUNT} GPUs at 65,536 a GPU: {share:.1%} of one GPU's rate, aim {AIM_SHARE:.0%}"
    for f in of_section(figures, "mlperf"):
        if f["gpus"] == AIM_COUNT and f["batch"] * AIM_COUNT == 55_296:
            rate = f["samples_per_s"] / 1e6
            yield f"{AIM_COUNT} GPUs at global batch 55,296: {rate:.1f} M samples/s, aim {AIM_RATE / 1e6:.0f}"


def left_out(figures: Sequence[Figure]) -> Iterator[str]:
    """What has no figure, and why."""
    for f in figures:
        if f["error"]:
            yield f"{f['section']}: {f['form']}, {f['gpus']} x {f['batch']:,} rows: {f['error']}"


def _unit(about: Mapping[str, Any]) -> str:
    return "GPUs" if about["device"] == "cuda" else "CPU ranks, which share the cores"


def print_report(about: Mapping[str, Any], figures: Sequence[Figure]) -> None:
    """Everything, for a terminal."""
    print(f"\n{'; '.join(about['gpus'])}; {about['cores']} cores; {_unit(about)}")
    for title, heads, rows in tables(about, figures):
        print(f"\n{title}")
        widths = [max(len(row[i]) for row in [list(heads), *rows]) for i in range(len(heads))]
        for row in [list(heads), *rows]:
            print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    print()
    for line in aims(figures):
        print(line)
    for line in left_out(figures):
        print(f"no figure: {line}")


def markdown(about: Mapping[str, Any], figures: Sequence[Figure]) -> str:
    """The section for RESULTS.md."""
    machine = "; ".join(about["gpus"]) if about["device"] == "cuda" else "CPU ranks"
    lines = [
        f"## Scaling over {'GPUs' if about['device'] == 'cuda' else 'CPU ranks'}, {about['date']}",
        "",
        f"    {about['command']}",
        "",
        f"{machine}; {about['cores']} cores; tables of {about['rows']:,} rows; medians of {about['windows']} windows.",
        "",
    ]
    for title, heads, rows in tables(about, figures):
        lines += [f"**{title}**", "", *_markdown_table(heads, rows), ""]
    lines += [f"- {line}" for line in aims(figures)]
    lines += [f"- No figure: {line}" for line in left_out(figures)]
    return "\n".join(lines).rstrip() + "\n"


def _markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield "| --- |" + " ---: |" * (len(heads) - 1)
    for row in rows:
        yield f"| {' | '.join(row)} |"


def picture(about: Mapping[str, Any], figures: Sequence[Figure]) -> str:
    """Rates over the number of GPUs as an SVG of its own; empty where fewer than two counts were measured."""
    weak = of_section(figures, "weak")
    counts = sorted({f["gpus"] for f in weak})
    if len(counts) < 2:
        return ""
    marks = []
    for tone, batch in zip("abcd", sorted({f["batch"] for f in weak}, reverse=True), strict=False):
        points = sorted((float(f["gpus"]), f["samples_per_s"] / 1e6) for f in weak if f["batch"] == batch)
        marks.append(Mark(points=points, tone=tone, label=f"{batch:,} rows a GPU"))
        hints = [f"{count:g}: {rate:.1f} M samples/s" for count, rate in points]
        marks.append(Mark(points=points, tone=tone, kind="dots", hints=hints))
        if (one := alone(figures, batch)) is not None:
            rate = one["samples_per_s"] / 1e6
            ideal = [(float(count), rate * count) for count in (counts[0], counts[-1])]
            marks.append(Mark(points=ideal, tone="muted", kind="rule"))
    unit = "GPUs" if about["device"] == "cuda" else "CPU ranks"
    svg = draw(
        title=f"Training rate over {unit}",
        description=f"Samples a second on {', '.join(map(str, counts))} {unit}; dashed: as many times one's rate.",
        x=Axis(label=unit, low=0, high=counts[-1] * 1.05, ticks=tuple((float(n), str(n)) for n in counts)),
        y=linear_axis("M samples/s", [at for mark in marks for _, at in mark.points], low=0),
        marks=marks,
    )
    head = '<svg xmlns="http://www.w3.org/2000/svg" width="560" height="372" '
    return svg.replace("<svg ", head, 1).replace("<title", _STYLE + "<title", 1) + "\n"
