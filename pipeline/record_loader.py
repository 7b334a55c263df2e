"""Reads rows ahead as they are stored, into a ring of pinned buffers: no work of the host on any row.

For devices that take records apart themselves (``RecordBatch.layout`` says how); ``Split.records`` makes one. Order,
steps, shares and errors are those of ``pipeline.loader``.

Shapes: B rows of this rank's share of a batch, G rows of the global batch, V 32-bit words a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dlrm.device import Device, Event
from dlrm.errors import DataError
from embedding.jagged import Jagged
from embedding.topology import share_of
from pipeline.formats.batch import HostBatch
from pipeline.formats.record_files import PAGE, Bytes, RecordLayout, RecordSource, buffer_bytes, page_aligned
from pipeline.read_ahead import READERS, ReadAhead
from pipeline.row_order import OrderedRows, RowOrder, Run, Steps

BagCheck = Callable[[Jagged, int], None]


class RecordSplit(OrderedRows, Protocol):
    """What the loader needs of a split."""

    def record_source(self, *, direct: bool | None = None, numbers: bool = False) -> RecordSource:
        """The rows as they are stored."""
        ...

    def read(self, rows: NDArray[np.int64]) -> HostBatch:
        """The rows decoded and checked."""
        ...


@dataclass(slots=True, kw_only=True)
class RecordBatch:
    """Records of one global batch.

    The arrays lie in a buffer of the loader's ring: they are overwritten once ``keep`` further batches have been
    taken, but not before the event of ``hold`` has happened.

    Attributes:
        records: [B, V] uint32, or [G, V] where the loader reads whole batches.
        own: which of them are this rank's share.
        layout: where a record's columns are.
        step: number of the step, from 1, over all epochs.
        epoch: number of the pass over the data, from 0.
        global_rows: G, which the loss divides by.
        last_of_epoch: whether the pass ends with it.
    """

    records: NDArray[np.uint32]
    own: slice
    layout: RecordLayout
    step: int
    epoch: int
    global_rows: int
    last_of_epoch: bool
    _split: RecordSplit
    _source: RecordSource
    _order: RowOrder
    _first: int
    _held: list[Event] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        """B."""
        count: int = self.own.stop - self.own.start
        return count

    def hold(self, event: Event) -> None:
        """Let the buffer be overwritten only after ``event``, such as the end of an upload that reads it."""
        self._held.append(event)

    def locate(self, place: int) -> str:
        """Where record ``place`` of ``records`` comes from, for errors: file, row and byte."""
        return self._source.place_of(self._row(place))

    def fault(self, place: int, check: BagCheck) -> DataError:
        """What to raise where a device finds record ``place`` wrong: the host's own sentence on that row.

        Args:
            place: of ``records``.
            check: raises what is wrong with the row's bags; is told its number in this rank's share.
        """
        try:
            check(self._split.read(np.array([self._row(place)], np.int64)).keys, place - self.own.start)
        except DataError as error:
            return error
        return DataError(
            f"{self.locate(place)}: the device found a value out of range where the host finds none; check the "
            "machine's memory and its disk"
        )

    def _row(self, place: int) -> int:
        """Row of the split that record ``place`` is."""
        position = self._first + place
        return int(self._order.rows(self.epoch, position, position + 1)[0])


class RecordLoader(ReadAhead[RecordBatch]):
    """Iterates over the records of every global batch, read ahead by background threads.

    The ring has ``prefetch + keep`` buffers. What a reader raises, the consumer gets in place of that batch, and the
    iteration is over. A context manager; ``close`` ends the threads.
    """

    def __init__(
        self,
        split: RecordSplit,
        *,
        device: Device,
        batch_size: int,
        rank: int,
        ranks: int,
        seed: int,
        shuffle: bool,
        window: int,
        drop_last: bool,
        prefetch: int,
        block: int = 1,
        readers: int = READERS,
        keep: int = 1,
        whole_batches: bool = False,
        numbers: bool = False,
        direct: bool | None = None,
        start_step: int = 0,
        stop_step: int | None = None,
        epochs: int | None = None,
    ) -> None:
        """Lay out the steps and allocate the ring; reading starts with the first batch that is asked for or ``with``.

        Args:
            split: of a data set whose rows are records of one length.
            device: gives the buffers (``pinned_empty``).
            batch_size: rows of the global batch.
            rank: this rank.
            ranks: how many share each batch.
            seed: of the order.
            shuffle: ``False``: file order.
            window: rows shuffled together.
            drop_last: leave out an incomplete last batch of an epoch.
            prefetch: batches read ahead.
            block: rows that a shuffle leaves together; with 1 every row is copied out of the mapped files.
            readers: threads.
            keep: batches that the consumer looks at, at once.
            whole_batches: hand over all G rows, for exchanges that want everyone's keys.
            numbers: hand over numbers of rows [B, 2] (int64) of a synthetic set, for a device that makes the rows.
            direct: pass the page cache by; ``None``: where the split takes more than half of the memory.
            start_step: steps that are done already; the first batch is of the step behind it.
            stop_step: last step; ``None``: only ``epochs`` ends the iteration.
            epochs: passes over the split; ``None``: only ``stop_step`` ends the iteration.

        Raises:
            ConfigError: the split has rows, but ``drop_last`` leaves no batch of them.
            DataError: the split has no records of one length (jagged layout), or files where ``numbers`` are asked for.
        """
        self._steps = Steps(
            split,
            batch_size=batch_size,
            rank=rank,
            ranks=ranks,
            drop_last=drop_last,
            start_step=start_step,
            stop_step=stop_step,
            epochs=epochs,
        )
        self.steps_per_epoch = self._steps.per_epoch
        self._order = RowOrder(split, seed=seed, shuffle=shuffle, window=window, block=block)
        self._whole = whole_batches
        self._split = split
        self._source = split.record_source(direct=direct, numbers=numbers)
        depth = max(1, prefetch)
        rows = min(batch_size, split.rows)
        size = buffer_bytes(self._source.layout, rows if whole_batches else share_of(rows, ranks, 0))
        self._buffers: list[Bytes] = [
            page_aligned(device.pinned_empty((size + PAGE,), np.uint8), size) for _ in range(depth + keep)
        ]
        self._held: list[list[Event]] = [[] for _ in self._buffers]
        super().__init__(
            self._read, first=start_step, stop=self._steps.stop, depth=depth, threads=readers, name="loader"
        )

    def close(self) -> None:
        """Stop reading, end the threads and close the files; iterating further gives nothing."""
        super().close()
        self._source.close()

    def _read(self, index: int) -> RecordBatch:
        """The batch of step ``index + 1``, into the buffer of the step that is ``prefetch + keep`` before it."""
        part = self._steps.at(index)
        turn = index % len(self._buffers)
        for event in self._held[turn]:
            event.synchronize()
        held: list[Event] = []
        self._held[turn] = held
        first, rows = (part.start, part.global_rows) if self._whole else (part.first, part.rows)
        buffer = self._buffers[turn]
        runs: list[Run] | None = self._order.runs(part.epoch, first, first + rows)
        if runs is None:
            records = self._source.read_rows(self._order.rows(part.epoch, first, first + rows), buffer)
        else:
            records = self._source.read_runs(runs, buffer)
        own = slice(part.first - first, part.first - first + part.rows)
        return RecordBatch(
            records=records,
            own=own,
            layout=self._source.layout,
            step=part.step,
            epoch=part.epoch,
            global_rows=part.global_rows,
            last_of_epoch=part.last_of_epoch,
            _split=self._split,
            _source=self._source,
            _order=self._order,
            _first=first,
            _held=held,
        )
