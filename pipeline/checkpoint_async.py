"""Checkpoints written behind the training: it stops for a copy of the tensors only.

Each rank copies what it writes and goes on; a thread of its own puts the copy on disk. The threads use no
communicator: MPI and NCCL want a group's calls in one order, and the training makes them. What they have to tell
each other goes through the folder that they write into anyway: a rank whose files are on disk leaves a receipt
there, and rank 0 names the checkpoint once it has found everybody's. Errors are agreed upon by the ranks at their
next call of ``save`` or ``wait``.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dlrm.errors import CheckpointError
from embedding.comm import Comm
from pipeline.agreement import everywhere, on_rank_0
from pipeline.checkpoint import all_parts, commit, prune_checkpoints, write_shard
from pipeline.checkpoint_folder import begin, target_of
from pipeline.checkpoint_parts import Part, RowSet, Touched, Value, snapshot
from pipeline.checkpoint_pieces import stored_bytes
from pipeline.copy_room import CopyRoom

# Between two looks for receipts; it doubles from one to the other.
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 0.5
# After every rank said that it has written: how long its files may take to show on shared storage.
_VISIBLE_S = 60.0


@dataclass(slots=True)
class _Save:
    """One checkpoint under way."""

    target: Path
    scratch: Path
    step: int
    meta: dict[str, Any]
    base: Path | None
    parts: list[tuple[str, list[Part]]]
    lock: contextlib.ExitStack
    unnamed: bool
    stall_seconds: float = 0.0
    # By what this rank's thread does: its files are on disk or failed; everything it does is done.
    written: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    # By the training thread of rank 0: all ranks have written; some rank has failed.
    all_written: threading.Event = field(default_factory=threading.Event)
    given_up: threading.Event = field(default_factory=threading.Event)
    write_error: Exception | None = None
    commit_error: Exception | None = None


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that is complete.

    Attributes:
        path: its folder.
        step: training steps that its weights have seen.
        base: name of the one that it is an increment of; ``None``: it stands alone.
        stall_seconds: how long the training stood still for it.
        write_seconds: how long rank 0 took to write its part.
        num_bytes: of all ranks' files.
    """

    path: Path
    step: int
    base: str | None
    stall_seconds: float
    write_seconds: float
    num_bytes: int

    def to_values(self) -> dict[str, Any]:
        """The fields of a ``save`` record (``pipeline.progress``)."""
        seconds = {"stall_s": self.stall_seconds, "write_s": self.write_seconds}
        return {"step": self.step, "path": str(self.path), "base": self.base, **seconds, "bytes": self.num_bytes}


class AsyncSaver:
    """Saves checkpoints of one run while its training goes on (all methods but ``close`` are collective).

    At most one save is under way: the next one waits for it. Wait also before anything else writes into the folder.
    Memory: one copy of what this rank writes (an increment's touched rows), kept for the next one.

    Attributes:
        snapshot_seconds: how long the training stood still for the last ``save``, all in all.
        write_seconds: how long the last finished writing took this rank, behind the training.
        room: where copies go.
    """

    def __init__(
        self,
        directory: Path,
        comm: Comm,
        *,
        keep: int | None = None,
        memory_limit_bytes: int | Callable[[], int] | None = None,
        on_saved: Callable[[Saved], None] | None = None,
    ) -> None:
        """Write nothing yet.

        Args:
            directory: folder of the run's checkpoints, on storage that all ranks share.
            comm: the ranks that write; used in the caller's thread only.
            keep: how many unnamed checkpoints stay when a new one is there; ``None``: all.
            memory_limit_bytes: a copy larger than this on any rank is not made: all ranks then save at once, and
                the training waits. A function is asked at every save. ``None``: no limit; 0: never a copy.
            on_saved: told of every complete checkpoint, on rank 0, as a rule by another thread.
        """
        self.directory = Path(directory)
        self.comm = comm
        self.snapshot_seconds = self.write_seconds = 0.0
        self._keep = keep
        self._limit = memory_limit_bytes
        self._on_saved = on_saved
        self._save: _Save | None = None
        self.room = CopyRoom()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.wait()
        else:  # another rank may be anywhere: no collective call
            self.close()

    @property
    def saving(self) -> Path | None:
        """The checkpoint under way, or whose end was not yet asked for with ``wait``."""
        return self._save.target if self._save else None

    def prepare(self, tensors: Mapping[str, Value]) -> None:
        """Touch memory for a copy of tensors like these, behind the training (not collective; none is under way)."""
        sizes = [part.copied_bytes for _, parts in all_parts(tensors, None, {}) for part in parts]
        if self._allows(sum(sizes)):
            with contextlib.suppress(MemoryError):  # a save says so, if it is still true then
                self.room.prepare(sizes)

    def save(
        self,
        *,
        step: int,
        tensors: Mapping[str, Value],
        meta: Mapping[str, Any],
        name: str | None = None,
        base: Path | None = None,
        touched: Mapping[str, Touched] | None = None,
    ) -> Path:
        """Copy the tensors and begin to write them; arguments as of ``save_checkpoint``.

        When it returns, ``tensors`` and ``touched`` may change.

        Returns:
            The folder that will be there once the writing is done.

        Raises:
            CheckpointError: on every rank, if the save before this one failed on any, or this one cannot begin.
        """
        started = time.perf_counter()
        self.wait()
        target = target_of(self.directory, name, step)
        whole: list[tuple[str, list[Part]]] = []

        def fits() -> bool:
            whole.extend(all_parts(tensors, base, touched or {}))
            return self._allows(sum(part.nbytes for _, parts in whole for part in parts))

        if all(everywhere(self.comm, target, fits)):
            save = self._save = self._begin(target, step, meta, base, whole, unnamed=name is None)
            self.snapshot_seconds = save.stall_seconds = time.perf_counter() - started
            threading.Thread(target=self._run, args=(save,), name="checkpoint", daemon=True).start()
            return target
        with contextlib.ExitStack() as lock:
            scratch = self.directory / on_rank_0(self.comm, target, lambda: begin(self.directory, target, base, lock))
            save = _Save(target, scratch, step, dict(meta), base, whole, lock, unnamed=name is None)
            self._write_at_once(save, started)
        return target

    def _allows(self, copy_bytes: int) -> bool:
        limit = self._limit() if callable(self._limit) else self._limit
        return limit is None or copy_bytes <= limit

    def _write_at_once(self, save: _Save, started: float) -> None:
        """Write without a copy, every rank in its own thread."""
        try:
            shards = everywhere(self.comm, save.target, lambda: write_shard(save.scratch, self.comm.rank, save.parts))
            self.write_seconds = time.perf_counter() - started

            def finish() -> str:
                save.stall_seconds = time.perf_counter() - started
                self._finish(save, shards)
                return save.target.name

            on_rank_0(self.comm, save.target, finish)
        except CheckpointError:
            if self.comm.rank == 0:
                shutil.rmtree(save.scratch, ignore_errors=True)
            raise
        self.snapshot_seconds = time.perf_counter() - started

    def wait(self) -> Path | None:
        """Return once the save under way is done.

        Returns:
            Its folder; ``None`` if nothing was under way.

        Raises:
            CheckpointError: on every rank, if it failed on any; nothing is left of it.
        """
        save, self._save = self._save, None
        if save is None:
            return None
        save.written.wait()
        try:
            everywhere(self.comm, save.target, lambda: _raise(save.write_error))
            save.all_written.set()
            on_rank_0(self.comm, save.target, lambda: _outcome(save))
        except CheckpointError:
            self._give_up(save)
            raise
        return save.target

    def close(self, patience_s: float = 60.0) -> None:
        """End without the other ranks, which may have failed: what is under way is finished, or given up.

        Args:
            patience_s: how long it may take to finish.
        """
        save, self._save = self._save, None
        if save is not None and not save.ended.wait(patience_s):
            self._give_up(save)

    def _begin(
        self,
        target: Path,
        step: int,
        meta: Mapping[str, Any],
        base: Path | None,
        parts: list[tuple[str, list[Part]]],
        *,
        unnamed: bool,
    ) -> _Save:
        """Lock the folder and copy the tensors."""
        with contextlib.ExitStack() as lock:
            scratch = self.directory / on_rank_0(self.comm, target, lambda: begin(self.directory, target, base, lock))
            save = _Save(target, scratch, step, {}, base, [], lock, unnamed)

            def copy() -> None:
                save.meta = _plain(meta)
                save.parts = _copied(parts, target, self.room)

            try:
                everywhere(self.comm, target, copy)
            except CheckpointError:
                if self.comm.rank == 0:
                    shutil.rmtree(scratch, ignore_errors=True)
                raise
            save.lock = lock.pop_all()
        return save

    def _run(self, save: _Save) -> None:
        """What the thread does: write, leave a receipt, and on rank 0 name the checkpoint."""
        started = time.perf_counter()
        try:
            try:
                shard = write_shard(save.scratch, self.comm.rank, save.parts)
                _leave_receipt(save.scratch, self.comm.rank, {"shard": shard})
            except Exception as error:  # noqa: BLE001 the training thread raises it
                save.write_error = error
                with contextlib.suppress(OSError):
                    _leave_receipt(save.scratch, self.comm.rank, {"failed": True})
            save.parts.clear()
            self.write_seconds = time.perf_counter() - started
            save.written.set()
            if self.comm.rank == 0:
                self._commit(save)
        except Exception as error:  # noqa: BLE001 the training thread raises it
            save.commit_error = error
        finally:
            save.lock.close()
            save.ended.set()

    def _commit(self, save: _Save) -> None:
        """Rank 0's thread, once it has written its own files."""
        shards = self._receipts(save)
        if shards is None:
            shutil.rmtree(save.scratch, ignore_errors=True)
            return
        for rank in range(self.comm.size):
            _receipt(save.scratch, rank).unlink()
        self._finish(save, shards)

    def _finish(self, save: _Save, shards: Sequence[Mapping[str, Any]]) -> None:
        """Name what all ranks have written, tell of it, and prune (rank 0)."""
        commit(save.scratch, save.target, save.step, save.meta, shards, save.base)
        if self._on_saved is not None:
            base = None if save.base is None else save.base.name
            sizes = self.write_seconds, stored_bytes(shards)
            self._on_saved(Saved(save.target, save.step, base, save.stall_seconds, *sizes))
        if save.unnamed and self._keep is not None:
            prune_checkpoints(self.directory, self._keep)

    def _receipts(self, save: _Save) -> list[Any] | None:
        """What every rank wrote, as soon as it has; ``None`` if one of them failed."""
        found: dict[int, Any] = {}
        pause_s, patient_until = _SHORTEST_PAUSE_S, float("inf")
        while True:
            for rank in range(self.comm.size):
                if rank not in found and (receipt := _read_receipt(save.scratch, rank)) is not None:
                    found[rank] = receipt
            if any("failed" in receipt for receipt in found.values()) or save.given_up.is_set():
                return None
            if len(found) == self.comm.size:
                return [found[rank]["shard"] for rank in range(self.comm.size)]
            if save.all_written.is_set():
                patient_until = min(patient_until, time.monotonic() + _VISIBLE_S)
            if time.monotonic() > patient_until:
                missing = next(rank for rank in range(self.comm.size) if rank not in found)
                raise CheckpointError(
                    f"checkpoint {save.target}: rank 0 does not see what rank {missing} wrote; run.directory must be "
                    "on storage that all ranks share"
                )
            save.given_up.wait(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _give_up(self, save: _Save) -> None:
        save.given_up.set()
        if self.comm.rank == 0:
            save.ended.wait(_VISIBLE_S)
            shutil.rmtree(save.scratch, ignore_errors=True)


def _plain(meta: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of JSON values.

    Raises:
        CheckpointError: they are none.
    """
    try:
        copy: dict[str, Any] = json.loads(json.dumps(dict(meta), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"meta: not JSON ({error}); note plain values only") from None
    return copy


def _copied(parts: list[tuple[str, list[Part]]], target: Path, room: CopyRoom) -> list[tuple[str, list[Part]]]:
    settled: dict[int, tuple[RowSet, RowSet]] = {}
    try:
        room.begin([part.copied_bytes for _, own in parts for part in own])
        return [(name, [snapshot(part, settled, room) for part in own]) for name, own in parts]
    except MemoryError:
        size = sum(part.nbytes for _, own in parts for part in own)
        raise CheckpointError(
            f"checkpoint {target}: no memory for a copy of {size / 2**20:.0f} MiB; save synchronously"
        ) from None


def _receipt(scratch: Path, rank: int) -> Path:
    return scratch / f"receipt-{rank:04d}.json"


def _leave_receipt(scratch: Path, rank: int, values: Mapping[str, Any]) -> None:
    file = _receipt(scratch, rank)
    unfinished = file.with_suffix(".tmp")
    unfinished.write_text(json.dumps(values), encoding="utf-8")
    unfinished.replace(file)


def _read_receipt(scratch: Path, rank: int) -> Any:
    try:
        return json.loads(_receipt(scratch, rank).read_bytes())
    except FileNotFoundError:
        return None


def _raise(error: Exception | None) -> None:
    """Raise it as something that ranks agree upon."""
    if error is None:
        return
    if isinstance(error, CheckpointError | OSError):
        raise error
    raise CheckpointError(f"checkpoint: {type(error).__name__}: {error}")


def _outcome(save: _Save) -> str:
    """Wait for rank 0's thread and raise what it met."""
    save.ended.wait()
    _raise(save.commit_error)
    return save.target.name
