"""Which rows of the tables changed since each of several readers last asked: checkpoints, evaluation elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from embedding.table import Shard

Reader = Literal["checkpoint", "evaluation"]


class ChangedRows:
    """Marks of updated rows on this rank, a set for each reader (all methods are collective).

    One reader alone uses the marks that the updates make; several have copies, a byte a row each.
    """

    def __init__(self, embedding: Any, readers: Sequence[Reader]) -> None:
        """Note updates from now on, if there are readers."""
        self._embedding = embedding
        self._marks: dict[Reader, list[Any]] = {reader: [] for reader in readers}
        if readers:
            embedding.track_touched()

    def shards(self, reader: Reader) -> list[Shard]:
        """This rank's shards; ``touched`` says what changed since the reader's last ``forget``."""
        self._embedding.settle()
        shards: list[Shard] = self._embedding.shards()
        if len(self._marks) == 1:
            return shards
        for marks in self._marks.values():
            if not marks:
                marks += [np.zeros(len(shard.rows), np.bool_) for shard in shards]
            for mark, shard in zip(marks, shards, strict=True):
                assert shard.touched is not None
                mark |= shard.touched
        self._embedding.clear_touched()
        return [replace(shard, touched=mark) for shard, mark in zip(shards, self._marks[reader], strict=True)]

    def forget(self, reader: Reader) -> None:
        """The reader has all rows as they are."""
        if len(self._marks) == 1:
            self._embedding.clear_touched()
            return
        for shard in self.shards(reader):
            assert shard.touched is not None
            shard.touched.fill(False)
