"""When a run saves: behind the training or not, in full or as an increment."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from dlrm.config import CheckpointConfig
from embedding.table import Shard
from pipeline.changed_rows import ChangedRows
from pipeline.checkpoint import Checkpoint
from pipeline.checkpoint_async import AsyncSaver, Saved
from pipeline.checkpoint_folder import STEP_PREFIX, target_of
from pipeline.checkpoint_shards import touched_of_shards
from pipeline.engine import Engine
from pipeline.host_memory import available_memory

_FREE_FOR_COPY = 0.5
"""Of the memory that is free."""

_WORTHWHILE = 0.5
"""An increment with more of the tables' bytes than this is written in full: it saves little, and costs its base."""

_PATIENCE_S = 10.0
"""How long what is being written may take after an error, whose message waits for it."""

_LONGEST_CHAIN = 8
"""So many increments may lie between a checkpoint and one that stands alone: each is read again at a resume."""


class RunSaver:
    """The checkpoints of one run on this rank (all methods but ``close`` are collective).

    Increments have the rows that changed since the last checkpoint of this process that stands alone, so that all of
    them have one base; a resumed run's first ones are based on the checkpoint that it resumed from.
    """

    def __init__(
        self,
        directory: Path,
        engine: Engine,
        config: CheckpointConfig,
        *,
        keep: int,
        resumed: Checkpoint | None,
        changed: ChangedRows,
        on_saved: Callable[[Saved], None],
    ) -> None:
        """Write nothing yet.

        Args:
            directory: folder of the run's checkpoints.
            engine: whose weights and states are saved.
            config: how.
            keep: how many unnamed checkpoints stay, besides those that they are increments of.
            resumed: the checkpoint that ``engine`` has been filled from.
            changed: has a reader ``checkpoint`` where increments are written.
            on_saved: told of every complete checkpoint, on rank 0, perhaps by another thread.
        """
        self._directory = directory
        self._engine = engine
        self._asynchronous = config.asynchronous
        self._limit_bytes = config.memory_limit_mib and config.memory_limit_mib * 2**20
        self._saver = AsyncSaver(
            directory,
            engine.comm,
            keep=keep,
            memory_limit_bytes=self._copy_limit if config.asynchronous else 0,
            on_saved=on_saved,
        )
        self._incremental, self._changed = config.incremental, changed
        self._base: Path | None = None
        self._base_step = 0
        # A name such as "best" is used again, which a base must not be.
        numbered = resumed is not None and resumed.path.name.startswith(STEP_PREFIX)
        if config.incremental and resumed is not None and numbered and _chain(resumed) < _LONGEST_CHAIN:
            self._base, self._base_step = directory / resumed.path.name, resumed.step

    def prepare(self) -> None:
        """Get memory for copies ready behind the training, so that the first one takes no longer than others."""
        if self._asynchronous:
            self._saver.prepare(self._engine.tensors())

    def save(self, *, step: int, meta: Mapping[str, Any], name: str | None = None) -> Path:
        """Save the state of the moment; when it returns, training may go on.

        Args:
            step: steps done.
            meta: JSON values.
            name: of the folder, which replaces one of that name; ``None``: one of the numbered checkpoints.

        Returns:
            The folder that will be there once the writing is done.

        Raises:
            CheckpointError: on every rank, if this save cannot begin, or the one before it failed on any.
        """
        shards = self._changed.shards("checkpoint") if self._incremental else []
        touched = touched_of_shards(shards, self._engine.comm.rank)
        base = self._base if self._increment_is_worthwhile(step, shards) else None
        path = self._saver.save(
            step=step,
            tensors=self._engine.tensors(),
            meta=meta,
            name=name,
            base=base,
            touched=touched if base is not None else None,
        )
        if self._incremental and base is None and name is None:
            self._base, self._base_step = target_of(self._directory, None, step), step
            self._changed.forget("checkpoint")
        return path

    def wait(self) -> None:
        """Return once what is being written is complete.

        Raises:
            CheckpointError: on every rank, if it failed on any.
        """
        self._saver.wait()

    def close(self) -> None:
        """End without the other ranks, which may have failed."""
        with contextlib.suppress(OSError):
            self._saver.close(_PATIENCE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.wait()
        else:
            self.close()

    def _increment_is_worthwhile(self, step: int, shards: Sequence[Shard]) -> bool:
        """Whether there is a base with fewer steps, and few enough rows changed since; the same on every rank."""
        if self._base is None or self._base_step >= step:
            return False
        sizes = np.zeros(2, np.int64)
        for shard in shards:
            assert shard.touched is not None
            if not (shard.replicated and self._engine.comm.rank):
                row_bytes = shard.weight.strides[0]
                sizes += row_bytes * np.array([np.count_nonzero(shard.touched), len(shard.rows)], np.int64)
        self._engine.comm.all_reduce(sizes).wait()
        return bool(sizes[0] <= _WORTHWHILE * sizes[1])

    def _copy_limit(self) -> int:
        """Bytes that a copy on this rank may take now."""
        if self._limit_bytes is not None:
            return self._limit_bytes
        free = available_memory()
        return int(free * _FREE_FOR_COPY) // self._engine.topology.local_size + self._saver.room.nbytes


def _chain(checkpoint: Checkpoint) -> int:
    """How many checkpoints lie below one."""
    length = 0
    while checkpoint.base is not None:
        checkpoint, length = checkpoint.base, length + 1
    return length
