"""Batches for a device that takes records apart itself: records, or numbers of rows that lie or are made on it.

Shapes: N rows of a split, G rows of a batch, V 32-bit words a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dlrm.config import DataConfig
from dlrm.device import Array, Device
from dlrm.errors import DeviceError
from pipeline.dataset import Split
from pipeline.formats.batch import HostBatch
from pipeline.formats.record_files import Bytes, RecordLayout, Records, RecordSource, rows_of_runs
from pipeline.record_loader import RecordBatch, RecordLoader

_CHUNK = 1 << 18
"""Rows that are brought at a time."""


class Origin(Protocol):
    """Where the records of numbered rows are."""

    def records(self, numbers: Array, room: Array) -> tuple[Array, Array | None]:
        """Records of which ``numbers`` [G] int64 are the batch, or ``None`` where these are the first G.

        Args:
            numbers: on the device.
            room: [G, V] uint32 of the device, to make records in.
        """
        ...


@dataclass(slots=True)
class DeviceBatch:
    """One batch as the loader hands it over.

    Attributes:
        host: records, or where there is an origin numbers of rows.
        origin: of the numbers.
    """

    host: RecordBatch
    origin: Origin | None

    @property
    def step(self) -> int:
        """Number of the step, from 1."""
        return self.host.step

    @property
    def epoch(self) -> int:
        """Number of the pass, from 0."""
        return self.host.epoch

    @property
    def global_rows(self) -> int:
        """Rows of the global batch."""
        return self.host.global_rows


@dataclass(frozen=True, slots=True)
class MadeRows:
    """Rows of a synthetic set, made for each batch."""

    rows: Any
    logits: Array

    def records(self, numbers: Array, room: Array) -> tuple[Array, None]:
        """See ``Origin``."""
        self.rows.write(numbers, room, self.logits[: len(numbers)])
        return room, None


@dataclass(frozen=True, slots=True)
class ResidentRows:
    """All rows of a split in the device's memory."""

    stored: Array

    def records(self, numbers: Array, room: Array) -> tuple[Array, Array]:  # noqa: ARG002  nothing is made
        """See ``Origin``."""
        return self.stored, numbers


class _Numbers:
    """A ``RecordSource`` that gives the numbers of rows of a split, [G, 2]: an int64 as two words."""

    def __init__(self, source: RecordSource, first: int) -> None:
        self.layout: RecordLayout = source.layout
        self._source, self._first = source, first

    def read_runs(self, runs: Sequence[tuple[int, int]], buffer: Bytes) -> Records:
        return self.read_rows(rows_of_runs(runs), buffer)

    def read_rows(self, rows: NDArray[np.int64], buffer: Bytes) -> Records:
        numbers = buffer[: rows.size * 8].view(np.int64)
        np.add(rows, self._first, out=numbers)
        return numbers.view(np.uint32).reshape(-1, 2)

    def place_of(self, row: int) -> str:
        return self._source.place_of(row)

    def close(self) -> None:
        self._source.close()


@dataclass(frozen=True, slots=True)
class _NumberedSplit:
    """A split whose loader hands over numbers, counted from ``first``."""

    split: Split
    first: int

    @property
    def name(self) -> str:
        return self.split.name

    @property
    def rows(self) -> int:
        return self.split.rows

    @property
    def shards(self) -> Sequence[int]:
        return self.split.shards

    def will_need(self, start: int, stop: int) -> None:
        """Nothing: numbers are read from no file."""

    def record_source(self, *, direct: bool | None = None, numbers: bool = False) -> RecordSource:  # noqa: ARG002
        return _Numbers(self.split.record_source(direct=False), self.first)

    def read(self, rows: NDArray[np.int64]) -> HostBatch:
        return self.split.read(rows)


def make_origin(split: Split, device: Device, batch_rows: int) -> Origin | None:
    """Where the records of a split come from: made for each batch, or ``None``: read from its files."""
    if not split.synthetic:
        return None
    return MadeRows(split.rows_on(device), device.empty(batch_rows, np.float32))


def load_resident(split: Split, data: DataConfig, device: Device, share: float = 1.0) -> ResidentRows | None:
    """Bring a whole split into the device's memory; ``None`` where it takes more than ``share`` of what is free."""
    layout = split.record_source().layout
    free, need = device.free_memory(), split.rows * layout.words * 4
    if free is not None and need > share * free:
        return None
    stored = device.empty((split.rows, layout.words), np.uint32)
    origin = make_origin(split, device, _CHUNK)
    with open_feed(
        split, data, device=device, origin=origin, batch_rows=_CHUNK, seed=0, shuffle=False, drop_last=False, epochs=1
    ) as batches:
        at = 0
        for batch in batches:
            rows = len(batch.host.records)
            if origin is None:
                device.upload(batch.host.records, stored[at : at + rows])
            else:
                words = device.upload(batch.host.records, device.empty(batch.host.records.shape, np.uint32))
                origin.records(words.view(np.int64).reshape(-1), stored[at : at + rows])
            device.record().synchronize()
            at += rows
    return ResidentRows(stored)


def need_resident(split: Split, data: DataConfig, device: Device) -> ResidentRows:
    """``load_resident``, or an error.

    Raises:
        DeviceError: the rows do not fit.
    """
    resident = load_resident(split, data, device)
    if resident is None:
        need, free = split.rows * split.record_source().layout.words * 4, device.free_memory() or 0
        raise DeviceError(
            f"data.on_device: {need / 2**30:.1f} GiB of rows do not fit the {free / 2**30:.1f} GiB "
            "that the GPU has free; leave it out, and the rows are read as they are needed"
        )
    return resident


@contextmanager
def open_feed(
    split: Split,
    data: DataConfig,
    *,
    device: Device,
    origin: Origin | None,
    batch_rows: int,
    seed: int,
    shuffle: bool,
    drop_last: bool,
    rank: int = 0,
    ranks: int = 1,
    start_step: int = 0,
    stop_step: int | None = None,
    epochs: int | None = None,
) -> Iterator[Iterator[DeviceBatch]]:
    """Batches of a split, read ahead; with several ranks each gets the records of the whole batch.

    Args:
        split: whose rows.
        data: depth of the ring, threads, window and block of the shuffle.
        device: gives pinned buffers.
        origin: of numbered rows, or ``None``.
        batch_rows: rows of the global batch.
        seed: of the order.
        shuffle: whether the order is drawn.
        drop_last: leave out an incomplete last batch of an epoch.
        rank: this one.
        ranks: all.
        start_step: steps that are done already.
        stop_step: last step; ``None``: only ``epochs`` ends it.
        epochs: passes over the split; ``None``: only ``stop_step`` ends it.
    """
    made = isinstance(origin, MadeRows)
    source = split if origin is None else _NumberedSplit(split, split.made().first if made else 0)
    with RecordLoader(
        source,
        device=device,
        batch_size=batch_rows,
        rank=rank,
        ranks=ranks,
        seed=seed,
        shuffle=shuffle,
        window=data.shuffle_window,
        drop_last=drop_last,
        prefetch=data.prefetch,
        block=data.shuffle_block,
        readers=data.readers,
        whole_batches=ranks > 1,
        start_step=start_step,
        stop_step=stop_step,
        epochs=epochs,
    ) as loader:
        yield (DeviceBatch(batch, origin) for batch in loader)
