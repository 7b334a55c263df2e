"""The charts of a check's report, from the values of ``data_check.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.charts import Axis, Mark, Point, decade_axis, draw, linear_axis, outline, percent, plain

Values = Mapping[str, Any]
_TONES = ("a", "b", "c", "d")


def tones(values: Values) -> dict[str, str]:
    """A colour for each split, the reference first."""
    names = sorted(values["splits"], key=lambda name: name != values["reference"])
    return {name: _TONES[number % len(_TONES)] for number, name in enumerate(names)}


def dense_chart(column: Values, number: int, tone_of: Mapping[str, str]) -> str:
    """Histograms of a dense column in every split, or nothing where it has no values."""
    found = column["histogram"]
    if not found:
        return ""
    edges, shares = found["edges"], found["shares"]
    marks = [
        Mark(points=outline(edges, shares[split]), tone=tone, kind="area" if tone == "a" else "line", label=split)
        for split, tone in tone_of.items()
        if split in shares
    ]
    top = [max(heights) for heights in shares.values()]
    label = "Value" if column["transform"] == "as_is" else "log(1 + value), as training reads it"
    return draw(
        name=f"dense-{number}",
        title=f"Dense column {column['name']}",
        description=f"Share of the values in {len(edges) - 1} bins, split by split.",
        x=linear_axis(label, (), low=edges[0], high=edges[-1]),
        y=linear_axis("", [0.0, *top], low=0, text=percent),  # the page says what it is
        marks=marks,
    )


def frequency_chart(table: Values, number: int) -> str:
    """Look-ups of a table's rows by rank, and the power law that fits them, or nothing where none was looked up."""
    curve = table["curve"]
    if not curve:
        return ""
    points = [
        (math.log10(rank), math.log10(count))
        for rank, count in zip(curve["rank"], curve["count"], strict=True)
        if count
    ]
    marks = [Mark(points=points, kind="area", label="look-ups")]
    exponent = table["exponent"]
    if exponent is not None:
        marks.append(_power_law(points, exponent))
    described = "no power law fits" if exponent is None else f"falling as rank to the power of -{exponent:.2f}"
    return draw(
        name=f"table-{number}",
        title=f"Table {table['name']}",
        description=f"Look-ups of a row over its rank by frequency, both logarithmic; {described}.",
        x=decade_axis("Rank by frequency", 0, max(point[0] for point in points)),
        y=decade_axis("Look-ups of a row", 0, max(point[1] for point in points)),
        marks=marks,
    )


def _power_law(points: Sequence[Point], exponent: float) -> Mark:
    """The fitted line through the middle of the points with at least 10 look-ups."""
    heights = sorted(y + exponent * x for x, y in points if y >= 1)
    height = heights[len(heights) // 2]
    end = max(x for x, _ in points)
    if exponent > 0:
        end = min(end, height / exponent)
    return Mark(
        points=[(0.0, height), (end, height - exponent * end)],
        tone="b",
        kind="rule",
        label=f"exponent {exponent:.2f}",
    )


def unseen_chart(values: Values) -> str:
    """Unseen look-ups of every table and split, or nothing without another split."""
    tables = values["tables"]
    others = {split: tone for split, tone in tones(values).items() if split != values["reference"]}
    marks, tops = [], [0.0]
    for split, tone in others.items():
        found = [(number, table["unseen"].get(split)) for number, table in enumerate(tables, 1)]
        points = [(float(number), share) for number, share in found if share is not None]
        hints = [f"{tables[int(number) - 1]['name']}: {percent(share)} of {split}" for number, share in points]
        if points:
            marks.append(Mark(points=points, tone=tone, kind="dots", label=split, hints=hints))
            tops += [share for _, share in points]
    if not marks:
        return ""
    row_0 = [max(table["row_0"].get(split) or 0.0 for split in others) for table in tables]
    marks.append(
        Mark(
            points=[(float(number), share) for number, share in enumerate(row_0, 1)],
            tone="d",
            kind="dots",
            label="row 0",
            hints=[f"{table['name']}: {percent(share)} on row 0" for table, share in zip(tables, row_0, strict=True)],
        )
    )
    tops += row_0
    return draw(
        name="unseen",
        title="Unseen look-ups",
        description=f"Share of each table's look-ups whose key split {values['reference']} never has.",
        x=_table_axis(len(tables)),
        y=linear_axis("Share of the look-ups", tops, low=0, text=percent),
        marks=marks,
    )


def _table_axis(count: int) -> Axis:
    """Tables by number, with whole numbers as ticks."""
    step = max(1, -(-count // 12))
    ticks = tuple((float(number), plain(number)) for number in range(1, count + 1, step))
    return Axis(label="Table, in the order of the set", low=0.5, high=count + 0.5, ticks=ticks)
