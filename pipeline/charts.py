"""Charts as inline SVG: no script, no request, colours from the page's custom properties.

Every chart carries a title and a description for screen readers, axis labels and grid lines. Numbers are in
units of a 560 x 372 view box that scales with the page.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 560.0, 372.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 16.0, 34.0, 48.0
_MINUS = "\N{MINUS SIGN}"

Point = tuple[float, float]
Format = Callable[[float], str]


def plain(value: float) -> str:
    """A tick's number: as few digits as it needs, thousands and millions shortened."""
    size = abs(value)
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.4g}{unit}".replace("-", _MINUS)
    return f"{value:.4g}".replace("-", _MINUS)


def percent(value: float) -> str:
    """A share as a percentage."""
    return f"{100 * value:.3g} %"


def logit(probability: float) -> float:
    """ln(p / (1 - p))."""
    return math.log(probability / (1 - probability))


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One axis: what it shows, from where to where, and where its ticks are (place, text)."""

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]

    def share(self, value: float) -> float:
        """Place of a value between the ends, 0 to 1; values far beyond are brought near, for short paths."""
        return min(max((value - self.low) / (self.high - self.low), -1.0), 2.0)


def linear_axis(
    label: str, values: Iterable[float], *, low: float | None = None, high: float | None = None, text: Format = plain
) -> Axis:
    """An axis from round number to round number around ``values``; ``low`` and ``high`` fix an end."""
    found = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    start = min(found) if low is None else low
    end = max(found) if high is None else high
    if not end > start:
        margin = abs(start) * 0.05 or 0.5
        start, end = (start if low is not None else start - margin), (end if high is not None else end + margin)
        end = end if end > start else start + 1.0
    step = _round_step((end - start) / 5)
    start = math.floor(start / step + 1e-9) * step if low is None else start
    end = math.ceil(end / step - 1e-9) * step if high is None else end
    first = math.ceil(start / step - 1e-9)
    count = math.floor(end / step + 1e-9) - first + 1
    ticks = tuple(((first + i) * step, text((first + i) * step)) for i in range(count))
    return Axis(label=label, low=start, high=end, ticks=ticks)


def probability_axis(label: str, low: float, high: float) -> Axis:
    """An axis over logits whose ticks read as probabilities; ``low`` and ``high`` are logits."""
    wanted = [1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.03, 0.1, 0.25, 0.5, 0.75, 0.9, 0.97, 0.99, 0.999, 1 - 1e-4, 1 - 1e-5]
    if high - low < 3:
        wanted += [0.02, 0.05, 0.15, 0.2, 0.3, 0.35, 0.4, 0.45, 0.55, 0.6, 0.65, 0.7, 0.8, 0.85, 0.95]
    ticks: list[tuple[float, str]] = []
    for probability in sorted(wanted):
        place = logit(probability)
        if low <= place <= high and (not ticks or place - ticks[-1][0] >= (high - low) / 11):
            ticks.append((place, f"{100 * probability:.6g} %"))
    return Axis(label=label, low=low, high=high, ticks=tuple(ticks))


def decade_axis(label: str, low: float, high: float) -> Axis:
    """An axis over decimal logarithms, from whole decade to whole decade; ticks read as the numbers themselves."""
    start, end = math.floor(low + 1e-9), math.ceil(high - 1e-9)
    end = max(end, start + 1)
    step = max(1, -(-(end - start) // 7))
    ticks = tuple((float(at), plain(10.0**at)) for at in range(start, end + 1, step))
    return Axis(label=label, low=start, high=end, ticks=ticks)


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """Something drawn from points.

    Attributes:
        points: (x, y), in the axes' units.
        tone: colour, ``a`` to ``d`` or ``muted``.
        label: entry of the legend; empty: none.
        kind: ``line``, ``area`` (line and what lies below it), ``dots``, ``rule`` (dashed line) or
            ``whiskers`` (points come in pairs, each the ends of one).
        hints: text shown when pointing at a dot, one for each point.
    """

    points: Sequence[Point]
    tone: str = "a"
    label: str = ""
    kind: str = "line"
    hints: Sequence[str] = field(default=())


def outline(edges: Sequence[float], heights: Sequence[float]) -> list[Point]:
    """The upper line of a histogram's bars."""
    points: list[Point] = []
    for left, right, height in zip(edges, edges[1:], heights, strict=False):
        points += [(left, height), (right, height)]
    return points


def draw(*, title: str, description: str, x: Axis, y: Axis, marks: Sequence[Mark], name: str = "") -> str:
    """One chart as an ``<svg>`` element.

    Args:
        title: for screen readers, as is the description.
        description: what there is to see.
        x: from left to right.
        y: from bottom to top.
        marks: drawn in this order.
        name: makes the identifiers of a page's charts unique where titles do not.
    """
    name = name or re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-labelledby="{name}-title {name}-desc">',
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>',
        # A little wider than the frame, so that dots and lines on its edge stay whole.
        (
            f'<clipPath id="{name}-clip"><rect x="{_LEFT - 5}" y="{_TOP - 5}" width="{WIDTH - _LEFT - _RIGHT + 10}" '
            f'height="{HEIGHT - _TOP - _BOTTOM + 10}"/></clipPath>'
        ),
        _grid(x, y),
        f'<g clip-path="url(#{name}-clip)">',
        *(_mark(mark, x, y) for mark in marks),
        "</g>",
        _legend([mark for mark in marks if mark.label]),
        "</svg>",
    ]
    return "".join(parts)


def _x(axis: Axis, value: float) -> float:
    return _LEFT + axis.share(value) * (WIDTH - _LEFT - _RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - _BOTTOM - axis.share(value) * (HEIGHT - _TOP - _BOTTOM)


def _grid(x: Axis, y: Axis) -> str:
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    parts = ['<g class="grid">']
    parts += [f'<path d="M{_x(x, at):.1f} {_TOP}V{bottom}"/>' for at, _ in x.ticks]
    parts += [f'<path d="M{_LEFT} {_y(y, at):.1f}H{right}"/>' for at, _ in y.ticks]
    parts.append(f'</g><path class="frame" d="M{_LEFT} {_TOP}V{bottom}H{right}"/><g class="tick">')
    parts += [
        f'<text x="{_x(x, at):.1f}" y="{bottom + 17}" text-anchor="middle">{escape(text)}</text>'
        for at, text in x.ticks
    ]
    parts += [
        f'<text x="{_LEFT - 8}" y="{_y(y, at) + 4:.1f}" text-anchor="end">{escape(text)}</text>' for at, text in y.ticks
    ]
    middle = (_TOP + bottom) / 2
    parts.append(
        f'</g><g class="axis"><text x="{(_LEFT + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x.label)}'
        f'</text><text transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">{escape(y.label)}</text></g>'
    )
    return "".join(parts)


def _path(points: Sequence[Point], x: Axis, y: Axis) -> str:
    return "M" + "L".join(f"{_x(x, px):.1f} {_y(y, py):.1f}" for px, py in points)


def _mark(mark: Mark, x: Axis, y: Axis) -> str:
    points = [point for point in mark.points if math.isfinite(point[0]) and math.isfinite(point[1])]
    if not points:
        return ""
    tone = f"tone-{mark.tone}"
    if mark.kind == "dots":
        hints = mark.hints or [""] * len(points)
        dots = (
            f'<circle cx="{_x(x, px):.1f}" cy="{_y(y, py):.1f}" r="4"><title>{escape(hint)}</title></circle>'
            for (px, py), hint in zip(points, hints, strict=True)
        )
        return f'<g class="dots {tone}">{"".join(dots)}</g>'
    if mark.kind == "whiskers":
        lines = (
            f"M{_x(x, px):.1f} {_y(y, low):.1f}V{_y(y, high):.1f}"
            for (px, low), (_, high) in zip(points[::2], points[1::2], strict=True)
        )
        return f'<path class="whiskers {tone}" d="{"".join(lines)}"/>'
    line = _path(points, x, y)
    drawn = f'<path class="{"rule" if mark.kind == "rule" else "line"} {tone}" d="{line}"/>'
    if mark.kind == "area":
        base = HEIGHT - _BOTTOM
        closed = f"{line}L{_x(x, points[-1][0]):.1f} {base}L{_x(x, points[0][0]):.1f} {base}Z"
        drawn = f'<path class="area {tone}" d="{closed}"/>' + drawn
    return drawn


def _legend(marks: Sequence[Mark]) -> str:
    parts = ['<g class="legend">']
    at = _LEFT
    for mark in marks:
        tone = f"tone-{mark.tone}"
        if mark.kind == "dots":
            parts.append(f'<g class="dots {tone}"><circle cx="{at + 8}" cy="14" r="4"/></g>')
        else:
            parts.append(f'<path class="{"rule" if mark.kind == "rule" else "line"} {tone}" d="M{at} 14h16"/>')
        parts.append(f'<text x="{at + 22}" y="18">{escape(mark.label)}</text>')
        at += 22 + 6.6 * len(mark.label) + 18  # 6.6: a generous mean advance of 12.5 px system type
    return "".join([*parts, "</g>"])
