"""A global batch near the wished one that wastes least of an epoch's last step.

A step takes as long as the rank with most rows. With G rows a batch, W ranks and N rows an epoch has ceil(N / G) steps
(with ``drop_last``, floor), whose ``steps * W * ceil(G / W)`` places are not all filled: the last batch is short, and W
may not divide G. Waste is the share of places that stay empty, plus the share of rows that ``drop_last`` leaves out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dlrm.errors import ConfigError

NOTICEABLE = 1e-4
"""Who saves less than this share of an epoch is no reason to move further away from the wished batch."""

_MOST_CANDIDATES = 1_000_000


@dataclass(frozen=True, slots=True)
class BatchChoice:
    """One global batch over one split.

    Attributes:
        batch: rows of the global batch.
        steps: of an epoch.
        last_share: of the last step's places, the filled ones.
        waste: of all places of an epoch, the empty ones, plus the share of rows that are left out.
    """

    batch: int
    steps: int
    last_share: float
    waste: float


def weigh_batch(rows: int, batch: int, ranks: int, *, drop_last: bool = False) -> BatchChoice:
    """What a batch wastes of an epoch.

    Args:
        rows: of the split, above 0.
        batch: rows of the global batch.
        ranks: that share it.
        drop_last: whether an incomplete last batch is left out.
    """
    waste = float(_waste(rows, np.array([batch]), ranks, drop_last)[0])
    steps = rows // batch if drop_last else -(-rows // batch)
    last = batch if drop_last else rows - (steps - 1) * batch
    return BatchChoice(batch, steps, last / (ranks * -(-batch // ranks)), waste)


def choose_batch(rows: int, wished: int, ranks: int, *, within: float, drop_last: bool = False) -> BatchChoice:
    """The nearest batch that wastes at most ``NOTICEABLE`` more than the best one.

    Args:
        rows: of the split, above 0.
        wished: the batch to stay near; it is kept where no other is noticeably better.
        ranks: proposals are multiples of it.
        within: how far to look on either side, as a share of ``wished``.
        drop_last: whether an incomplete last batch is left out.

    Raises:
        ConfigError: the wished batch has fewer rows than there are ranks, or ``within`` is no share.
    """
    if wished < ranks:
        raise ConfigError(f"batch: {wished} rows are fewer than the {ranks} ranks; raise it or use fewer ranks")
    if not 0 < within < 1:
        raise ConfigError(f"--within: {within}; must lie between 0 and 1")
    first = max(1, -(-int(np.ceil(wished * (1 - within))) // ranks))
    last = int(wished * (1 + within)) // ranks
    stride = max(1, -(-(last - first + 1) // _MOST_CANDIDATES))
    batches = np.concatenate([[wished], ranks * np.arange(first, last + 1, stride, dtype=np.int64)])
    waste = _waste(rows, batches, ranks, drop_last)
    good = batches[waste <= waste.min() + NOTICEABLE]
    return weigh_batch(rows, int(good[np.abs(good - wished).argmin()]), ranks, drop_last=drop_last)


def _waste(rows: int, batches: npt.NDArray[np.int64], ranks: int, drop_last: bool) -> npt.NDArray[np.float64]:
    """[n] waste of each batch; a split that holds no whole batch is all left out."""
    steps = rows // batches if drop_last else -(-rows // batches)
    trained = np.minimum(steps * batches, rows)
    places = steps * (ranks * -(-batches // ranks))
    empty = np.where(places > 0, 1 - trained / np.maximum(places, 1), 0.0)
    waste: npt.NDArray[np.float64] = empty + (1 - trained / rows)
    return waste
