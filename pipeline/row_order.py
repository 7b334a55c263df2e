"""The order in which each epoch visits the rows of a split, and which of them a step takes.

Shapes: G rows of the global batch, B rows of a rank's share, n windows of a split, m blocks of a window.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dlrm.errors import ConfigError
from embedding.topology import share_of, start_of
from pipeline.permutation import ROUNDS

Rows = NDArray[np.int64]
Run = tuple[int, int]
"""First row and number of rows of a contiguous piece of a split."""

_WINDOWS_KEPT = 2
"""A batch may straddle two."""
_MOST_DRAWN = 1 << 16
"""Blocks of a window that are shuffled by drawing; the order of more is computed place by place, which has no wait for
a window (NumPy draws 20 million a second) and keeps nothing."""


class OrderedRows(Protocol):
    """What an order needs to know of a split.

    Attributes:
        name: of the split.
        rows: samples in all.
        shards: samples of each file, in order.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def rows(self) -> int: ...  # noqa: D102
    @property
    def shards(self) -> Sequence[int]: ...  # noqa: D102

    def will_need(self, start: int, stop: int) -> None:
        """Have rows ``start .. stop`` read ahead; returns at once."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRows:
    """Which part of an epoch one step takes.

    Attributes:
        step: number of the step, from 1, over all epochs.
        epoch: number of the pass over the data, from 0.
        start: position in the epoch's order of the first row of the global batch.
        global_rows: G.
        first: position of this rank's first row.
        rows: B, this rank's rows; may be 0.
        last_of_epoch: whether the pass ends with it.
    """

    step: int
    epoch: int
    start: int
    global_rows: int
    first: int
    rows: int
    last_of_epoch: bool


def steps_per_epoch(rows: int, batch_size: int, drop_last: bool) -> int:
    """Batches of one pass over ``rows``; an incomplete last one counts unless ``drop_last``."""
    return rows // batch_size if drop_last else -(-rows // batch_size)


class Steps:
    """Cuts epochs into steps and steps into shares of ranks.

    Attributes:
        per_epoch: steps of a pass.
        stop: index of the step that is no longer made; ``None``: there is no end.
    """

    def __init__(
        self,
        split: OrderedRows,
        *,
        batch_size: int,
        rank: int,
        ranks: int,
        drop_last: bool,
        start_step: int,
        stop_step: int | None,
        epochs: int | None,
    ) -> None:
        """Lay out the steps.

        Raises:
            ConfigError: the split has rows, but ``drop_last`` leaves no batch of them.
        """
        self.per_epoch = steps_per_epoch(split.rows, batch_size, drop_last)
        if split.rows and not self.per_epoch:
            raise ConfigError(
                f"data.batch_size: {batch_size} exceeds the {split.rows} rows of split {split.name!r}, and "
                "data.drop_last drops the rest; lower it or set data.drop_last to false"
            )
        self._rows, self._batch_size, self._rank, self._ranks = split.rows, batch_size, rank, ranks
        limits = [limit for limit in (stop_step, epochs and epochs * self.per_epoch) if limit is not None]
        # An empty split has no steps, whatever was asked for.
        self.stop = min(limits, default=None) if self.per_epoch else start_step

    def at(self, index: int) -> StepRows:
        """The rows of step ``index + 1``."""
        epoch, turn = divmod(index, self.per_epoch)
        start = turn * self._batch_size
        global_rows = min(self._batch_size, self._rows - start)
        return StepRows(
            step=index + 1,
            epoch=epoch,
            start=start,
            global_rows=global_rows,
            first=start + start_of(global_rows, self._ranks, self._rank),
            rows=share_of(global_rows, self._ranks, self._rank),
            last_of_epoch=turn == self.per_epoch - 1,
        )


class RowOrder:
    """The order in which each epoch visits the rows of a split; the same on every rank.

    Every shard (file) is cut into windows of ``window`` rows in file order, the last one of a shard may be shorter, and
    windows are numbered through all shards. An epoch visits the windows in a random order; a window is cut into
    blocks of ``block`` rows (the last one may be shorter), which are visited in a random order, each from its first
    row to its last. With ``block`` 1 single rows are shuffled. All orders come from NumPy's ``Generator(Philox)`` with
    key (seed, 0) and counter (0, 0, stream, epoch), stream 0 for the windows and 1 + w for the blocks of window w: up
    to 65,536 by ``permutation``, more by ``pipeline.permutation`` with keys drawn there. So any position is found
    without replaying the ones before. Memory: two windows of 8 bytes a block, none for single rows of large windows.
    """

    def __init__(self, split: OrderedRows, *, seed: int, shuffle: bool, window: int, block: int = 1) -> None:
        """Cut the split into windows.

        Args:
            split: its rows are announced to the system (read ahead) as their windows come up.
            seed: 0 .. 2^64 - 1.
            shuffle: ``False``: file order.
            window: rows shuffled together.
            block: rows that stay together.
        """
        self._split = split
        self._seed = seed
        self._shuffle = shuffle
        self._block = block
        window = min(window, max(split.rows, 1))
        starts = np.cumsum([0, *split.shards])
        firsts = [np.arange(start, stop, window) for start, stop in pairwise(starts)]
        self._firsts: Rows = np.concatenate(firsts or [np.empty(0, np.int64)])
        stops = [np.minimum(first + window, stop) for first, stop in zip(firsts, starts[1:], strict=True)]
        self._sizes: Rows = np.concatenate([*stops, np.empty(0, np.int64)]).astype(np.int64) - self._firsts
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[int, int], Rows] = OrderedDict()
        self._announced: tuple[int, int] | None = None
        self._windows: tuple[int, Rows, Rows] | None = None

    def rows(self, epoch: int, start: int, stop: int) -> Rows:
        """Rows at positions ``start .. stop`` of an epoch; safe from several threads at once."""
        runs = self.runs(epoch, start, stop)
        if runs is not None:
            pieces = [np.arange(first, first + count, dtype=np.int64) for first, count in runs]
        else:
            pieces = [self._blocks(epoch, *part) for part in self._windows_between(epoch, start, stop)]
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def runs(self, epoch: int, start: int, stop: int) -> list[Run] | None:
        """The same rows as contiguous runs in their order; ``None`` where single rows are shuffled."""
        if not self._shuffle:
            return [(start, stop - start)] if stop > start else []
        if self._block == 1:
            return None
        runs: list[Run] = []
        for window, begin, end in self._windows_between(epoch, start, stop):
            runs += self._runs_of_window(epoch, window, begin, end)
        return runs

    def _runs_of_window(self, epoch: int, window: int, begin: int, end: int) -> list[Run]:
        """Runs of positions ``begin .. end`` of a window, in order."""
        with self._lock:
            blocks = self._all_blocks(epoch, window)
        past = int(self._firsts[window] + self._sizes[window])
        sizes = np.minimum(self._block, past - blocks)
        starts = np.concatenate([[0], np.cumsum(sizes)])
        runs: list[Run] = []
        turn = int(np.searchsorted(starts, begin, side="right")) - 1
        while begin < end:
            stop = min(end, int(starts[turn + 1]))
            first = int(blocks[turn] + begin - starts[turn])
            if runs and sum(runs[-1]) == first:
                runs[-1] = (runs[-1][0], runs[-1][1] + stop - begin)
            else:
                runs.append((first, stop - begin))
            begin, turn = stop, turn + 1
        return runs

    def _windows_between(self, epoch: int, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Number and positions (from, to) of every window that positions ``start .. stop`` touch."""
        pieces = []
        with self._lock:
            order, starts = self._window_order(epoch)
            turn = int(np.searchsorted(starts, start, side="right")) - 1
            while start < stop:
                last = min(stop, int(starts[turn + 1]))
                self._announce(epoch, turn, order)
                pieces.append((int(order[turn]), start - int(starts[turn]), last - int(starts[turn])))
                start, turn = last, turn + 1
        return pieces

    def _generator(self, epoch: int, stream: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self._seed, 0], counter=[0, 0, stream, epoch]))

    def _window_order(self, epoch: int) -> tuple[Rows, Rows]:
        """Windows of an epoch in their order, and the position at which each starts."""
        if self._windows is None or self._windows[0] != epoch:
            order = self._generator(epoch, 0).permutation(self._firsts.size)
            self._windows = (epoch, order, np.concatenate([[0], np.cumsum(self._sizes[order])]))
        return self._windows[1:]

    def _blocks(self, epoch: int, window: int, begin: int, end: int) -> Rows:
        """First rows of blocks ``begin .. end`` of a window in their order."""
        count = self._num_blocks(window)
        if count <= _MOST_DRAWN:
            with self._lock:
                return self._all_blocks(epoch, window)[begin:end]
        from pipeline.permutation_numba import permute

        blocks = np.empty(end - begin, np.int64)
        keys = self._generator(epoch, 1 + window).integers(0, 1 << 32, ROUNDS, dtype=np.uint32)
        permute(begin, keys, count, blocks)
        blocks *= self._block
        blocks += self._firsts[window]
        return blocks

    def _all_blocks(self, epoch: int, window: int) -> Rows:
        """First rows [m] of a window's blocks in their order; kept, for the lock's owner."""
        key, count = (epoch, window), self._num_blocks(window)
        if key not in self._kept:
            if count <= _MOST_DRAWN:
                drawn = self._generator(epoch, 1 + window).permutation(count)
                self._kept[key] = self._firsts[window] + self._block * drawn
            else:
                self._kept[key] = self._blocks(epoch, window, 0, count)
            while len(self._kept) > _WINDOWS_KEPT:
                self._kept.popitem(last=False)
        return self._kept[key]

    def _num_blocks(self, window: int) -> int:
        return -(-int(self._sizes[window]) // self._block)

    def _announce(self, epoch: int, turn: int, order: Rows) -> None:
        """Have this window and the next read in sequence, before rows are picked from them at random."""
        if self._announced == (epoch, turn):
            return
        self._announced = epoch, turn
        for window in order[turn : turn + 2]:
            first = int(self._firsts[window])
            self._split.will_need(first, first + int(self._sizes[window]))
