"""Reads batches ahead of the trainer, in an order that (seed, epoch) fixes.

Shapes: B rows of this rank's share of a batch, G rows of the global batch.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from dlrm.errors import ConfigError
from embedding.topology import share_of, start_of
from pipeline.dataset import HostBatch, Split

_READERS = 2  # so that one may wait for the disk
_WINDOWS_KEPT = 2  # a batch may straddle two


@dataclass(slots=True)
class LoadedBatch:
    """This rank's share of one global batch.

    Attributes:
        host: its B rows.
        step: number of the step, from 1, over all epochs.
        epoch: number of the pass over the data, from 0.
        global_rows: G, which the loss divides by.
        last_of_epoch: whether the pass ends with it.
    """

    host: HostBatch
    step: int
    epoch: int
    global_rows: int
    last_of_epoch: bool


def steps_per_epoch(rows: int, batch_size: int, drop_last: bool) -> int:
    """Batches of one pass over ``rows``; an incomplete last one counts unless ``drop_last``."""
    return rows // batch_size if drop_last else -(-rows // batch_size)


class RowOrder:
    """The order in which each epoch visits the rows of a split; the same on every rank.

    The split is cut into windows of ``window`` rows in file order (the last one may be shorter). An epoch visits
    the windows in a random order, and the rows of each in a random order. Both are permutations by NumPy's
    ``Generator(Philox)`` with key (seed, 0) and counter (0, 0, stream, epoch), stream 0 for the order of the
    windows and 1 + w for the rows of window w, so that any position is found without replaying the ones before.
    Memory: two windows of 8 bytes a row.
    """

    def __init__(self, split: Split, *, seed: int, shuffle: bool, window: int) -> None:
        """Cut the split into windows.

        Args:
            split: its rows are announced to the system (read ahead) as their windows come up.
            seed: 0 .. 2^64 - 1.
            shuffle: ``False``: file order.
            window: rows shuffled together.
        """
        self._split = split
        self._seed = seed
        self._shuffle = shuffle
        self._window = min(window, max(split.rows, 1))
        self._num_windows = -(-split.rows // self._window)
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[int, int], NDArray[np.int64]] = OrderedDict()
        self._windows: tuple[int, NDArray[np.int64], NDArray[np.int64]] | None = None

    def rows(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """Rows at positions ``start .. stop`` of an epoch; safe from several threads at once."""
        if not self._shuffle:
            return np.arange(start, stop, dtype=np.int64)
        pieces = []
        with self._lock:
            order, starts = self._window_order(epoch)
            turn = int(np.searchsorted(starts, start, side="right")) - 1
            while start < stop:
                last = min(stop, int(starts[turn + 1]))
                inside = self._window_rows(epoch, turn, order)
                pieces.append(inside[start - starts[turn] : last - starts[turn]])
                start, turn = last, turn + 1
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def _generator(self, epoch: int, stream: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self._seed, 0], counter=[0, 0, stream, epoch]))

    def _window_order(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Windows of an epoch in their order, and the position at which each starts."""
        if self._windows is None or self._windows[0] != epoch:
            order = self._generator(epoch, 0).permutation(self._num_windows)
            sizes = np.minimum(self._window, self._split.rows - order * self._window)
            self._windows = (epoch, order, np.concatenate([[0], np.cumsum(sizes)]))
        return self._windows[1:]

    def _window_rows(self, epoch: int, turn: int, order: NDArray[np.int64]) -> NDArray[np.int64]:
        window = int(order[turn])
        rows = self._kept.get((epoch, window))
        if rows is None:
            self._announce(order[turn : turn + 2])
            first = window * self._window
            size = min(self._window, self._split.rows - first)
            rows = self._generator(epoch, 1 + window).permutation(size)
            rows += first
            self._kept[(epoch, window)] = rows
            while len(self._kept) > _WINDOWS_KEPT:
                self._kept.popitem(last=False)
        return rows

    def _announce(self, windows: NDArray[np.int64]) -> None:
        """Have this window and the next read in sequence, before rows are picked from them at random."""
        for window in windows:
            first = int(window) * self._window
            self._split.will_need(first, min(first + self._window, self._split.rows))


class Loader:
    """Iterates over this rank's share of every global batch, read ahead by background threads.

    The ring holds up to ``prefetch`` batches. What a reader raises, the consumer gets in place of that
    batch, and the iteration is over. A context manager; ``close`` ends the threads.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        rank: int,
        ranks: int,
        seed: int,
        shuffle: bool,
        window: int,
        drop_last: bool,
        prefetch: int,
        start_step: int = 0,
        stop_step: int | None = None,
        epochs: int | None = None,
    ) -> None:
        """Lay out the steps; reading starts with the first batch that is asked for or ``with``.

        Args:
            split: where the rows are.
            batch_size: rows of the global batch.
            rank: this rank.
            ranks: how many share each batch.
            seed: of the order.
            shuffle: ``False``: file order.
            window: rows shuffled together.
            drop_last: leave out an incomplete last batch of an epoch.
            prefetch: batches read ahead.
            start_step: steps that are done already; the first batch is of the step behind it.
            stop_step: last step; ``None``: only ``epochs`` ends the iteration.
            epochs: passes over the split; ``None``: only ``stop_step`` ends the iteration.

        Raises:
            ConfigError: the split has rows, but ``drop_last`` leaves no batch of them.
        """
        self.steps_per_epoch = steps_per_epoch(split.rows, batch_size, drop_last)
        if split.rows and not self.steps_per_epoch:
            raise ConfigError(
                f"data.batch_size: {batch_size} exceeds the {split.rows} rows of split {split.name!r}, and "
                "data.drop_last drops the rest; lower it or set data.drop_last to false"
            )
        self._split = split
        self._batch_size = batch_size
        self._rank = rank
        self._ranks = ranks
        self._order = RowOrder(split, seed=seed, shuffle=shuffle, window=window)
        self._prefetch = max(1, prefetch)
        self._next_step = start_step
        limits = [limit for limit in (stop_step, epochs and epochs * self.steps_per_epoch) if limit is not None]
        # An empty split has no steps, whatever was asked for.
        self._stop_step = min(limits, default=None) if self.steps_per_epoch else start_step
        self._ring: deque[Future[LoadedBatch]] = deque()
        self._readers = ThreadPoolExecutor(min(_READERS, self._prefetch), thread_name_prefix="loader")
        self._closed = False

    def __iter__(self) -> Iterator[LoadedBatch]:
        """The loader itself: it goes over its steps once."""
        return self

    def __next__(self) -> LoadedBatch:
        """The next batch; waits for it where it is not there yet.

        Raises:
            DataError: a row of it is wrong.
        """
        self._fill()
        if not self._ring:
            raise StopIteration
        try:
            batch = self._ring.popleft().result()
        except BaseException:
            self.close()
            raise
        self._fill()
        return batch

    def close(self) -> None:
        """Stop reading and end the threads; iterating further gives nothing."""
        self._closed = True
        self._ring.clear()
        self._readers.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        """Start reading."""
        self._fill()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the threads."""
        self.close()

    def _fill(self) -> None:
        while (
            not self._closed
            and len(self._ring) < self._prefetch
            and (self._stop_step is None or self._next_step < self._stop_step)
        ):
            self._ring.append(self._readers.submit(self._read, self._next_step))
            self._next_step += 1

    def _read(self, index: int) -> LoadedBatch:
        """The batch of step ``index + 1``."""
        epoch, turn = divmod(index, self.steps_per_epoch)
        start = turn * self._batch_size
        global_rows = min(self._batch_size, self._split.rows - start)
        first = start + start_of(global_rows, self._ranks, self._rank)
        rows = self._order.rows(epoch, first, first + share_of(global_rows, self._ranks, self._rank))
        return LoadedBatch(
            host=self._split.read(rows),
            step=index + 1,
            epoch=epoch,
            global_rows=global_rows,
            last_of_epoch=turn == self.steps_per_epoch - 1,
        )
