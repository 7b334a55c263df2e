"""Synthetic sets at scale: their shapes by name, rows made as they are read, and the same rows written as Raw.

Shapes: B rows, V 32-bit words of a Raw row, T tables.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
from numpy.typing import NDArray

from dlrm.errors import ConfigError
from pipeline.formats.output import CACHED_BYTES, WRITES_BEHIND
from pipeline.formats.raw import RowFiles
from pipeline.formats.record_files import PAGE, Bytes, RecordLayout, Records, page_aligned, rows_of_runs
from pipeline.generator import Generator
from pipeline.manifest import DenseInfo, Manifest, Recipe, SplitInfo, TableInfo, row_words, write_manifest
from pipeline.replacement import left_behind, remove_left_behind
from pipeline.writer import DatasetWriter

Rows = NDArray[np.int64]

SCHEME = "synthetic:"
NUM_DENSE = 13
DEFAULT_EXPONENT = 1.1

SHAPES: dict[str, tuple[int, ...]] = {
    # MLPerf v1.1 - v2.1: raw values modulo 40,000,000, then counted; 187,767,399 rows in all.
    "criteo-terabyte": (
        39884406, 39043, 17289, 7420, 20263, 3, 7120, 1543, 63, 38532951, 2953546, 403346, 10, 2208, 11938, 155, 4, 976,
        14, 39979771, 25641295, 39664984, 585935, 12972, 108, 36,
    ),
    # The same without the cap: 882,774,559 rows.
    "criteo-terabyte-full": (
        227605432, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 130229467, 3067956, 405282, 10, 2209, 11938, 155, 4,
        976, 14, 292775614, 40790948, 187188510, 590152, 12973, 108, 36,
    ),
    # MLPerf v3.0 and later (DCNv2): 204,184,588 rows.
    "criteo-multihot": (
        40000000, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 40000000, 3067956, 405282, 10, 2209, 11938, 155, 4, 976,
        14, 40000000, 40000000, 40000000, 590152, 12973, 108, 36,
    ),
}  # fmt: skip
"""Rows of each table."""

HOTNESS: dict[str, tuple[int, ...]] = {
    "criteo-multihot": (3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1),
}
"""Keys of each table's bags, where a shape has more than one; here 214."""

CHUNK_ROWS = 32_768
"""Rows made and handed to the disk at once: 5 MiB of Criteo's shape, fewer waits than in smaller pieces."""
_AHEAD = 6
"""Chunks made beyond one a thread: a disk's rate changes from one moment to the next."""


def describe_synthetic(
    like: str,
    *,
    rows: int,
    seed: int = 1,
    exponents: Sequence[float] = (DEFAULT_EXPONENT,),
    scale: int = 1,
    cap: int | None = None,
) -> Manifest:
    """The manifest of a set without files.

    Args:
        like: a name of ``SHAPES``.
        rows: samples in all; 90 % are ``train``, 5 % each ``validation`` and ``test``, in the order of row numbers.
        seed: 0 .. 2^63 - 1.
        exponents: of the tables' power laws; one stands for all.
        scale: tables have so many times fewer rows, at least 2 where they have as many.
        cap: most rows of a table, after scaling; ``None``: no limit.

    Raises:
        ConfigError: an argument is out of range.
    """
    if like not in SHAPES:
        raise ConfigError(f"synth: no shape {like!r}; known are {', '.join(SHAPES)}")
    sizes = SHAPES[like]
    laws = tuple(exponents) * (len(sizes) if len(exponents) == 1 else 1)
    if len(laws) != len(sizes) or not all(0 <= exponent <= 10 for exponent in laws):
        raise ConfigError(f"synth: exponents {list(exponents)}; give one, or {len(sizes)}, each in 0 .. 10")
    if not 1 <= rows < 2**62 or not 0 <= seed < 2**63 or scale < 1 or (cap is not None and cap < 1):
        raise ConfigError(
            f"synth: rows {rows}, seed {seed}, scale {scale}, cap {'none' if cap is None else cap}; "
            "need 1 .. 2^62 - 1, 0 .. 2^63 - 1, 1 and up, 1 and up"
        )
    hotness = HOTNESS.get(like, (1,) * len(sizes))
    small = rows // 20
    counts = {"train": rows - 2 * small, "validation": small, "test": small}
    return Manifest(
        name=f"synthetic {like}",
        layout="synthetic",
        dense=DenseInfo(names=tuple(f"I{n + 1}" for n in range(NUM_DENSE))),
        tables=tuple(
            TableInfo(
                name=f"C{t + 1}",
                rows=min(max(size // scale, min(size, 2)), cap or size),
                hotness=keys,
                frequency_ordered=True,
            )
            for t, (size, keys) in enumerate(zip(sizes, hotness, strict=True))
        ),
        splits={name: SplitInfo(rows=count, files=()) for name, count in counts.items()},
        licence="none: made by a random generator",
        source=f"crosslane synth --like {like} --rows {rows} --seed {seed}",
        notes=(f"keys: power law, exponents {', '.join(f'{exponent:g}' for exponent in dict.fromkeys(laws))}",),
        recipe=Recipe(seed=seed, exponents=laws),
    )


def parse_synthetic(path: str) -> Manifest:
    """The set that ``synthetic:SHAPE?rows=N&seed=S&exponent=A&scale=K&cap=C`` names; all but the rows may be left out.

    Raises:
        ConfigError: a part is unknown, missing or no number.
    """
    like, _, query = path.removeprefix(SCHEME).partition("?")
    given = dict(parse_qsl(query, keep_blank_values=True))
    if unknown := set(given) - {"rows", "seed", "exponent", "scale", "cap"}:
        raise ConfigError(
            f"data.path: {path!r}: unknown {', '.join(sorted(unknown))}; known: rows, seed, exponent, scale, cap"
        )
    try:
        return describe_synthetic(
            like,
            rows=int(given["rows"]),
            seed=int(given.get("seed", 1)),
            exponents=(float(given.get("exponent", DEFAULT_EXPONENT)),),
            scale=int(given.get("scale", 1)),
            cap=int(given["cap"]) if "cap" in given else None,
        )
    except (KeyError, ValueError):
        raise ConfigError(
            f"data.path: {path!r} must have the form synthetic:SHAPE?rows=N&seed=S&exponent=A&scale=K&cap=C "
            "with numbers"
        ) from None


def generator_of(manifest: Manifest) -> Generator:
    """The generator of a manifest with a recipe."""
    assert manifest.recipe is not None
    return _generator(
        tuple(table.rows for table in manifest.tables),
        tuple(table.hotness for table in manifest.tables),
        manifest.recipe.exponents,
        len(manifest.dense.names),
        manifest.recipe.seed,
    )


@lru_cache(maxsize=4)
def _generator(
    table_rows: tuple[int, ...], hotness: tuple[int, ...], exponents: tuple[float, ...], num_dense: int, seed: int
) -> Generator:
    """The splits of a set share one, since its constants take longer than a batch."""
    return Generator(table_rows, hotness, exponents, num_dense, seed)


class GeneratedRows(RowFiles):
    """Stands for the files of a split whose rows are made as they are read."""

    def __init__(self, manifest: Manifest, split: str, name: Path) -> None:
        """``name`` stands for a file's in errors."""
        self._manifest = manifest
        self.manifest = manifest
        self.name = name / split
        self.generator = generator_of(manifest)
        self._row_bytes = 4 * self.generator.row_words
        names = list(manifest.splits)
        self.first = sum(manifest.splits[other].rows for other in names[: names.index(split)])
        self._last = threading.local()

    def make(self, rows: Rows, records: NDArray[np.uint32] | None = None) -> NDArray[np.int32]:
        """Rows [B, V] of the split, in ``records`` where that is given."""
        if records is None:
            records = np.empty((rows.size, self.generator.row_words), np.uint32)
        self.generator.write(rows + self.first, records)
        return records.view(np.int32)

    def pieces(self, rows: Rows) -> Iterator[tuple[NDArray[np.int32], Rows, Rows]]:
        """See ``RowFiles.pieces``."""
        # A batch asks twice for its rows, for its head and for its keys.
        if getattr(self._last, "rows", None) is not rows:
            self._last.words = self.make(rows)
            self._last.rows = rows
        places = np.arange(rows.size)
        if rows.size:
            yield self._last.words, places, places

    def blocks(self, rows: Rows) -> Iterator[tuple[NDArray[np.int32], Rows, Rows]]:
        """See ``RowFiles.blocks``."""
        return self.pieces(rows)

    def locate(self, row: int | np.int64) -> tuple[Path, int]:
        """See ``RowFiles.locate``."""
        return self.name, int(row)

    def words_of(self, row: int | np.int64) -> NDArray[np.int32]:
        """See ``RowFiles.words_of``."""
        words: NDArray[np.int32] = self.make(np.array([row], np.int64))[0]
        return words

    def will_need(self, start: int, stop: int) -> None:
        """Nothing: no disk is asked."""

    def release(self, start: int, stop: int) -> None:
        """Nothing: no file is mapped."""


class GeneratedRecords:
    """Rows of a split that are made as they are read, as a ``RecordSource``."""

    def __init__(self, rows: GeneratedRows) -> None:
        """Take over the split's rows."""
        self.layout = RecordLayout.of(rows.manifest)
        self._rows = rows

    def read_runs(self, runs: Sequence[tuple[int, int]], buffer: Bytes) -> Records:
        """See ``RecordSource.read_runs``."""
        return self.read_rows(rows_of_runs(runs), buffer)

    def read_rows(self, rows: Rows, buffer: Bytes) -> Records:
        """See ``RecordSource.read_rows``."""
        records = buffer[: rows.size * self.layout.words * 4].view(np.uint32).reshape(-1, self.layout.words)
        self._rows.generator.write(rows + self._rows.first, records)
        return records

    def place_of(self, row: int) -> str:
        """See ``RecordSource.place_of``; the byte is the one that a Raw file would have it at."""
        return self._rows.place(row, "label")

    def close(self) -> None:
        """Nothing is open."""


class RowNumbers(GeneratedRecords):
    """The numbers of the rows instead of the rows, for a device that makes them itself (``DeviceRows``)."""

    def read_rows(self, rows: Rows, buffer: Bytes) -> Records:
        """[B, 2], the int64 number in the whole set of each row as two words."""
        numbers = buffer[: rows.size * 8].view(np.int64)
        np.add(rows, self._rows.first, out=numbers)
        return numbers.view(np.uint32).reshape(-1, 2)


def write_synthetic(out: Path, manifest: Manifest, *, overwrite: bool = False, progress: Any = None) -> Path:
    """Write the rows of a set without files as Raw shards: made on all cores, summed and written in order.

    Rows go to the disk from where they are made. A set that the page cache may keep as a whole is written through it,
    to be read from there.

    Args:
        out: folder.
        manifest: of ``describe_synthetic``.
        overwrite: replace a data set that is there.
        progress: called with a phase, rows done, rows in all.

    Raises:
        DataError: the folder holds a data set already, or cannot be written.
    """
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with (
        DatasetWriter(
            out,
            name=manifest.name,
            dense_names=manifest.dense.names,
            tables=manifest.tables,
            overwrite=overwrite,
            direct=4 * row_words(manifest) * sum(split.rows for split in manifest.splits.values()) > CACHED_BYTES,
        ) as writer,
        ThreadPoolExecutor(threads) as pool,
    ):
        for name, split in manifest.splits.items():
            made = GeneratedRows(manifest, name, out)
            done = 0
            for words in _made_ahead(made, split.rows, threads, pool):
                writer.write_rows(name, words)
                done += len(words)
                if progress is not None:
                    progress(f"writing {name}", done, split.rows)
        return writer.finish(
            licence=manifest.licence, source=manifest.source, notes=manifest.notes, recipe=manifest.recipe
        )


def _made_ahead(
    made: GeneratedRows, num_rows: int, threads: int, pool: ThreadPoolExecutor
) -> Iterator[NDArray[np.int32]]:
    """All rows of a split in order, chunk by chunk [B, V]; a chunk's memory is used again.

    That is not before ``WRITES_BEHIND`` more chunks have been taken and done with, as direct writing wants it.
    """
    row_bytes = 4 * made.generator.row_words
    room = -(-CHUNK_ROWS * row_bytes // PAGE) * PAGE
    ahead = threads + _AHEAD
    places = ahead + WRITES_BEHIND
    # In one piece, so that the system may give it large pages.
    ring = page_aligned(np.empty(places * room + PAGE, np.uint8), places * room)

    def fill(place: int, start: int) -> NDArray[np.int32]:
        rows = np.arange(start, min(start + CHUNK_ROWS, num_rows), dtype=np.int64)
        part = ring[place * room : place * room + rows.size * row_bytes]
        return made.make(rows, part.view(np.uint32).reshape(rows.size, -1))

    free = deque(range(places))
    making: deque[tuple[int, Future[NDArray[np.int32]]]] = deque()
    taken: deque[int] = deque()
    starts = iter(range(0, max(num_rows, 1), CHUNK_ROWS))
    while True:
        while len(making) < ahead and (start := next(starts, None)) is not None:
            place = free.popleft()
            making.append((place, pool.submit(fill, place, start)))
        if not making:
            return
        place, words = making.popleft()
        yield words.result()
        taken.append(place)
        if len(taken) > WRITES_BEHIND:
            free.append(taken.popleft())


def write_recipe(out: Path, manifest: Manifest, *, overwrite: bool = False) -> Path:
    """Write the manifest alone: a data set whose rows are made as they are read.

    Raises:
        DataError: the folder holds a data set already, or cannot be written.
    """
    with DatasetWriter(
        out, name=manifest.name, dense_names=manifest.dense.names, tables=manifest.tables, overwrite=overwrite
    ):
        replaced = left_behind(out, manifest)
        write_manifest(out, manifest)
        remove_left_behind(out, replaced)
    return out
