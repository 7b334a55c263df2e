"""Checkpoints: sharded per rank, complete or absent, read on any number of ranks.

A checkpoint is a folder (docs/checkpoints.md specifies it)::

    step-000000001200/
        manifest.json           step, meta, and of every tensor: shape, dtype, and files with bytes and SHA-256
        rank-0000/              what rank 0 wrote: one .npy file per tensor or piece
            bottom.0.weight.npy
        rank-0001/
            table.C1.npy

It is written under another name, flushed to disk file by file and then renamed, so that a crash at any
moment leaves the previous one intact.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dlrm.errors import CheckpointError
from embedding.comm import Comm
from pipeline.agreement import everywhere, on_rank_0
from pipeline.checkpoint_folder import base_reference, begin, complete_ones, finish, folder_of, prune, target_of
from pipeline.checkpoint_model import check_compatible
from pipeline.checkpoint_parts import Part, RowSet, Touched, Value, part_file, parts_of, write_part
from pipeline.checkpoint_pieces import (
    Piece,
    PieceEntry,
    TensorEntry,
    extent,
    join_shards,
    parse_tensor,
    piece_values,
    read_part,
    tensor_values,
)
from pipeline.manifest_file import MANIFEST, checksum_of, read_manifest
from pipeline.tensor_file import StoredFile, sync_folder, write_tensor

__all__ = [
    "Checkpoint",
    "Piece",
    "TensorEntry",
    "check_compatible",
    "latest_checkpoint",
    "open_checkpoint",
    "prune_checkpoints",
    "save_checkpoint",
]

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that was opened; tensors are read when asked for.

    Attributes:
        path: its folder.
        step: training steps that its weights have seen.
        meta: what the writer noted (config, model, plan, place in the data).
        ranks: ranks that wrote it.
        tensors: where each tensor lies.
        base: the checkpoint that has the rows which an increment leaves out; ``None`` where nothing is left out.
    """

    path: Path
    step: int
    meta: dict[str, Any]
    ranks: int
    tensors: dict[str, TensorEntry]
    base: Checkpoint | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, whichever rank wrote them."""
        return tuple(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def entry(self, name: str) -> TensorEntry:
        """Shape, dtype and files of a tensor, without reading it.

        Raises:
            CheckpointError: there is no such tensor.
        """
        if name not in self.tensors:
            raise CheckpointError(
                f"checkpoint {self.path}: has no tensor {name!r}, only {_some(self.names)}; "
                "use a checkpoint of this model"
            )
        return self.tensors[name]

    def read(
        self, name: str, out: Array | None = None, *, rows: range | None = None, columns: range | None = None
    ) -> Array:
        """Read a tensor, or some rows and columns of it, and verify the checksums of the files they lie in.

        It comes together from whatever pieces there are, in blocks: extra memory is a few times 16 MiB. A file is
        read from end to end where any part of it is needed.

        Args:
            name: such as ``bottom.0.weight``.
            out: array of the shape asked for and the tensor's dtype, any strides; ``None`` allocates.
            rows: ascending rows; ``None``: all.
            columns: ascending columns of a tensor of two axes; ``None``: all.

        Returns:
            ``out`` or the new array: the tensor's shape, with ``len(rows)`` and ``len(columns)`` where given.

        Raises:
            CheckpointError: there is no such tensor or part, ``out`` does not fit, or a file is missing, cut off or
                damaged; ``out`` is undefined then.
        """
        entry = self.entry(name)
        all_rows, all_columns = extent(entry.shape)
        shape = list(entry.shape)
        for axis, (asked, whole) in enumerate(((rows, all_rows), (columns, all_columns))):
            if asked is None:
                continue
            outside = asked and (asked.step < 1 or asked[0] < 0 or asked[-1] >= len(whole))
            if outside or axis >= len(shape) or (axis and len(shape) != 2):
                raise CheckpointError(
                    f"checkpoint {self.path}: {name} is {list(entry.shape)} and has no "
                    f"{('rows', 'columns')[axis]} {asked}; use a checkpoint of this model"
                )
            shape[axis] = len(asked)
        if out is not None and (out.shape != tuple(shape) or out.dtype != np.dtype(entry.dtype)):
            raise CheckpointError(
                f"checkpoint {self.path}: {name} is {entry.dtype} {shape}, but {out.dtype} "
                f"{list(out.shape)} is expected; use a checkpoint of this model"
            )
        if out is None:
            out = np.empty(shape, dtype=np.dtype(entry.dtype))
        rows, columns = all_rows if rows is None else rows, all_columns if columns is None else columns
        flat = out.reshape(len(rows), len(columns))  # a view, unless there are three axes and odd strides
        self._fill(name, flat, rows, columns)
        if not np.may_share_memory(flat, out):
            out[...] = flat.reshape(out.shape)
        return out

    def _fill(self, name: str, out: Array, rows: range, columns: range) -> None:
        entry = self.entry(name)
        if entry.partial and self.base is not None:
            self.base._fill(name, out, rows, columns)  # noqa: SLF001 its own class
        read_part(self.path, name, entry, out, rows, columns)


def save_checkpoint(
    directory: Path,
    *,
    step: int,
    tensors: Mapping[str, Value],
    meta: Mapping[str, Any],
    comm: Comm,
    name: str | None = None,
    base: Path | None = None,
    touched: Mapping[str, Touched] | None = None,
) -> Path:
    """Write a checkpoint (collective).

    Tensors are streamed to disk in blocks of 16 MiB; nothing is held twice.

    Args:
        directory: folder of the run's checkpoints, on storage that all ranks share; made if missing.
        step: training steps done.
        tensors: what this rank writes: whole tensors, each on one rank only, or a ``Piece`` or several of a tensor
            whose pieces on all ranks together hold every element once. Looked up one at a time, so that a lazy
            mapping needs memory for one.
        meta: JSON values; rank 0's are kept.
        comm: the ranks that write.
        name: folder name; ``None``: ``step-`` and the step. One of the same name is replaced once the new
            one is complete.
        base: write an increment: a checkpoint in ``directory``, the same on all ranks, that has the rows which were
            not touched. It may itself be an increment.
        touched: with ``base``, by tensor name which rows of this rank's array changed since ``base``: a mask
            (bool [rows]), its bits (uint8 [ceil(rows / 8)], ``packbits`` with ``bitorder="little"``) or row numbers
            (int32, int64), counted within the array that is handed in, whatever rows of the tensor it holds. For a
            list of pieces a list. Tensors that are not named are written as a whole.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: on every rank, if any rank cannot write, two ranks write the same rows, rows are
            missing, ``meta`` is not JSON, another process is saving into ``directory``, or ``base`` is not a
            complete checkpoint with the same tensors.
    """
    directory = Path(directory)
    target = target_of(directory, name, step)
    with contextlib.ExitStack() as lock:
        scratch = directory / on_rank_0(comm, target, lambda: begin(directory, target, base, lock))
        try:
            shards = everywhere(
                comm, target, lambda: write_shard(scratch, comm.rank, all_parts(tensors, base, touched or {}))
            )
            on_rank_0(comm, target, lambda: commit(scratch, target, step, meta, shards, base))
        except CheckpointError:
            if comm.rank == 0:
                shutil.rmtree(scratch, ignore_errors=True)
            raise
    return target


def open_checkpoint(path: Path, *, comm: Comm | None = None) -> Checkpoint:
    """Open a checkpoint (collective if a ``comm`` is given: all ranks succeed or all raise).

    Raises:
        CheckpointError: it, or one that it is an increment of, is missing, damaged or of a newer format.
    """
    if comm is None:
        return _open(path)
    opened: list[Checkpoint] = []

    def work() -> int:
        opened.append(_open(path))
        return opened[0].step

    steps = everywhere(comm, path, work)
    if len(set(steps)) > 1:
        raise CheckpointError(f"checkpoint {path}: ranks see different ones (steps {steps}); use shared storage")
    return opened[0]


def latest_checkpoint(directory: Path) -> Path | None:
    """The checkpoint with the most steps; of equal ones the newest; ``None`` where there are none.

    Raises:
        CheckpointError: one of them has a damaged manifest.
    """
    opened = [(*_age(path), path) for path in complete_ones(directory)]
    return max(opened)[-1] if opened else None


def prune_checkpoints(directory: Path, keep: int, protect: Collection[Path | str] = ()) -> list[Path]:
    """Delete all but the ``keep`` newest checkpoints that were saved without a name (rank 0 only).

    What a checkpoint that stays is an increment of stays too.

    Args:
        directory: folder of the run's checkpoints.
        keep: how many stay; at least 1.
        protect: names or paths that stay in any case.

    Returns:
        What was deleted.
    """
    return prune(directory, keep, protect)


# --- writing


def all_parts(
    tensors: Mapping[str, Value], base: Path | None, touched: Mapping[str, Touched]
) -> Iterator[tuple[str, list[Part]]]:
    """What this rank writes, tensor by tensor.

    Raises:
        CheckpointError: a piece or a row set does not fit, or there are touched rows without a base.
    """
    if touched and base is None:
        raise CheckpointError("touched rows: are of an increment; name its base")
    if unknown := [name for name in touched if name not in tensors]:
        raise CheckpointError(f"touched rows of {unknown[0]!r}: this rank writes no such tensor")
    known: dict[int, RowSet] = {}
    for name in tensors:
        yield name, parts_of(name, tensors[name], touched.get(name), known)


def write_shard(scratch: Path, rank: int, parts: Iterable[tuple[str, list[Part]]]) -> dict[str, Any]:
    """Write this rank's files.

    Args:
        scratch: folder of the checkpoint.
        rank: of this process.
        parts: by tensor name.

    Returns:
        JSON values for ``commit``: of each tensor shape, dtype and pieces.

    Raises:
        CheckpointError: a tensor cannot be saved.
        OSError: a file cannot be written.
    """
    folder = scratch / f"rank-{rank:04d}"
    entries: dict[str, Any] = {}
    numbered: dict[tuple[int, range], StoredFile] = {}
    for name, own in parts:
        pieces = []
        for part in own:
            # Where there are fewer rows than ranks, some have nothing to write.
            if not (part.rows and part.columns) and part.array.shape != part.shape:
                continue
            # Not parents=True: on storage that is not shared, the scratch folder is missing and that must show.
            folder.mkdir(exist_ok=True)
            if part.touched is not None:
                pieces.append(write_part(folder, part, numbered))
                continue
            file = part_file(folder, part)
            stored = StoredFile(f"{folder.name}/{file.name}", *write_tensor(file, part.array))
            pieces.append(PieceEntry(stored, part.rows, part.columns, None, len(part.rows)))
        entries[name] = {
            "shape": list(own[0].shape) if own else None,
            "dtype": own[0].array.dtype.str if own else None,
            "pieces": [piece_values(piece) for piece in pieces],
        }
    if folder.exists():
        sync_folder(folder)
    return entries


def commit(
    scratch: Path,
    target: Path,
    step: int,
    meta: Mapping[str, Any],
    shards: Sequence[Mapping[str, Any]],
    base: Path | None,
) -> str:
    """Join what the ranks wrote, and give the folder its name (rank 0, once every rank has written).

    Returns:
        The name.

    Raises:
        CheckpointError: the shards do not make whole tensors, or the base does not have them.
        OSError: the folder cannot be written.
    """
    tensors = join_shards(shards)
    manifest: dict[str, Any] = {
        "step": step,
        "created": time.time(),
        "ranks": len(shards),
        "meta": dict(meta),
        "tensors": {name: tensor_values(entry) for name, entry in tensors.items()},
    }
    partial = [name for name, entry in tensors.items() if entry.partial]
    if base is not None and partial:
        opened = _open(base)
        for name in partial:
            found, entry = opened.entry(name), tensors[name]
            if (found.shape, found.dtype) != (entry.shape, entry.dtype):
                raise CheckpointError(
                    f"checkpoint {target}: {name} is {entry.dtype} {list(entry.shape)}, but {found.dtype} "
                    f"{list(found.shape)} in its base {base}; save it in full"
                )
        manifest["base"] = base_reference(base)
    return finish(scratch, target, manifest, tensors)


# --- reading


def _open(path: Path) -> Checkpoint:
    folder = folder_of(path)
    manifest = read_manifest(folder)
    try:
        tensors = {name: parse_tensor(values) for name, values in manifest["tensors"].items()}
        base = _open_base(folder, manifest["base"]) if "base" in manifest else None
        return Checkpoint(folder, manifest["step"], manifest["meta"], manifest["ranks"], tensors, base)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path}: {MANIFEST} lacks {error}; use another checkpoint") from None


def _open_base(folder: Path, reference: Mapping[str, str]) -> Checkpoint:
    path = folder.with_name(reference["name"])
    try:
        same = checksum_of(read_manifest(folder_of(path))) == reference["checksum"]
        opened = _open(path)
    except CheckpointError as error:
        raise CheckpointError(
            f"checkpoint {folder}: is an increment of {path.name}, which cannot be opened beside it ({error})"
        ) from None
    if not same:
        raise CheckpointError(
            f"checkpoint {folder}: is an increment of another {path.name} than lies beside it; use another checkpoint"
        )
    return opened


def _age(path: Path) -> tuple[int, float]:
    manifest = read_manifest(folder_of(path))
    return manifest["step"], manifest["created"]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
