"""How a batch gets to a GPU: records that are taken apart there, or columns that the host has decoded.

Shapes: B rows of this rank, G rows of the batch, V words of a record.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dlrm.device import Array, Device, Event
from embedding.buffers import NO_OFFSETS, NO_WEIGHTS
from embedding.captured import CapturedEmbedding
from embedding.captured_bags import ExchangedBags
from embedding.jagged import Jagged
from pipeline.device_feed import DeviceBatch
from pipeline.flight import Flight
from pipeline.formats.record_files import RecordLayout
from pipeline.loader import LoadedBatch
from pipeline.record_loader import RecordBatch
from pipeline.split_records import KeyColumns, SplitKeys, counting_room, split_records


@dataclass(slots=True)
class Records:
    """What a Flight has of its records.

    Attributes:
        brought: [G, V] uint32, where they are brought or made.
        numbers: [G, 2] uint32, numbers of rows.
        room: see ``counting_room``.
        host: the batch, whom a fault is asked of.
    """

    brought: Array
    numbers: Array
    room: Array
    host: RecordBatch | None = None


class Decoded:
    """What a Flight has of columns that the host has decoded: copies in page-locked memory.

    From anywhere else a copy to the device would hold the host until the steps before it are done.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._pools: dict[str, Array] = {}
        self._sent: Event | None = None
        self.host: RecordBatch | None = None

    def wait(self) -> None:
        """Wait until the last batch's copies have been read, before they are overwritten."""
        if self._sent is not None:
            self._sent.synchronize()

    def pin(self, name: str, array: Array) -> Array:
        """A copy of an array of the host."""
        pool = self._pools.get(name)
        if pool is None or pool.dtype != array.dtype or pool.size < array.size:
            pool = self._pools[name] = self._device.pinned_empty((array.size + array.size // 4 + 1,), array.dtype)
        copy = pool[: array.size].reshape(array.shape)
        np.copyto(copy, array)
        return copy

    def pin_bags(self, keys: Jagged) -> Jagged:
        """A copy of a batch's keys."""
        offsets, weights = (
            None if array is None else self.pin(name, array)
            for name, array in (("offsets", keys.offsets), ("weights", keys.weights))
        )
        return Jagged(self.pin("keys", keys.keys), offsets, weights, keys.num_tables, keys.num_rows)

    def sent(self) -> None:
        """Note that all that reads the copies has been issued."""
        self._sent = self._device.record()


class Intake:
    """Writes batches into Flights.

    Args:
        layout: of the records; ``None``: decoded batches come.
        embedding: tables (``CapturedEmbedding``, or the one of several ranks).
        device: the GPU.
        ranks: W.
    """

    def __init__(self, layout: RecordLayout | None, embedding: Any, device: Device, ranks: int) -> None:
        self._layout, self._embedding, self._device, self._ranks = layout, embedding, device, ranks
        self._no_bags = device.xp.asarray(NO_OFFSETS), device.xp.asarray(NO_WEIGHTS)
        if layout is None:
            return
        # Exchanged bags are pooled or taken apart where they have come to.
        turned = isinstance(embedding, CapturedEmbedding)
        self._columns = KeyColumns.of(layout, embedding.specs, device, turned=turned)
        self._bags = {"weighted": layout.weighted}
        if turned:
            vectors = [spec.num_vectors for spec in embedding.specs]
            self._bags["bags"] = layout.missing or layout.weighted or list(layout.hotness) != vectors

    def room(self, flight: Flight, batch_rows: int) -> Records | Decoded:
        """What a Flight has for batches to come by; of records, room for their keys is made."""
        layout, device = self._layout, self._device
        if layout is None:
            return Decoded(device)
        if not layout.plain:
            keys = len(flight.labels) * self._ranks * sum(layout.hotness)
            self._embedding.make_bags(flight.embedding, keys, **self._bags)
        return Records(
            device.empty((batch_rows, layout.words), np.uint32),
            device.empty((batch_rows, 2), np.uint32),
            device.empty(counting_room(layout, batch_rows), np.uint32),
        )

    def take(self, batch: DeviceBatch | LoadedBatch, flight: Flight) -> None:
        """Write labels, dense columns and keys, on the current stream."""
        if isinstance(batch, DeviceBatch):
            self._take_apart(flight, batch)
        else:
            self._take_decoded(flight, batch)

    def _take_apart(self, flight: Flight, batch: DeviceBatch) -> None:
        device, own, host, layout = self._device, flight.staging.brought, batch.host, self._layout
        assert layout is not None
        own.host = host
        rows, index, records = len(host.records), None, own.brought
        if batch.origin is None:
            device.upload(host.records, records[:rows])
        else:
            numbers = device.upload(host.records, own.numbers[:rows]).view(np.int64).reshape(-1)
            records, index = batch.origin.records(numbers, records[:rows])
        host.hold(device.record())
        buffers, bags = flight.embedding, self._no_bags
        if not layout.plain:
            buffers.open(rows)
            bags = buffers.offsets, buffers.weights
        split_records(
            records, index, rows, host.own, layout, self._columns, flight.labels, flight.dense,
            SplitKeys(buffers.keys, *bags, own.room), flight.staging.outcome[1:].view(np.int32), device=device,
        )  # fmt: skip

    def _take_decoded(self, flight: Flight, batch: LoadedBatch) -> None:
        device, rows, host, embedding = self._device, flight.rows, batch.host, self._embedding
        own: Decoded = flight.staging.brought
        own.wait()
        device.upload(own.pin("labels", host.labels.astype(np.float32)), flight.labels[:rows])
        dense = device.upload(own.pin("dense", host.dense), device.empty(host.dense.shape, host.dense.dtype))
        device.convert(dense, flight.dense[:rows, : host.dense.shape[1]])
        if isinstance(embedding, ExchangedBags):
            assert batch.global_keys is not None
            embedding.take_bags(host.keys, own.pin_bags(batch.global_keys), flight.embedding)
        else:
            keys = own.pin_bags(host.keys)
            embedding.take_bags(keys.keys, keys.offsets, keys.weights, flight.embedding)
        own.sent()
        flight.form = flight.embedding.form
