"""One table in and out of a checkpoint: .npy (row r is key r) or Parquet (columns ``key`` and ``vector``)."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from dlrm.errors import CheckpointError
from embedding.comm import SingleComm
from pipeline.checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from pipeline.tensor_file import rows_per_piece
from pipeline.weights import assemble, check_finite, check_importable, weight_names

Array = npt.NDArray[Any]


def export_table(checkpoint: str | Path, out: str | Path, table: str) -> Path:
    """Write one table of a checkpoint as a file of its own.

    The file appears under its name only once it is complete. Memory for a few blocks is enough; on disk the table
    lies twice for a moment where Parquet is written.

    Args:
        checkpoint: a checkpoint's folder.
        out: ``.npy`` gets [rows, dim]; ``.parquet`` the columns ``key`` (Int64, row number) and ``vector``
            (Array[dim] of the table's type), in key order.
        table: the table's name.

    Returns:
        The file.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, has no such table, or the file cannot be written.
    """
    opened, target = open_checkpoint(Path(checkpoint)), Path(out)
    suffix, name = _suffix_of(target), _tensor_of(opened, table)
    scratch = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    rows = scratch / "rows.npy"
    try:
        scratch.mkdir()
        assemble(opened, name, rows)
        finished = rows if suffix == ".npy" else _to_parquet(rows, scratch)
        with finished.open("rb") as file:
            os.fsync(file.fileno())
        finished.replace(target)
    except OSError as error:
        raise CheckpointError(f"weights {target}: {error.strerror or error}; name a file that can be written") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _to_parquet(rows: Path, scratch: Path) -> Path:
    array = np.load(rows, mmap_mode="r")
    most = rows_per_piece(array[:1].nbytes)
    parts = []
    for start in range(0, max(1, len(array)), most):
        block = np.array(array[start : start + most])
        keys = pl.Series("key", np.arange(start, start + len(block), dtype=np.int64))
        vectors = pl.Series("vector", block.reshape(-1), dtype=_number_type(array.dtype)).reshape(block.shape)
        parts.append(scratch / f"part-{start:012d}.parquet")
        pl.DataFrame([keys, vectors.alias("vector")]).write_parquet(parts[-1])
    joined = scratch / "joined.parquet"
    pl.scan_parquet(parts).sink_parquet(joined, row_group_size=most)
    return joined


def import_table(path: str | Path, out: str | Path, table: str, *, into: str | Path) -> Path:
    """Make a checkpoint of another one's weights in which a table's rows are replaced by those of a file.

    It holds weights alone (step 0, no optimiser state, ``meta`` as of ``import_weights``): the state that belonged
    to the rows would not fit the new ones.

    Args:
        path: ``.npy`` [rows, dim] replaces the whole table; ``.parquet`` with ``key`` and ``vector`` the rows of its
            keys, in any order.
        out: folder of the new checkpoint; replaced if it is a checkpoint.
        table: the table's name.
        into: folder of the checkpoint that has all other weights; stays as it is.

    Returns:
        The new checkpoint's folder.

    Raises:
        CheckpointError: the file does not fit the table, a value is not finite, a key is out of range or there
            twice, or something is damaged.
    """
    source, target = Path(path), Path(out)
    _suffix_of(source)
    check_importable(target)
    if target.resolve() == Path(into).resolve():
        raise CheckpointError(f"checkpoint {target}: would replace the one that is read; name another folder")
    opened = open_checkpoint(Path(into))
    return save_checkpoint(
        target.parent,
        step=0,
        tensors=_Replaced(opened, _tensor_of(opened, table), source),
        meta={"weights_only": True, "source": source.name},
        comm=SingleComm(),
        name=target.name,
    )


class _Replaced(Mapping[str, Array]):
    """A checkpoint's weights, one table of them out of a file; read when they are looked up."""

    def __init__(self, checkpoint: Checkpoint, name: str, source: Path) -> None:
        self._checkpoint, self._name, self._source = checkpoint, name, source
        self._names = weight_names(checkpoint)

    def __getitem__(self, name: str) -> Array:
        if name != self._name:
            return self._checkpoint.read(name)
        try:
            if self._source.suffix == ".npy":
                return self._from_npy()
            return self._from_parquet()
        except (OSError, EOFError, ValueError, pl.exceptions.PolarsError) as error:
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
            raise CheckpointError(f"weights {self._source}: {reason}; name a file with rows of {name}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _from_npy(self) -> Array:
        entry = self._checkpoint.entry(self._name)
        found = np.load(self._source, mmap_mode="r", allow_pickle=False)
        if not isinstance(found, np.ndarray) or found.shape != entry.shape or found.dtype.kind != "f":
            shape = f"{found.dtype} {list(found.shape)}" if isinstance(found, np.ndarray) else "no array"
            raise CheckpointError(
                f"weights {self._source}: {shape} does not fit {self._name} {list(entry.shape)}; save floats of that "
                "shape"
            )
        rows = found.astype(np.dtype(entry.dtype))
        check_finite(self._source, self._name, rows)
        return rows

    def _from_parquet(self) -> Array:
        entry = self._checkpoint.entry(self._name)
        rows = self._checkpoint.read(self._name)
        frame = pl.scan_parquet(self._source, glob=False)
        self._check_columns(frame.collect_schema())
        count = int(frame.select(pl.len()).collect().item())
        most = rows_per_piece(rows[:1].nbytes)
        seen = np.zeros(len(rows), bool)
        vector = pl.Array(_number_type(rows.dtype), entry.shape[1])
        for start in range(0, count, most):
            block = frame.slice(start, most).select(pl.col("key").cast(pl.Int64), pl.col("vector").cast(vector))
            part = block.collect()
            if part["key"].null_count() or part["vector"].null_count() or part["vector"].explode().null_count():
                raise CheckpointError(f"weights {self._source}: a key or a vector is missing; leave such rows out")
            keys = part["key"].to_numpy()
            self._check_keys(keys, seen)
            rows[keys] = part["vector"].to_numpy()
        check_finite(self._source, self._name, rows)
        return rows

    def _check_columns(self, schema: pl.Schema) -> None:
        key, vector = schema.get("key"), schema.get("vector")
        inner = getattr(vector, "inner", None)
        if key is None or not key.is_integer() or inner is None or not inner.is_float():
            found = ", ".join(f"{name} ({kind})" for name, kind in schema.items())
            raise CheckpointError(
                f"weights {self._source}: has columns {found}, expected key (whole numbers) and "
                "vector (lists of floats)"
            )

    def _check_keys(self, keys: Array, seen: Array) -> None:
        outside = keys[(keys < 0) | (keys >= len(seen))]
        if outside.size:
            raise CheckpointError(
                f"weights {self._source}: key {outside[0]} is not among the {len(seen)} rows of {self._name}"
            )
        order = np.sort(keys)
        twice = np.concatenate([order[1:][order[1:] == order[:-1]], keys[seen[keys]]])
        if twice.size:
            raise CheckpointError(f"weights {self._source}: key {twice[0]} is there twice; leave one of them")
        seen[keys] = True


def _suffix_of(path: Path) -> str:
    if path.suffix not in {".npy", ".parquet"}:
        raise CheckpointError(f"weights {path}: one table is a .npy or a .parquet file; name one of these")
    return path.suffix


def _tensor_of(checkpoint: Checkpoint, table: str) -> str:
    tables = [name for name in weight_names(checkpoint) if name.startswith("table.")]
    if f"table.{table}" not in tables:
        some = ", ".join(name.removeprefix("table.") for name in tables[:6]) + (", ..." if len(tables) > 6 else "")
        raise CheckpointError(f"checkpoint {checkpoint.path}: has no table {table!r}, only {some}")
    return f"table.{table}"


def _number_type(dtype: np.dtype[Any]) -> pl.DataType:
    return pl.Float64() if dtype == np.float64 else pl.Float32()
