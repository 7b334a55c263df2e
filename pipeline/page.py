"""HTML pages of one file: no script, no request; one style, light or dark as the reader's setting, and printable."""

from __future__ import annotations

import importlib.resources
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def render_page(template: str, /, **values: Any) -> str:
    """A template of this package, filled in; text is escaped, charts come as ``Markup``.

    Args:
        template: name of the file, which puts ``style`` into its head.
        values: what it names.
    """
    import jinja2  # training loads this module, and only a page needs the templates
    from markupsafe import Markup

    folder = importlib.resources.files("pipeline")
    style = Markup(folder.joinpath("page.css").read_text(encoding="utf-8"))  # noqa: S704 a file of ours
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(count=count, duration=duration, value=show_value)
    source = folder.joinpath(template).read_text(encoding="utf-8")
    return environment.from_string(source).render(style=style, **values)


def count(value: float) -> str:
    """A count with separated thousands."""
    return f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    """Seconds in the two largest units that matter."""
    if seconds is None:
        return "\N{EN DASH}"
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.0f} ms"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def show_value(value: Any) -> str:
    """A plain value as text for a table."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return count(value)
    if isinstance(value, float):
        return f"{value:,.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {show_value(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(show_value(item) for item in value)
    return "" if value is None else str(value)


def finite(value: Any) -> Any:
    """Plain values in which numbers that are not finite have become ``None``, since JSON has none of them."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def replace_file(path: Path, text: str) -> Path:
    """Write a text file that appears only once complete."""
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with scratch.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    return path
