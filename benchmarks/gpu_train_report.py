"""What ``gpu_train.py`` prints and writes for RESULTS.md, from its figures as plain values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

OURS = ("ours", "ranks", "full", "raw", "eval")
PEERS = ("torch", "fbgemm")
LOSS_TOLERANCE = 0.005
"""Relative; forms of one case whose losses differ by more do not train alike."""

Figure = Mapping[str, Any]


def law(exponent: float) -> str:
    """Name of a law of keys."""
    return f"power law {exponent:g}" if exponent else "uniform"


def case_of(figure: Figure) -> str:
    """A figure's name."""
    return f"{figure['form']}, batch {figure['batch']:,}, {law(figure['exponent'])}"


def cases(figures: Sequence[Figure]) -> list[tuple[int, float]]:
    """Batch and exponent of each case, in the order of measuring."""
    return list(dict.fromkeys((figure["batch"], figure["exponent"]) for figure in figures))


def trains(figure: Figure) -> bool:
    """Whether it is a training rate of one GPU with tables of the common sizes."""
    return figure["section"] in {"ours", *PEERS} and not figure["form"].endswith(", forward")


def rate_of(figures: Sequence[Figure], form: str, case: tuple[int, float]) -> float | None:
    """Rate of a form in a case."""
    for figure in figures:
        if figure["form"] == form and (figure["batch"], figure["exponent"]) == case:
            return figure["samples_per_s"]  # type: ignore[no-any-return]
    return None


def best_peer(figures: Sequence[Figure], case: tuple[int, float]) -> Figure | None:
    """The fastest PyTorch form that trains in a case."""
    there = [
        figure
        for figure in figures
        if figure["section"] in PEERS
        and trains(figure)
        and figure["samples_per_s"]
        and (figure["batch"], figure["exponent"]) == case
    ]
    return max(there, key=lambda figure: figure["samples_per_s"], default=None)


def rows(figures: Sequence[Figure]) -> Iterator[tuple[str, list[str]]]:
    """Training rates: a name, and in each case the rate and how many times as fast ours is."""
    columns = cases([figure for figure in figures if trains(figure)])
    forms = dict.fromkeys(figure["form"] for figure in figures if trains(figure))
    for form in forms:
        cells = []
        for case in columns:
            rate, ours = rate_of(figures, form, case), rate_of(figures, "crosslane", case)
            cell = f"{rate / 1e6:.2f}" if rate else "-"
            if rate and ours and form != "crosslane":
                cell += f" ({ours / rate:.2f})"
            cells.append(cell)
        yield form, cells
    cells = []
    for case in columns:
        best, ours = best_peer(figures, case), rate_of(figures, "crosslane", case)
        cells.append(f"{ours / best['samples_per_s']:.2f} ({best['form']})" if best and ours else "-")
    yield "ours over the fastest PyTorch form", cells


def other_lines(figures: Sequence[Figure]) -> Iterator[str]:
    """Everything that is no training rate of one GPU in the common shape."""
    for figure in figures:
        if trains(figure) or not figure["samples_per_s"]:
            continue
        rate, case = figure["samples_per_s"], (figure["batch"], figure["exponent"])
        text = f"{case_of(figure)}: {rate / 1e6:.2f} M samples/s"
        ours = rate_of(figures, "crosslane", case)
        if figure["gpus"] > 1:
            text += f", {rate / figure['gpus'] / 1e6:.2f} a GPU"
        if ours and figure["section"] in {"raw", "full", "ranks"}:
            text += f", {rate / figure['gpus'] / ours:.1%} of one GPU with rows in its memory"
        yield text


def unlike_losses(figures: Sequence[Figure]) -> Iterator[str]:
    """Forms of one case that do not come to the same loss: their rates are of another computation."""
    for case in cases(figures):
        losses = {
            figure["form"]: figure["details"]["loss"]
            for figure in figures
            if figure["section"] in PEERS
            and trains(figure)
            and figure["samples_per_s"]
            and (figure["batch"], figure["exponent"]) == case
        }
        if not losses:
            continue
        middle = sorted(losses.values())[len(losses) // 2]
        for form, loss in losses.items():
            if not abs(loss - middle) <= LOSS_TOLERANCE * abs(middle):
                yield f"{form}, batch {case[0]:,}, {law(case[1])}: loss {loss:.4f}, but the others come to {middle:.4f}"


def print_table(about: Mapping[str, Any], figures: Sequence[Figure]) -> None:
    """Everything, for a terminal."""
    columns = cases([figure for figure in figures if trains(figure)])
    print(f"\n{'; '.join(about['gpus'])}; {about['rows']:,} rows of tables; medians of {about['windows']} windows")
    print("M samples/s; in brackets: ours over it")
    heads = [f"{batch:,}, {law(exponent)}" for batch, exponent in columns]
    print(f"{'':36}" + "".join(f"{head:>28}" for head in heads))
    for form, cells in rows(figures):
        print(f"{form:36}" + "".join(f"{cell:>28}" for cell in cells))
    for line in other_lines(figures):
        print(line)
    for line in unlike_losses(figures):
        print(f"WARNING: {line}")
    for figure in figures:
        if figure["error"]:
            print(f"no figure: {case_of(figure)}: {figure['error']}")


def markdown(about: Mapping[str, Any], figures: Sequence[Figure]) -> str:
    """The section for RESULTS.md."""
    columns = cases([figure for figure in figures if trains(figure)])
    versions = sorted({figure["details"]["version"] for figure in figures if figure["details"].get("version")})
    software = ", ".join(versions) or "no PyTorch in this run"
    lines = [
        f"## Training on GPUs, {about['date']}",
        "",
        *(f"    {command}" for command in about["command"].split("; ")),
        "",
        f"{'; '.join(about['gpus'])}; {about['cores']} cores; {software}. Tables of {about['rows']:,} rows x 128.",
        f"M samples/s, medians of {about['windows']} windows; in brackets how many times as fast ours is.",
        "",
        "| | " + " | ".join(f"{batch:,}, {law(exponent)}" for batch, exponent in columns) + " |",
        "| --- |" + " ---: |" * len(columns),
        *(f"| {form} | " + " | ".join(cells) + " |" for form, cells in rows(figures)),
        "",
        *(f"- {line}" for line in other_lines(figures)),
        *(f"- Does not train as the others do: {line}" for line in unlike_losses(figures)),
        *(f"- No figure: {case_of(figure)}: {figure['error']}" for figure in figures if figure["error"]),
        "",
    ]
    return "\n".join(lines)
