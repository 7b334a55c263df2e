"""The lanes picture: what ran when in some steps, drawn as two lanes with the all-to-all crossing between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from pipeline.charts import linear_axis
from pipeline.stages import S
from pipeline.trace import Run, crossings, idle_of, lane_of

WIDTH, HEIGHT = 1120.0, 262.0
_LEFT, _RIGHT = 128.0, 14.0
_ROW = 28.0
_MEMORY, _EXCHANGE, _DENSE = 58.0, 90.0, 172.0
"""Tops of the rows: look-ups and updates, exchanges (both the embedding lane), matrix products (the dense lane)."""
_BOTTOM = _DENSE + _ROW + 6

_EXCHANGES = frozenset({S.input_dist, S.output_dist, S.grad_dist, S.reduce_replicated, S.reduce_top, S.reduce_bottom})
_TONES = (("a", "look-up, update"), ("d", "exchange"), ("b", "dense"), ("muted", "neither lane"))
_SHORT = {
    S.input_dist: "keys", S.output_dist: "vectors", S.grad_dist: "gradients", S.reduce_top: "all-reduce",
    S.reduce_bottom: "all-reduce", S.reduce_replicated: "all-reduce", S.sum_replicated: "sums",
    S.lookup: "look-up", S.sparse_update: "update", S.upload: "upload", S.bottom_forward: "bottom",
    S.top_forward: "top", S.loss: "loss", S.top_backward: "top back", S.bottom_backward: "bottom back",
    S.top_weight_backward: "top weights", S.dense_update: "update",
}  # fmt: skip


def lanes_chart(lanes: Mapping[str, Any], name: str, tick: str) -> str:
    """One picture as an ``<svg>`` element, or nothing where nothing ran.

    Args:
        lanes: of one rank, as ``run_trace.read_lanes`` gives them.
        tick: what a tick is called, such as ``step``.
        name: makes the picture's identifiers unique on its page.
    """
    runs = [
        Run(S(run["stage"]), "", run["batch"], run["tick"], run["start_ms"], run["end_ms"]) for run in lanes["runs"]
    ]
    if not runs:
        return ""
    start, end = min(run.start for run in runs), max(run.end for run in runs)
    place = _Scale(start, max(end - start, 1e-9))
    parts = [
        (
            f'<svg class="chart lanes" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" '
            f'aria-labelledby="{name}-title {name}-desc"><title id="{name}-title">The two lanes</title>'
            f'<desc id="{name}-desc">{escape(caption(lanes))}</desc>'
            f'<defs><pattern id="{name}-idle" width="7" height="7" patternUnits="userSpaceOnUse" '
            'patternTransform="rotate(45)"><path d="M0 0V7"/></pattern></defs>'
        ),
        _axis(place, end - start),
        *(_lane(lane, top, bottom, runs, place, name) for lane, top, bottom in _LANES),
        *(_crossing(giver, taker, place) for giver, taker in crossings(runs)),
        *(_run(run, place, shares=_shares_lane(run, runs)) for run in runs),
        _ticks(runs, place, tick),
        _legend(name),
        "</svg>",
    ]
    return "".join(parts)


def caption(lanes: Mapping[str, Any]) -> str:
    """How much ran beside each other, in words."""
    ratio = lanes["ratio"]
    return (
        f"Dense lane at work {lanes['dense_ms']:.1f} ms, embedding lane {lanes['embedding_ms']:.1f} ms, both at once "
        f"{lanes['both_ms']:.1f} ms: "
        + ("one lane did nothing." if ratio is None else f"overlap ratio {ratio:.2f} (time saved / shorter lane).")
    )


_LANES = (("embedding", _MEMORY - 4, _EXCHANGE + _ROW + 4), ("dense", _DENSE - 4, _DENSE + _ROW + 4))


class _Scale:
    """From milliseconds to places."""

    def __init__(self, start: float, length: float) -> None:
        self.start, self._factor = start, (WIDTH - _LEFT - _RIGHT) / length

    def __call__(self, time_ms: float) -> float:
        return _LEFT + (time_ms - self.start) * self._factor


def _axis(place: _Scale, length: float) -> str:
    axis = linear_axis("ms", (), low=0, high=length, text="{:,g}".format)
    x = {at: place(place.start + at) for at, _ in axis.ticks}
    lines = "".join(f'<path d="M{x[at]:.1f} {_MEMORY - 4}V{_BOTTOM}"/>' for at, _ in axis.ticks)
    texts = "".join(
        f'<text x="{x[at]:.1f}" y="{_BOTTOM + 16}" text-anchor="middle">{escape(text)}</text>'
        for at, text in axis.ticks
    )
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    return (
        f'<g class="grid">{lines}</g><g class="tick">{texts}</g><g class="axis"><text x="{middle}" '
        f'y="{HEIGHT - 6}" text-anchor="middle">Milliseconds</text></g>'
    )


def _lane(lane: str, top: float, bottom: float, runs: Sequence[Run], place: _Scale, name: str) -> str:
    """The lane's frame and name; where it is idle, shaded."""
    shades = "".join(
        f'<rect class="idle" x="{place(start):.1f}" y="{top}" width="{place(end) - place(start):.2f}" '
        f'height="{bottom - top}" fill="url(#{name}-idle)"><title>{lane} lane idle, {end - start:.2f} ms</title></rect>'
        for start, end in idle_of(runs, lane)
    )
    return (
        f'<rect class="lane" x="{_LEFT}" y="{top}" width="{WIDTH - _LEFT - _RIGHT}" height="{bottom - top}"/>{shades}'
        f'<g class="axis"><text x="{_LEFT - 12}" y="{(top + bottom) / 2 + 4}" text-anchor="end">{lane} lane</text></g>'
    )


def _crossing(giver: Run, taker: Run, place: _Scale) -> str:
    """A band from the exchange's whole length to the moment at which the other lane has or had its batch."""
    exchange, dense = (giver, taker.start) if giver.stage == S.output_dist else (taker, giver.end)
    points = [
        (place(exchange.start), _EXCHANGE + _ROW),
        (place(exchange.end), _EXCHANGE + _ROW),
        (place(dense), _DENSE),
    ]
    hint = f"batch {giver.number:,}: {giver.stage} to {taker.stage}"
    path = "L".join(f"{x:.1f} {y:g}" for x, y in points)
    return f'<path class="crossing" d="M{path}Z"><title>{escape(hint)}</title></path>'


def _shares_lane(run: Run, runs: Sequence[Run]) -> bool:
    """Whether the dense lane worked on another batch at that time, too."""
    return lane_of(run.stage) == "dense" and any(
        lane_of(other.stage) == "dense"
        and other.number != run.number
        and min(run.end, other.end) > max(run.start, other.start)
        for other in runs
    )


def _run(run: Run, place: _Scale, *, shares: bool) -> str:
    """One bar; in a shared lane half as high, batches ahead above."""
    lane = lane_of(run.stage)
    top = _DENSE if lane == "dense" else _EXCHANGE if run.stage in _EXCHANGES else _MEMORY
    height = _ROW / 2 if shares else _ROW
    if shares and run.number == run.tick:
        top += height
    tone = "muted" if lane == "other" else "b" if lane == "dense" else "d" if run.stage in _EXCHANGES else "a"
    x, width = place(run.start), max(place(run.end) - place(run.start), 0.6)
    hint = f"{run.stage.replace('_', ' ')}, batch {run.number:,}: {run.end - run.start:.3f} ms"
    shade = " later" if run.number % 2 else ""  # neighbouring batches are told apart
    bar = f'<rect class="run tone-{tone}{shade}" x="{x:.1f}" y="{top}" width="{width:.2f}" height="{height:g}" rx="2">'
    words = next(
        (text for text in (f"{_SHORT[run.stage]} {run.number}", _SHORT[run.stage]) if 6.4 * len(text) < width), ""
    )
    middle = x + width / 2, top + height / 2 + 4
    label = f'<text class="run-name" x="{middle[0]:.1f}" y="{middle[1]:g}" text-anchor="middle">{escape(words)}</text>'
    return f"{bar}<title>{escape(hint)}</title></rect>" + (label if words else "")


def _ticks(runs: Sequence[Run], place: _Scale, word: str) -> str:
    """Where a step begins."""
    starts: dict[int, float] = {}
    for run in runs:
        starts[run.tick] = min(run.start, starts.get(run.tick, run.start))
    return "".join(
        f'<path class="rule tone-muted" d="M{place(at):.1f} 38V{_BOTTOM}"/>'
        f'<text x="{place(at) + 5:.1f}" y="47">{escape(word)} {tick:,}</text>'
        for tick, at in starts.items()
    )


def _legend(name: str) -> str:
    parts, at = ['<g class="legend">'], _LEFT
    for tone, label in (*_TONES, ("", "idle")):
        style = f'class="run tone-{tone}"' if tone else f'class="idle" fill="url(#{name}-idle)"'
        parts.append(
            f'<rect {style} x="{at}" y="7" width="16" height="13" rx="2"/><text x="{at + 22}" y="18">{label}</text>'
        )
        at += 22 + 6.6 * len(label) + 18
    return "".join([*parts, "</g>"])
