"""Weights in and out: .npz files that other frameworks read and write.

Names are ``bottom.<i>.weight`` [out, in], ``bottom.<i>.bias`` [out], ``top.<i>.*`` and ``table.<name>``
[rows, dim]; i counts layers from 0. Tensors pass through one at a time, and an export copies bytes.
"""

from __future__ import annotations

import math
import os
import re
import secrets
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt

from dlrm.errors import CheckpointError
from embedding.comm import SingleComm
from pipeline.checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from pipeline.tensor_file import PIECE_BYTES, copy_verified, npy_header

Array = npt.NDArray[Any]

_LAYER = re.compile(r"(bottom|top)\.(\d+)\.(weight|bias)")
_TABLE = re.compile(r"table\.(.+)", re.DOTALL)
# State of the sparse optimisers, beside its table as table.<name>.<state>.
_STATES = frozenset({"accumulator", "velocity", "m", "v", "n", "z"})


class Weights(Mapping[str, Array]):
    """The arrays of an .npz file, each read when it is looked up; a context manager that closes the file."""

    def __init__(self, path: Path) -> None:
        """Open the file and read the names and shapes.

        Raises:
            CheckpointError: it is missing, no .npz file, or holds something other than arrays of numbers.
        """
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype[Any]] = {}
        try:
            self._zip = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as error:
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(f"weights {path}: {reason}; name an .npz file") from None
        try:
            for member in self._zip.namelist():
                name = member.removesuffix(".npy")
                with self._member(name) as file:
                    self.shapes[name], _, self.dtypes[name] = self._header(file, name)
        except BaseException:
            self._zip.close()
            raise

    def __getitem__(self, name: str) -> Array:
        if name not in self.shapes:
            raise KeyError(name)
        with self._member(name) as file:
            try:
                array: Array = np.lib.format.read_array(file, allow_pickle=False)
            except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
                raise CheckpointError(f"weights {self.path}: {name} is damaged ({error}); use another file") from None
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __contains__(self, name: object) -> bool:  # Mapping's would read the array
        return name in self.shapes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._zip.close()

    def _member(self, name: str) -> IO[bytes]:
        try:
            return self._zip.open(f"{name}.npy")
        except (KeyError, OSError, zipfile.BadZipFile, NotImplementedError) as error:
            raise CheckpointError(
                f"weights {self.path}: {name} cannot be read ({error}); save it with np.savez"
            ) from None

    def _header(self, file: IO[bytes], name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
        try:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            header = read(file)
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"weights {self.path}: {name} is no array ({error}); save it with np.savez") from None
        if header[2].kind not in "fiu":
            raise CheckpointError(f"weights {self.path}: {name} holds {header[2]}, not numbers; save arrays of floats")
        return header


def load_weights(path: str | Path) -> Weights:
    """Open an .npz file of weights; arrays are read one by one as they are looked up.

    Use it as a context manager, or ``close()`` it.

    Raises:
        CheckpointError: it is missing, no .npz file, or holds something other than arrays of numbers.
    """
    return Weights(Path(path))


def check_weights(weights: Weights, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compare names and shapes with those of a model.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or is one that the model does not have.
    """
    for name, shape in expected.items():
        found = weights.shapes.get(name)
        if found != tuple(shape):
            state = "is missing" if found is None else f"has shape {list(found)}"
            raise CheckpointError(
                f"weights {weights.path}: {name} {state}, expected {list(shape)}; use weights of this model"
            )
    for name in weights:
        if name not in expected:
            raise CheckpointError(
                f"weights {weights.path}: {name} {list(weights.shapes[name])} is unknown to the model; remove it"
            )


def weight_names(checkpoint: Checkpoint) -> list[str]:
    """Names of the weights in a checkpoint, without the optimisers' state."""
    model = checkpoint.meta.get("model")
    tables = model.get("tables") if isinstance(model, Mapping) else None

    def is_weight(name: str) -> bool:
        if _LAYER.fullmatch(name):
            return True
        if not (table := _TABLE.fullmatch(name)):
            return False
        if tables is not None:
            return table[1] in tables
        owner, _, state = name.rpartition(".")
        return not (state in _STATES and owner in checkpoint)

    return [name for name in checkpoint.names if is_weight(name)]


def export_weights(checkpoint: str | Path, out: str | Path) -> Path:
    """Write the weights of a checkpoint, without the optimisers' state, as one .npz file.

    The file appears under its name only once it is complete.

    Args:
        checkpoint: a checkpoint's folder.
        out: file to write, replaced if it exists.

    Returns:
        The file.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or the file cannot be written.
    """
    opened, target = open_checkpoint(Path(checkpoint)), Path(out)
    scratch = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        with scratch.open("xb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                for name in weight_names(opened):
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                        _copy_tensor(opened, name, member, scratch.with_name(f"{scratch.name}.tensor"))
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(target)
    except OSError as error:
        raise CheckpointError(f"weights {target}: {error.strerror or error}; name a file that can be written") from None
    finally:
        scratch.unlink(missing_ok=True)
    return target


def _copy_tensor(checkpoint: Checkpoint, name: str, member: IO[bytes], scratch: Path) -> None:
    """Tensors lie in checkpoints as .npy files, which is what an .npz file is made of; pieces are joined first."""
    whole = checkpoint.entry(name).whole
    if whole is not None:
        copy_verified(checkpoint.path / whole.stored.file, member, name=name, stored=whole.stored)
        return
    try:
        assemble(checkpoint, name, scratch)
        with scratch.open("rb") as file:
            shutil.copyfileobj(file, member, PIECE_BYTES)
    finally:
        scratch.unlink(missing_ok=True)


def assemble(checkpoint: Checkpoint, name: str, file: Path) -> None:
    """Write a whole tensor as .npy, whatever pieces and increments it lies in; memory for a few blocks is enough.

    Raises:
        CheckpointError: there is no such tensor, or a file is damaged.
        OSError: the file exists or cannot be written.
    """
    entry = checkpoint.entry(name)
    with file.open("xb") as target:
        target.write(npy_header(entry.shape, entry.dtype))
        start = target.tell()
        size = start + math.prod(entry.shape) * np.dtype(entry.dtype).itemsize
        if hasattr(os, "posix_fallocate"):  # so that a full disk shows here; through the map it would be a signal
            os.posix_fallocate(target.fileno(), 0, size)
        else:
            target.truncate(size)
    if math.prod(entry.shape):
        out = np.memmap(file, np.dtype(entry.dtype), "r+", start, entry.shape)
        checkpoint.read(name, out)
        out.flush()


def import_weights(path: str | Path, out: str | Path) -> Path:
    """Make a checkpoint of weights alone: step 0, no optimiser state.

    Its ``meta`` is ``{"weights_only": True, "source": <file name>}``; it can be evaluated and started from,
    but not resumed.

    Args:
        path: .npz file.
        out: the checkpoint's folder, replaced if it is a checkpoint.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: names or shapes do not make a model, a value is not finite, or the file is damaged.
    """
    target = Path(out)
    check_importable(target)
    with load_weights(path) as weights:
        _check_model(weights)
        return save_checkpoint(
            target.parent,
            step=0,
            tensors=_Finite(weights),
            meta={"weights_only": True, "source": Path(path).name},
            comm=SingleComm(),
            name=target.name,
        )


def check_importable(target: Path) -> None:
    """An import replaces nothing but checkpoints.

    Raises:
        CheckpointError: something else is there.
    """
    if target.exists() and not (target / "manifest.json").exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"checkpoint {target}: exists and is no checkpoint; name a new folder")


class _Finite(Mapping[str, Array]):
    """Weights that refuse NaN and infinity when they are looked up."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def __getitem__(self, name: str) -> Array:
        array = self._weights[name]
        check_finite(self._weights.path, name, array)
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def check_finite(path: Path, name: str, array: Array) -> None:
    """Refuse NaN and infinity; goes through the array in blocks.

    Raises:
        CheckpointError: a value is not finite.
    """
    rows = max(1, PIECE_BYTES // max(1, array[:1].nbytes))
    for start in range(0, len(array), rows):
        if not np.isfinite(array[start : start + rows]).all():
            raise CheckpointError(f"weights {path}: {name} holds NaN or infinity; export it anew")


def _check_model(weights: Weights) -> None:
    """Names are known ones, layers are complete and join, tables have two axes and one dim."""
    where = f"weights {weights.path}"
    for name, dtype in weights.dtypes.items():
        if not _LAYER.fullmatch(name) and not _TABLE.fullmatch(name):
            raise CheckpointError(
                f"{where}: {name!r} is no weight; use <bottom or top>.<i>.<weight or bias> or table.<name>"
            )
        if dtype not in (np.float32, np.float64):
            raise CheckpointError(f"{where}: {name} is {dtype}; save it as float32 or float64")
    for tower in ("bottom", "top"):
        _check_layers(weights, tower)
    tables = {name: shape for name, shape in weights.shapes.items() if _TABLE.fullmatch(name)}
    dims = {shape[1] for shape in tables.values() if len(shape) == 2}
    for name, shape in tables.items():
        if len(shape) != 2 or shape[1] != min(dims):
            wanted = f"[rows, {min(dims)}]" if dims else "[rows, dim]"
            raise CheckpointError(
                f"{where}: {name} has shape {list(shape)}, expected {wanted}, as the other tables have"
            )


def _check_layers(weights: Weights, tower: str) -> None:
    where = f"weights {weights.path}"
    layers = {int(match[2]) for name in weights if (match := _LAYER.fullmatch(name)) and match[1] == tower}
    width: int | None = None
    for layer in range(max(layers, default=-1) + 1):
        weight, bias = f"{tower}.{layer}.weight", f"{tower}.{layer}.bias"
        for name in (weight, bias):
            if name not in weights:
                raise CheckpointError(f"{where}: {name} is missing; every layer has a weight and a bias")
        shape = weights.shapes[weight]
        if len(shape) != 2 or (width is not None and shape[1] != width):
            wanted = f"[out, {width}]" if width is not None else "[out, in]"
            raise CheckpointError(f"{where}: {weight} has shape {list(shape)}, expected {wanted}")
        width = shape[0]
        if weights.shapes[bias] != (width,):
            raise CheckpointError(f"{where}: {bias} has shape {list(weights.shapes[bias])}, expected {[width]}")
