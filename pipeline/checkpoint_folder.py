"""The folder of a run's checkpoints: one writer, names that appear only when all is on disk, what may be deleted.

Dotted names are not checkpoints: being written, moved aside for a successor, or being deleted.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dlrm.errors import CheckpointError
from pipeline.checkpoint_pieces import TensorEntry
from pipeline.manifest_file import MANIFEST, checksum_of, read_manifest, write_manifest
from pipeline.tensor_file import sync_folder

SAVING = ".crosslane-saving-"
ASIDE = ".crosslane-aside-"
DELETING = ".crosslane-deleting-"
STEP_PREFIX = "step-"


def target_of(directory: Path, name: str | None, step: int) -> Path:
    """The folder that a checkpoint will have.

    Raises:
        CheckpointError: ``name`` is not a plain folder name.
    """
    target = directory / (name or f"{STEP_PREFIX}{step:012d}")
    if target.name.startswith(".") or target.parent != directory:
        raise CheckpointError(f"checkpoint name {name!r}: must be a plain folder name without a leading dot")
    return target


def begin(directory: Path, target: Path, base: Path | None, lock: contextlib.ExitStack) -> str:
    """Lock the folder, tidy up after crashes, and make the folder to write in.

    Args:
        directory: folder of the run's checkpoints; made if missing.
        target: the checkpoint to be.
        base: the one that it will be an increment of.
        lock: gets what gives the lock back.

    Returns:
        Name of the folder to write in.

    Raises:
        CheckpointError: another process is saving, or ``base`` is no complete checkpoint beside ``target``.
        OSError: the folder cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    handle = os.open(directory, os.O_RDONLY)
    lock.callback(os.close, handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CheckpointError(
            f"checkpoints {directory}: another process is saving into it; give each run its own run.directory"
        ) from None
    except OSError as error:
        if error.errno not in {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}:  # some network storage has no locks
            raise
    # Who holds the lock is the only writer: whatever is unfinished here was left by a crash.
    for path in directory.iterdir():
        if path.name.startswith((SAVING, DELETING)):
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith(ASIDE):
            restored = directory / path.name.removeprefix(ASIDE)
            if restored.exists():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.rename(restored)
    if base is not None:
        if base.resolve().parent != directory.resolve() or base.name == target.name:
            raise CheckpointError(
                f"checkpoint {target}: its base {base} must be another checkpoint in the same folder; save it in full"
            )
        read_manifest(base)
    _check_replaceable(target)
    scratch = directory / f"{SAVING}{target.name}-{secrets.token_hex(4)}"
    scratch.mkdir()
    return scratch.name


def finish(scratch: Path, target: Path, manifest: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> str:
    """Write the manifest and give the folder its name.

    Returns:
        The name.

    Raises:
        CheckpointError: a file of another rank is not to be seen, or ``manifest`` is not JSON.
        OSError: the folder cannot be written.
    """
    for name, entry in tensors.items():
        for stored in [file for piece in entry.pieces for file in (piece.stored, piece.numbers) if file]:
            file = scratch / stored.file
            if not file.is_file() or file.stat().st_size != stored.bytes:
                raise CheckpointError(
                    f"{name}: rank 0 does not see {file}; run.directory must be on storage that all ranks share"
                )
    write_manifest(scratch, manifest)
    sync_folder(scratch)
    aside = target.with_name(ASIDE + target.name)
    if target.exists():
        target.rename(aside)  # open_checkpoint finds it there until the next line is done
    scratch.rename(target)
    sync_folder(target.parent)
    shutil.rmtree(aside, ignore_errors=True)
    return target.name


def folder_of(path: Path) -> Path:
    """Where a checkpoint lies: under its name, or moved aside by a save that a crash ended."""
    aside = path.with_name(ASIDE + path.name) if path.name else path
    return aside if not path.exists() and aside.exists() else path


def complete_ones(directory: Path) -> list[Path]:
    """Every complete checkpoint, also one that a crash left moved aside."""
    if not directory.is_dir():
        return []
    found = {path.name: path for path in directory.iterdir() if (path / MANIFEST).is_file()}
    names = {name.removeprefix(ASIDE) for name in found if not name.startswith((SAVING, DELETING))}
    return [directory / name for name in names if not name.startswith(".")]


def base_reference(base: Path) -> dict[str, Any]:
    """What an increment notes of its base.

    Raises:
        CheckpointError: the base is missing or damaged.
    """
    return {"name": base.name, "checksum": checksum_of(read_manifest(folder_of(base)))}


def prune(directory: Path, keep: int, protect: Collection[Path | str]) -> list[Path]:
    """See ``prune_checkpoints``."""
    protected = {Path(item).name for item in protect}
    complete = complete_ones(directory)
    bases = {path.name: _base_name(path) for path in complete}
    steps = sorted(path for path in complete if path.name.startswith(STEP_PREFIX) and path.exists())
    unwanted = {path.name for path in steps[: -max(keep, 1)]} - protected
    for name in [name for name in bases if name not in unwanted]:
        unwanted.difference_update(_chain(name, bases))
    # Increments before their bases, so that a crash in between leaves none that cannot be read.
    doomed = sorted((path for path in steps if path.name in unwanted), key=lambda path: -len(_chain(path.name, bases)))
    for path in doomed:
        delete(path)
    return doomed


def delete(path: Path) -> None:
    """Remove a checkpoint; a crash in the middle leaves nothing that looks like one."""
    doomed = path.with_name(f"{DELETING}{path.name}-{secrets.token_hex(4)}")
    path.rename(doomed)
    sync_folder(path.parent)  # an increment's must not outlast its base's
    shutil.rmtree(doomed, ignore_errors=True)


def _check_replaceable(target: Path) -> None:
    if not target.exists():
        return
    for other in complete_ones(target.parent):
        if other != target and _base_name(other) == target.name:
            raise CheckpointError(
                f"checkpoint {target}: is the base of {other.name} and cannot be replaced; use another name"
            )


def _base_name(path: Path) -> str | None:
    try:
        base = read_manifest(folder_of(path)).get("base")
    except CheckpointError:  # what cannot be opened needs nothing
        return None
    return base["name"] if base else None


def _chain(name: str, bases: Mapping[str, str | None]) -> list[str]:
    """A checkpoint's bases, nearest first."""
    found: list[str] = []
    base = bases.get(name)
    while base is not None and base not in found:
        found.append(base)
        base = bases.get(base)
    return found
