"""Which schedule a run takes: overlapped as the config asks, or sequential where that gains nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dlrm.config import OverlapConfig
from pipeline.schedule import (
    EVAL_OVERLAPPED,
    EVAL_SEQUENTIAL,
    TRAIN_EXCHANGED,
    TRAIN_OVERLAPPED,
    TRAIN_SEQUENTIAL,
    Row,
    at_depth,
    ring_size,
    stream_names,
)


@dataclass(frozen=True, slots=True)
class Schedule:
    """A table of rows and why it was taken.

    Attributes:
        rows: for ``schedule.execute``.
        reason: in one sentence.
    """

    rows: tuple[Row, ...]
    reason: str

    @property
    def overlapped(self) -> bool:
        """Whether the lanes run beside each other."""
        return len(stream_names(self.rows)) > 1

    def to_values(self) -> dict[str, Any]:
        """As JSON values, for progress records and the report."""
        return {"overlapped": self.overlapped, "depth": ring_size(self.rows), "reason": self.reason}


def choose(
    config: OverlapConfig, what: Literal["train", "eval"], no_gain: str | None, *, exchanged: bool = False
) -> Schedule:
    """The schedule of training or of evaluation.

    Args:
        config: what was asked for.
        what: which of the two.
        no_gain: why overlap is predicted to gain nothing here; ``None``: it gains.
        exchanged: several GPUs train, whose rows travel at the end of the step before.
    """
    sequential, overlapped = _TABLES[what]
    if exchanged and what == "train":
        overlapped = TRAIN_EXCHANGED
    wish = getattr(config, what)
    if not wish:
        return Schedule(tuple(sequential), f"overlap.{what} is off")
    if no_gain is not None and wish != "always":
        return Schedule(tuple(sequential), f"no gain is predicted: {no_gain}")
    return Schedule(at_depth(overlapped, config.depth), "the config asks for it" if wish == "always" else "default")


def no_gain_on_host(ranks: int, nodes: int) -> str | None:
    """Why overlap gains nothing on CPUs, or ``None``.

    It gains where the embedding lane waits for a network, as the dense lane then has the cores to itself.
    """
    if ranks == 1:
        return "one rank waits for no exchange, and either lane fills the cores"
    if nodes == 1:
        return "ranks of one machine exchange through its memory, and either lane fills the cores"
    return None


_TABLES: dict[str, tuple[Sequence[Row], Sequence[Row]]] = {
    "train": (TRAIN_SEQUENTIAL, TRAIN_OVERLAPPED),
    "eval": (EVAL_SEQUENTIAL, EVAL_OVERLAPPED),
}
