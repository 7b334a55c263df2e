"""Rows from any format into any other that can hold them: streamed, counted, summed, and read back.

Shapes: B rows, N dense columns.
"""

from __future__ import annotations

import os
import queue
import shutil
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from dlrm.errors import ConfigError, DataError
from pipeline.formats import block_numba
from pipeline.formats.block import Block, RowSum, Schema, check_block
from pipeline.formats.criteo_tsv import CRITEO_TSV
from pipeline.formats.facebook_npz import FACEBOOK_NPZ
from pipeline.formats.interchange import LOSSES, Fit, Format, Loss, ReadOptions, Source, WriteOptions
from pipeline.formats.norm import NORM
from pipeline.formats.parquet import PARQUET
from pipeline.formats.prepared import JAGGED, RAW
from pipeline.formats.split_binary import SPLIT_BINARY
from pipeline.formats.torchrec_npy import TORCHREC_NPY

FORMATS: tuple[Format, ...] = (
    RAW,
    JAGGED,
    SPLIT_BINARY,
    PARQUET,
    NORM,
    TORCHREC_NPY,
    FACEBOOK_NPZ,
    CRITEO_TSV,
)
"""In the order in which they are asked whether a file is theirs."""

_BLOCKS_AHEAD = 2

ProgressCallback = Callable[[str, int, int], None]
"""Called with the phase (``convert`` or ``verify``), its rows done and its rows in all."""


@dataclass(frozen=True, slots=True)
class ConvertedSplit:
    """One split on both sides.

    Attributes:
        rows: samples read and written.
        source_sum: over the rows as they were read.
        target_sum: over the rows as they were read back (or as they were written, where not verified).
    """

    rows: int
    source_sum: str
    target_sum: str


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a conversion did.

    Attributes:
        source_format: name of the format that was read.
        target_format: name of the format that was written.
        splits: both sides of each.
        losses: what was lost, all of it allowed.
        verified: whether the result was read back.
        source_bytes: size of the source's files.
        target_bytes: size of what was written.
    """

    source_format: str
    target_format: str
    splits: dict[str, ConvertedSplit]
    losses: tuple[Loss, ...]
    verified: bool
    source_bytes: int
    target_bytes: int


def convert(
    source: Path,
    target: Path,
    *,
    to: str,
    from_format: str | None = None,
    allow: frozenset[Loss] = frozenset(),
    read: ReadOptions | None = None,
    write: WriteOptions | None = None,
    overwrite: bool = False,
    verify: bool = True,
    progress: ProgressCallback | None = None,
) -> Conversion:
    """Convert a data set.

    Args:
        source: file or folder.
        target: folder that is made; it appears when everything in it is written and, unless told otherwise, read back.
        to: format to write.
        from_format: format of the source; ``None``: found out.
        allow: what may be lost.
        read: what the source's files do not say.
        write: how the target is written.
        overwrite: replace a target that is there.
        verify: read the target back and compare.
        progress: called after each block.

    Raises:
        ConfigError: a format or loss has no such name.
        DataError: the source is wrong, the target cannot hold it, or something would be lost that is not allowed.
    """
    check_losses(allow)
    read, write = replace(read or ReadOptions(), allow=allow), write or WriteOptions()
    reader = format_named(from_format) if from_format else detect(source)
    writer = format_named(to)
    opened = reader.read(source, read)
    fit = writer.fit(opened.schema, write)
    require_allowed(fit, allow)
    _refuse_overlap(source, target)
    with _staging(target, overwrite) as folder:
        sums = _write(opened, writer, folder, fit, write, allow, progress)
        back = _read_back(writer, folder, progress) if verify else {}
        for split, rows in back.items():
            if (rows.rows, rows.text) != (sums[split][1].rows, sums[split][1].text):
                raise DataError(
                    f"{target}: split {split!r} was written with {sums[split][1].rows} rows of sum "
                    f"{sums[split][1].text}, but reads back as {rows.rows} rows of {rows.text}; nothing was kept"
                )
        size = bytes_under(folder)
    splits = {
        split: ConvertedSplit(as_read.rows, as_read.text, (back.get(split) or as_written).text)
        for split, (as_read, as_written) in sums.items()
    }
    losses = set(fit.losses)
    if fit.schema.dense == "natural" and any(split.source_sum != split.target_sum for split in splits.values()):
        losses.add("negative-counts")
    return Conversion(reader.name, writer.name, splits, tuple(sorted(losses)), verify, bytes_under(source), size)


def format_named(name: str) -> Format:
    """A format by its name.

    Raises:
        ConfigError: there is none.
    """
    for known in FORMATS:
        if known.name == name:
            return known
    raise ConfigError(f"format {name!r}: unknown; known are {', '.join(known.name for known in FORMATS)}")


def detect(path: Path) -> Format:
    """The format of a file or folder.

    Raises:
        DataError: it is of none, or says nothing about itself.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; name an existing one")
    for known in FORMATS:
        if known.detect(path):
            return known
    raise DataError(
        f"{path}: of no format that tells itself; name it with --from, or, if it is HugeCTR's Raw or "
        "facebookresearch/dlrm's .bin, write a manifest over it with `crosslane data adopt` first"
    )


def check_losses(names: Sequence[str] | frozenset[str]) -> None:
    """Refuse names of losses that there are not.

    Raises:
        ConfigError: one is unknown.
    """
    unknown = sorted(set(names) - set(get_args(Loss)))
    if unknown:
        raise ConfigError(f"--allow: {', '.join(unknown)} unknown; known are {', '.join(LOSSES)}")


def require_allowed(fit: Fit, allow: frozenset[Loss]) -> None:
    """Refuse losses that nobody allowed.

    Raises:
        DataError: there is one.
    """
    missing = sorted(fit.losses - allow)
    if missing:
        why = "; ".join(LOSSES[loss] for loss in missing)
        raise DataError(
            f"conversion: {why}; allow it with {' '.join(f'--allow {loss}' for loss in missing)}, or choose another "
            "format"
        )


def adapt(block: Block, schema: Schema, allow: frozenset[Loss], place: tuple[str, int]) -> Block:
    """A block as a schema of ``fit`` holds it.

    Args:
        block: rows as they were read.
        schema: of the target.
        allow: losses that are allowed.
        place: words before a row's number, and the number of the first row, for messages.

    Raises:
        DataError: a dense value is too large for 16 bits, a count is negative where that is not allowed, or a key is
            missing.
    """

    def where(row: int, *_: Any) -> str:
        return f"{place[0]}{place[1] + row}"

    dense: Any = block.dense
    if dense.dtype == np.int32 and not schema.counts:
        dense = np.empty(block.dense.shape, np.float32)
        block_numba.log1p_counts(block.dense, dense)
    if schema.dense == "natural" and (dense < 0).any():
        if "negative-counts" not in allow:
            row, column = np.argwhere(dense < 0)[0]
            raise DataError(
                f"{where(row)}: dense column {schema.dense_names[column]!r} is {dense[row, column]}, but the target "
                "holds no negative or missing counts; --allow negative-counts makes them 0, as training reads them"
            )
        dense = np.maximum(dense, 0)
    if schema.dense == "float16":
        with np.errstate(over="ignore"):
            dense = dense.astype(np.float16).astype(np.float32)
        if not np.isfinite(dense).all():
            row, column = np.argwhere(~np.isfinite(dense))[0]
            raise DataError(
                f"{where(row)}: dense column {schema.dense_names[column]!r} is {block.dense[row, column]}, "
                "but 16 bits end at 65504; clip it, or choose another format"
            )
    weights = block.weights if schema.weighted else block.weights[:, :0].copy()
    adapted = replace(block, dense=dense, weights=weights)
    # What the source checked need not be checked again; a key may be missing there and not here.
    return adapted if schema.missing_keys else check_block(adapted, schema, where)


def _write(
    opened: Source,
    writer: Format,
    folder: Path,
    fit: Fit,
    options: WriteOptions,
    allow: frozenset[Loss],
    progress: ProgressCallback | None,
) -> dict[str, tuple[RowSum, RowSum]]:
    """Write every split; sums of the rows as read and as written."""
    total, done = sum(opened.splits.values()), 0
    sums = {}
    with closing(writer.write(folder, fit.schema, options)) as sink:
        for split in opened.splits:
            as_read, as_written = sums[split] = RowSum(opened.schema), RowSum(fit.schema)
            with closing(_ahead(opened.blocks(split))) as blocks:
                for block in blocks:
                    place = f"split {split!r}: row ", as_read.rows
                    adapted = adapt(block, fit.schema, allow, place)
                    as_read.add(block)
                    as_written.add(adapted)
                    sink.write(split, adapted)
                    done += block.rows
                    if progress is not None:
                        progress("convert", done, max(done, total))
            if not as_read.rows:
                raise DataError(f"split {split!r}: no rows; a split needs at least one")
        sink.finish()
    return sums


def _read_back(writer: Format, folder: Path, progress: ProgressCallback | None) -> dict[str, RowSum]:
    written = writer.read(folder, ReadOptions())
    total, done = sum(written.splits.values()), 0
    sums = {}
    for split in written.splits:
        sums[split] = RowSum(written.schema)
        for block in written.blocks(split):
            sums[split].add(block)
            done += block.rows
            if progress is not None:
                progress("verify", done, max(done, total))
    return sums


def _ahead(blocks: Iterator[Block]) -> Generator[Block]:
    """The same blocks, read by a thread of its own while earlier ones are written."""
    ready: queue.Queue[Block | BaseException | None] = queue.Queue(_BLOCKS_AHEAD)
    ended = threading.Event()

    def put(item: Block | BaseException | None) -> None:
        while not ended.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return

    def work() -> None:
        try:
            for block in blocks:
                put(block)
                if ended.is_set():
                    return
            put(None)
        except BaseException as error:  # noqa: BLE001 - handed to the consumer, who raises it
            put(error)

    thread = threading.Thread(target=work, name="convert", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        ended.set()
        thread.join()


def _refuse_overlap(source: Path, target: Path) -> None:
    """Refuse a target that holds the source or lies in it: replacing one would take the other with it."""
    read, written = source.resolve(), target.resolve()
    if read == written or written in read.parents or read in written.parents:
        raise DataError(f"{target}: holds the source {source}, or lies in it; choose a folder beside it")


@contextmanager
def _staging(target: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside ``target`` that takes its place when the body ends well, and is gone when it does not."""
    if target.exists() and not overwrite and not (target.is_dir() and not any(target.iterdir())):
        raise DataError(f"{target}: is there already; choose another folder, or replace it with --overwrite")
    folder = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror or error}; choose a folder that can be written") from None
    try:
        yield folder
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)
        folder.replace(target)
    except OSError as error:
        raise DataError(f"{error.filename or target}: {error.strerror or error}; nothing was kept") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def bytes_under(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
