"""The report of a check: ``data_check.json`` for programs, ``data_check.html`` for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from dlrm.errors import CrosslaneError
from pipeline.charts import percent, plain
from pipeline.check import charts
from pipeline.page import count, duration, finite, render_page, replace_file

MOST_CHARTS = 200
"""So many dense columns and tables have a chart each; a page of more than that loads slowly."""

_DASH = "\N{EN DASH}"
_RESULTS = {"ok": "Sound", "warning": "Sound, with warnings", "failed": "Faulty"}
_NOTES = {
    "ok": "training reads what was written",
    "warning": "it trains; look at the warnings",
    "failed": "training would refuse it or read something else",
}


def write_check(directory: str | Path, values: Mapping[str, Any]) -> tuple[Path, Path]:
    """Write ``data_check.json`` and ``data_check.html``, each appearing only once complete.

    Args:
        directory: folder to write into; made if missing.
        values: what ``check_dataset`` returned.

    Returns:
        The two files.

    Raises:
        CrosslaneError: they cannot be written.
    """
    folder, clean = Path(directory), finite(values)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(clean, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
        return replace_file(folder / "data_check.json", text), replace_file(
            folder / "data_check.html", render_check(clean)
        )
    except OSError as error:
        raise CrosslaneError(
            f"report {error.filename or folder}: {error.strerror or error}; name a folder that can be written with "
            "--report, or leave the report out with --no-report"
        ) from None


def render_check(values: Mapping[str, Any]) -> str:
    """The report as one self-contained HTML page."""
    tone_of = charts.tones(values)
    dense = [(column["name"], charts.dense_chart(column, n, tone_of)) for n, column in enumerate(values["dense"])]
    tables = [(table["name"], charts.frequency_chart(table, t)) for t, table in enumerate(values["tables"])]
    return render_page(
        "check/page.html",
        values=values,
        tiles=tiles(values),
        splits=split_rows(values),
        dense_rows=dense_rows(values),
        table_rows=table_rows(values),
        dense_charts=[(name, Markup(chart)) for name, chart in dense[:MOST_CHARTS] if chart],  # noqa: S704 escaped
        table_charts=[(name, Markup(chart)) for name, chart in tables[:MOST_CHARTS] if chart],  # noqa: S704 escaped
        unseen=Markup(charts.unseen_chart(values)),  # noqa: S704 every text in it is escaped there
        left_out=max(0, len(dense) - MOST_CHARTS) + max(0, len(tables) - MOST_CHARTS),
    )


def tiles(values: Mapping[str, Any]) -> list[dict[str, str]]:
    """The large numbers: label, value, and how to read it."""
    splits, status = values["splits"], values["status"]
    rows = sum(split["rows"] for split in splits.values())
    ones = sum(split["positives"] for split in splits.values())
    faults = sum(check["faults"] for check in values["checks"] if check["status"] == "failed")
    warnings = sum(check["status"] == "warning" for check in values["checks"])
    return [
        {"label": "Result", "value": _RESULTS[status], "note": _NOTES[status]},
        {"label": "Faults", "value": count(faults), "note": "values and files that are wrong"},
        {"label": "Warnings", "value": count(warnings), "note": "checks to look at"},
        {"label": "Rows", "value": count(rows), "note": f"in {len(splits)} splits"},
        {"label": "Positives", "value": percent(ones / rows) if rows else _DASH, "note": f"{count(ones)} rows"},
        {
            "label": "Read",
            "value": _bytes(values["bytes"]),
            "note": f"in {duration(values['seconds'])}, {_bytes(values['bytes_per_s'])}/s",
        },
    ]


def _bytes(value: float) -> str:
    text = plain(value)
    return f"{text[:-1]} {text[-1]}B" if text[-1].isalpha() else f"{text} B"


def split_rows(values: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row for each split."""
    return [
        {
            "split": name,
            "rows": count(split["rows"]),
            "positives": count(split["positives"]),
            "base rate": share(split["base_rate"]),
            "drift of labels": number(split["drift"], 3),
        }
        for name, split in values["splits"].items()
    ]


def dense_rows(values: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row for each dense column; shares are of the split in which they are largest."""
    return [
        {
            "column": column["name"],
            "least": number(column["minimum"]),
            "mean": number(column["mean"]),
            "deviation": number(column["deviation"]),
            "largest": number(column["maximum"]),
            "not finite": share(largest(column["not_finite"])),
            **({"negative (missing)": share(largest(column["missing"]))} if column["missing"] else {}),
            **_drift(column),
        }
        for column in values["dense"]
    ]


def table_rows(values: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row for each table: the reference's look-ups, and of other splits' shares the largest."""
    reference = values["reference"]
    return [
        {
            "table": table["name"],
            "rows": count(table["rows"]),
            "looked up": share(table["seen_rows"] / table["rows"]),
            "look-ups": count(table["lookups"][reference]),
            "no key": share(largest(table["missing"])),
            "by 1 % of rows": share(table["top_hundredth"]),
            "exponent": number(table["exponent"], 3),
            "row 0": share(table["row_0"][reference]),
            **_of_others(table),
            **_drift(table),
        }
        for table in values["tables"]
    ]


def _of_others(table: Mapping[str, Any]) -> dict[str, str]:
    if not table["unseen"]:
        return {}
    row_0 = {split: table["row_0"][split] for split in table["unseen"]}
    return {"row 0, others": share(largest(row_0)), "unseen, others": share(largest(table["unseen"]))}


def _drift(column: Mapping[str, Any]) -> dict[str, str]:
    return {"drift": number(largest(column["drift"]), 3)} if column["drift"] else {}


def largest(shares: Mapping[str, float | None]) -> float | None:
    """The largest of what is known."""
    return max((value for value in shares.values() if value is not None), default=None)


def share(value: float | None) -> str:
    """A part as a percentage, a dash where it is not defined."""
    return _DASH if value is None else percent(value)


def number(value: float | None, digits: int = 4) -> str:
    """A number of so many digits, a dash where it is not defined."""
    return _DASH if value is None else f"{value:.{digits}g}"
