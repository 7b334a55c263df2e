"""Second pass over Criteo's rows: categories to numbers, integers to dense values, straight into Raw shards.

Each chunk becomes one shard, or two where it spans two splits. If the look-up tables do not fit into memory together,
rows are passed over once for each group of them; later groups fill their columns in. A mark after each chunk and group
names what is done.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedding.comm import Comm
from pipeline.checksums import Checksum
from pipeline.etl import criteo_text_numba as engine
from pipeline.etl.chunks import Chunk, ChunkPiece, chunk_pieces, in_order, refuse, share_of_rank
from pipeline.etl.criteo_text import NUM_COLUMNS, NUM_DENSE, Fault, ParsedRows, parse_rows
from pipeline.etl.job import Job
from pipeline.etl.lookup import Lookup
from pipeline.etl.rules import Rules
from pipeline.etl.vocabulary import Encoding, LookupPart, lookup_groups, make_lookup

_FOLDER = "shards"
_FIRST_KEY = 1 + NUM_DENSE
ROW_BYTES = 4 * NUM_COLUMNS


@dataclass(frozen=True, slots=True)
class Cut:
    """Where the rows of a chunk go: the first ``rows`` to split ``first``, the others to ``second``."""

    first: str
    rows: int = 1 << 62
    second: str = ""


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows of one chunk and split, complete in the working folder."""

    chunk: int
    split: str
    path: Path
    rows: int
    checksum: str


class RowEncoder:
    """Parsed rows to Raw rows, with the look-up tables of one group."""

    def __init__(self, rules: Rules, lookups: Mapping[int, Lookup], *, labelled: bool = True) -> None:
        """Prepare.

        Args:
            rules: of values.
            lookups: by column.
            labelled: the rows start with the label.
        """
        self._rules, self._lookups, self._labelled = rules, lookups, labelled

    def parse(self, text: Any) -> ParsedRows | Fault:
        """Lines to columns, with values as they are looked up."""
        parsed = parse_rows(text, labelled=self._labelled)
        if isinstance(parsed, Fault):
            return parsed
        if self._rules.cap_modulo is not None:
            engine.take_modulo(parsed.categories, self._rules.cap_modulo)
        if self._rules.missing_category == "zero":
            np.maximum(parsed.categories, 0, out=parsed.categories)
        return parsed

    def rows(self, text: Any) -> Any:
        """Raw rows [rows, 40] int32; columns without a look-up table are 0. Or the ``Fault``."""
        parsed = self.parse(text)
        if isinstance(parsed, Fault):
            return parsed
        words = np.zeros((len(parsed.labels), NUM_COLUMNS), np.int32)
        words[:, 0] = parsed.labels
        dense = words[:, 1:_FIRST_KEY].view(np.float32)
        engine.transform_dense(parsed.integers, self._rules.dense_floor, self._rules.dense_fill, dense)
        for column, lookup in self._lookups.items():
            lookup.find(parsed.categories[column], words[:, _FIRST_KEY + column])
        return words

    def keys(self, text: Any) -> Any:
        """Keys [columns of this group, rows] int32, -1 where what is there stays. Or the ``Fault``."""
        parsed = self.parse(text)
        if isinstance(parsed, Fault):
            return parsed
        keys = np.empty((len(self._lookups), len(parsed.labels)), np.int32)
        for place, (column, lookup) in enumerate(self._lookups.items()):
            lookup.find(parsed.categories[column], keys[place])
        return keys


class EncodePass:
    """Encodes chunks; every call is collective."""

    def __init__(
        self,
        job: Job,
        comm: Comm,
        pool: ThreadPoolExecutor,
        encoding: Encoding,
        *,
        threads: int,
        budget_bytes: int,
        labelled: bool = True,
        progress: Callable[[int, int], None] = lambda *_: None,
    ) -> None:
        """Prepare.

        Args:
            job: working folder.
            comm: of all ranks.
            pool: of ``threads`` threads.
            encoding: of values.
            threads: of this rank.
            budget_bytes: for look-up tables; all ranks take the least.
            labelled: the rows start with the label.
            progress: called with bytes done and in all.
        """
        self._job, self._comm, self._pool, self._encoding = job, comm, pool, encoding
        self._ahead = 2 * threads
        self._labelled = labelled
        self._progress = progress
        self._done = 0
        least = np.array([budget_bytes], np.int64)
        comm.all_reduce(least, "min").wait()
        self._groups = lookup_groups(encoding.tables, int(least[0]))

    def run(self, chunks: Sequence[Chunk], cuts: Mapping[int, Cut]) -> list[Shard]:
        """Encode chunks into shards in the working folder.

        Args:
            chunks: in the order that their rows have in the splits.
            cuts: by chunk number, where its rows go.

        Returns:
            All shards with rows, in order of chunks.

        Raises:
            DataError: a row is malformed.
        """
        self._agree_on_groups()
        total = sum(chunk.bytes for chunk in chunks) * len(self._groups)
        for number, group in enumerate(self._groups):
            marked = self._marked(f".g{number}.json")
            left = [chunk for chunk in chunks if chunk.number not in marked]
            own = share_of_rank(left, self._comm.rank, self._comm.size)
            self._done += sum(chunk.bytes for chunk in chunks if chunk.number in marked) // self._comm.size
            if own:
                lookups = self._lookups(group)
                self._encode(number, RowEncoder(self._encoding.rules, lookups, labelled=self._labelled),
                             list(lookups), own, cuts, total // self._comm.size)  # fmt: skip
            self._comm.barrier()
        entries = self._marked(f".g{len(self._groups) - 1}.json")
        return [
            Shard(chunk.number, split, self._path(chunk.number, split), rows, digest)
            for chunk in chunks
            for split, rows, digest in entries[chunk.number]
            if rows
        ]

    def _agree_on_groups(self) -> None:
        """Start over where an earlier attempt had other groups: half-filled shards do not say which."""
        plan = [[[part.column, part.start, part.stop] for part in group] for group in self._groups]
        if self._comm.rank == 0 and self._job.read("groups.json") != plan:
            for path in (self._job.folder / _FOLDER).iterdir():
                path.unlink()
            self._job.mark("groups.json", plan)
        self._comm.barrier()

    def _marked(self, suffix: str) -> dict[int, list[Any]]:
        """What the marks of a group say, by chunk number: the same on every rank."""
        own = [mark for name, mark in self._job.marks(_FOLDER) if name.endswith(suffix)] if not self._comm.rank else []
        return dict(self._job.agree(own)[0])

    def _lookups(self, group: Sequence[LookupPart]) -> dict[int, Lookup]:
        tables = self._encoding.tables
        made = self._pool.map(lambda part: make_lookup(tables[part.column], part), group)
        return {part.column: lookup for part, lookup in zip(group, made, strict=True)}

    def _path(self, chunk: int, split: str) -> Path:
        return self._job.folder / _FOLDER / f"{chunk:06d}.{split}.bin"

    def _encode(
        self,
        group: int,
        encoder: RowEncoder,
        columns: Sequence[int],
        chunks: Sequence[Chunk],
        cuts: Mapping[int, Cut],
        total: int,
    ) -> None:
        work = encoder.keys if group else encoder.rows
        last_group = group == len(self._groups) - 1
        shards: ShardFiles | None = None
        try:
            for item, result in in_order(self._pool, lambda one: work(_text(one)), chunk_pieces(chunks), self._ahead):
                chunk = item.chunk
                if shards is None:
                    shards = self._open(chunk, cuts[chunk.number], fresh=group == 0)
                if isinstance(result, Fault):
                    refuse(chunk, shards.rows, result)
                if group:
                    shards.fill(result, columns)
                else:
                    shards.append(result)
                self._done += item.piece.bytes_on_disk
                self._progress(self._done, total)
                if item.last:
                    entries = shards.close(hashed=last_group)
                    self._job.mark(f"{_FOLDER}/{chunk.number:06d}.g{group}.json", [chunk.number, entries])
                    shards = None
        finally:
            if shards is not None:
                shards.close(hashed=False)

    def _open(self, chunk: Chunk, cut: Cut, *, fresh: bool) -> ShardFiles:
        names = [name for name in (cut.first, cut.second) if name]
        return ShardFiles(cut, [self._path(chunk.number, name) for name in names], fresh=fresh)


def _text(item: ChunkPiece) -> Any:
    return item.piece.text


class ShardFiles:
    """The one or two shards of a chunk, written or filled in row by row."""

    def __init__(self, cut: Cut, paths: Sequence[Path], *, fresh: bool) -> None:
        """Open the files; ``fresh`` ones are made anew."""
        self._cut = cut
        self.paths = paths
        self._files = [path.open("w+b" if fresh else "r+b", buffering=0) for path in paths]
        self._digests = [Checksum() for _ in paths]
        self._names = [cut.first, cut.second]
        self.rows = 0

    def append(self, words: Any) -> None:
        """Write rows [B, 40] int32."""
        for file, _, part in self._parts(len(words)):
            self._write(file, words[part])

    def fill(self, keys: Any, columns: Sequence[int]) -> None:
        """Fill keys [columns, B] in, where they are not -1."""
        for file, place, part in self._parts(keys.shape[1]):
            size = part.stop - part.start
            words = np.empty((size, NUM_COLUMNS), np.int32)
            got = os.preadv(self._files[file].fileno(), [words.data.cast("B")], place * ROW_BYTES)
            assert got == words.nbytes, "a marked shard is whole"
            for column, found in zip(columns, keys[:, part], strict=True):
                np.copyto(words[:, _FIRST_KEY + column], found, where=found >= 0)
            self._write(file, words)

    def close(self, *, hashed: bool) -> list[tuple[str, int, str]]:
        """Bring the files to the disk; returns split, rows and, where ``hashed``, the sum of each."""
        entries = []
        for number, (file, digest) in enumerate(zip(self._files, self._digests, strict=True)):
            rows = file.tell() // ROW_BYTES
            os.fsync(file.fileno())
            file.close()
            entries.append((self._names[number], rows, digest.text() if hashed else ""))
        return entries

    def _parts(self, rows: int) -> list[tuple[int, int, slice]]:
        """File, row in it and rows of the piece, for the one or two files that the next rows go to."""
        first = min(rows, max(0, self._cut.rows - self.rows))
        parts = []
        if first:
            parts.append((0, self.rows, slice(0, first)))
        if first < rows:
            parts.append((1, self.rows + first - self._cut.rows, slice(first, rows)))
        self.rows += rows
        return parts

    def _write(self, file: int, words: Any) -> None:
        data = np.ascontiguousarray(words).data.cast("B")
        self._digests[file].update(data)
        while data:
            data = data[self._files[file].write(data) or 0 :]
