"""Reads batches ahead of the trainer, in an order that (seed, epoch) fixes.

``Loader`` hands over decoded columns; ``pipeline.record_loader`` hands over the rows as they are stored.

Shapes: B rows of this rank's share of a batch, G rows of the global batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from dlrm.errors import DataError
from embedding.jagged import Jagged
from pipeline.dataset import HostBatch, Split
from pipeline.read_ahead import READERS, ReadAhead
from pipeline.row_order import RowOrder, Steps, steps_per_epoch

__all__ = ["LoadedBatch", "Loader", "RowOrder", "steps_per_epoch"]


@dataclass(slots=True)
class LoadedBatch:
    """This rank's share of one global batch.

    Attributes:
        host: its B rows.
        step: number of the step, from 1, over all epochs.
        epoch: number of the pass over the data, from 0.
        global_rows: G, which the loss divides by.
        last_of_epoch: whether the pass ends with it.
        global_keys: the keys of all G rows, where the loader was asked for them.
    """

    host: HostBatch
    step: int
    epoch: int
    global_rows: int
    last_of_epoch: bool
    global_keys: Jagged | None = None


class Loader(ReadAhead[LoadedBatch]):
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
        block: int = 1,
        readers: int = READERS,
        global_keys: bool = False,
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
            block: rows that a shuffle leaves together.
            readers: threads.
            global_keys: read the keys of the whole global batch, too.
            start_step: steps that are done already; the first batch is of the step behind it.
            stop_step: last step; ``None``: only ``epochs`` ends the iteration.
            epochs: passes over the split; ``None``: only ``stop_step`` ends the iteration.

        Raises:
            ConfigError: the split has rows, but ``drop_last`` leaves no batch of them.
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
        self._split, self._rank, self._ranks = split, rank, ranks
        self._order = RowOrder(split, seed=seed, shuffle=shuffle, window=window, block=block)
        self._global_keys = global_keys
        super().__init__(
            self._read,
            first=start_step,
            stop=self._steps.stop,
            depth=max(1, prefetch),
            threads=readers,
            name="loader",
        )

    def _read(self, index: int) -> LoadedBatch:
        """The batch of step ``index + 1``."""
        part = self._steps.at(index)
        keys = None
        if self._global_keys:
            everyones = self._order.rows(part.epoch, part.start, part.start + part.global_rows)
            rows = everyones[part.first - part.start :][: part.rows]
            keys = self._split.read_keys(everyones)
        else:
            rows = self._order.rows(part.epoch, part.first, part.first + part.rows)
        try:
            host = self._split.read(rows)
        except DataError as error:
            if self._ranks == 1:
                raise
            # Other ranks' rows may be sound: this one ends them all, and says who it is.
            raise type(error)(f"rank {self._rank}: {error}") from error
        return LoadedBatch(
            host=host,
            step=part.step,
            epoch=part.epoch,
            global_rows=part.global_rows,
            last_of_epoch=part.last_of_epoch,
            global_keys=keys,
        )
