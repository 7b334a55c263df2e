"""Which rows of the tables changed since each of several readers last asked: checkpoints, evaluation elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from dlrm.device import Array, Device
from embedding.table import Shard

Reader = Literal["checkpoint", "evaluation"]


class ChangedRows:
    """Marks of updated rows on this rank, a set for each reader (all methods are collective).

    One reader alone uses the marks that the updates make; several have copies on the device, a byte a row each.
    """

    def __init__(self, embedding: Any, readers: Sequence[Reader], device: Device) -> None:
        """Note updates from now on, if there are readers.

        Args:
            embedding: this rank's tables.
            readers: who will ask.
            device: holds the tables.
        """
        self._embedding, self._device = embedding, device
        self._marks: dict[Reader, list[Array]] = {reader: [] for reader in readers}
        if readers:
            embedding.track_touched()

    def shards(self, reader: Reader) -> list[Shard]:
        """This rank's shards, on the host; ``touched`` says what changed since the reader's last ``forget``."""
        self._embedding.settle()
        shards: list[Shard] = self._embedding.shards()
        if len(self._marks) == 1:
            return shards
        marks = map(self._device.to_host, self._collect(reader))
        return [replace(shard, touched=mark) for shard, mark in zip(shards, marks, strict=True)]

    def resident(self, reader: Reader) -> list[Shard]:
        """As ``shards``, but where the rows lie."""
        shards: list[Shard] = self._embedding.resident()
        if len(self._marks) == 1:
            return shards
        return [replace(shard, touched=mark) for shard, mark in zip(shards, self._collect(reader), strict=True)]

    def _collect(self, reader: Reader) -> list[Array]:
        """Add what was updated since the last call to everybody's marks; those of ``reader``."""
        fresh = [shard.touched for shard in self._embedding.resident()]
        for marks in self._marks.values():
            if not marks:
                marks += [touched.copy() for touched in fresh]
            for mark, touched in zip(marks, fresh, strict=True):
                mark |= touched
        self._embedding.clear_touched()
        return self._marks[reader]

    def forget(self, reader: Reader) -> None:
        """The reader has all rows as they are."""
        if len(self._marks) == 1:
            self._embedding.clear_touched()
            return
        for mark in self._collect(reader):
            mark.fill(False)
