"""First pass over Criteo's rows: check every field of the counted files and count the categories.

Chunks are counted in batches. After a batch the tables go to disk and a mark names its chunks and runs, so that a kill
costs one batch at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

from embedding.comm import Comm
from pipeline.etl import criteo_text_numba as engine
from pipeline.etl.chunks import Chunk, ChunkPiece, chunk_pieces, in_order, refuse, share_of_rank
from pipeline.etl.criteo_text import NUM_CATEGORICAL, Fault, parse_rows
from pipeline.etl.job import Job
from pipeline.etl.rules import Rules
from pipeline.etl.tally import Run, Tally

BATCH_BYTES = 32 << 30
"""Input that one rank counts between two marks: 130 million rows of plain text, a few minutes."""
_FOLDER = "counts"
_STRIDE = 7
"""Columns between where one piece and the next start to count: prime to their number."""
_MOST_ROWS = 1 << 31
"""Rows between two flushes: an entry's count has 32 bits."""


@dataclass(frozen=True, slots=True)
class Counted:
    """What all marks together say.

    Attributes:
        rows: of each chunk, by number.
        counted: of these, those counted.
        missing: by column, in the counted rows.
        runs: sorted counts on disk.
    """

    rows: dict[int, int]
    counted: int
    missing: list[int]
    runs: list[Run]


class CountPass:
    """Counts the chunks of this rank that no mark names."""

    def __init__(
        self,
        job: Job,
        comm: Comm,
        pool: ThreadPoolExecutor,
        rules: Rules,
        *,
        threads: int,
        budget_bytes: int,
        advance: Callable[[int], None],
    ) -> None:
        """Prepare.

        Args:
            job: working folder.
            comm: of all ranks.
            pool: of ``threads`` threads.
            rules: of values.
            threads: of this rank.
            budget_bytes: for the hash tables.
            advance: called with the bytes of each piece done.
        """
        self._job, self._comm, self._pool, self._rules = job, comm, pool, rules
        self._ahead = 2 * threads
        self._advance = advance
        self._tally = Tally(NUM_CATEGORICAL, budget_bytes, 0 if rules.missing_category == "zero" else -1)
        self._turn, self._turns = 0, Lock()

    def run(self, chunks: Sequence[Chunk], limits: Mapping[int, int]) -> Counted:
        """Count (collective).

        Args:
            chunks: of the files to count.
            limits: by number of the chunks that are not counted whole: so many rows at their front are.

        Raises:
            DataError: a row is malformed.
        """
        done, names, runs = self._marked()
        if self._comm.rank == 0:
            self._job.remove_unnamed(_FOLDER, runs)
        self._comm.barrier()
        self._advance(sum(chunk.bytes for chunk in chunks if chunk.number in done) // self._comm.size)
        left = [chunk for chunk in chunks if chunk.number not in done]
        own = share_of_rank(left, self._comm.rank, self._comm.size)
        prefix = f"r{self._comm.rank:04d}"
        taken = sum(name.startswith(prefix) for name in names)
        for number, batch in enumerate(_batches(own), taken):
            self._count_batch(f"{prefix}-{number:06d}", batch, limits)
        self._comm.barrier()
        return self._gather()

    def _marked(self) -> tuple[set[int], list[str], list[str]]:
        """Chunks done, names of marks, names of runs: the same on every rank."""
        marks = list(self._job.marks(_FOLDER)) if self._comm.rank == 0 else []
        found = [
            [chunk for _, mark in marks for chunk, _ in mark["rows"]],
            [name for name, _ in marks],
            [run[1] for _, mark in marks for run in mark["runs"]],
        ]
        chunks, names, runs = self._job.agree(found)[0]
        return set(chunks), names, runs

    def _count_batch(self, name: str, batch: Sequence[Chunk], limits: Mapping[int, int]) -> None:
        self._tally.begin(self._job.folder / _FOLDER, name)
        rows = dict.fromkeys((chunk.number for chunk in batch), 0)
        counted, since_flush = 0, 0

        def work(item: ChunkPiece) -> Fault | tuple[int, int]:
            limit = limits.get(item.chunk.number)
            return self._count(item, None if limit is None else max(0, limit - rows[item.chunk.number]))

        # Where a chunk is counted in part, a piece needs to know the rows in front of it: these go one by one.
        partly = [chunk for chunk in batch if limits.get(chunk.number)]
        for chunks, ahead in (([chunk for chunk in batch if chunk not in partly], self._ahead), (partly, 0)):
            for item, result in in_order(self._pool, work, chunk_pieces(chunks), ahead):
                number = item.chunk.number
                if isinstance(result, Fault):
                    refuse(item.chunk, rows[number], result)
                rows[number] += result[0]
                counted += result[1]
                since_flush += result[1]
                self._advance(item.piece.bytes_on_disk)
                if since_flush >= _MOST_ROWS:
                    self._tally.flush()
                    since_flush = 0
        self._tally.flush()
        runs = [[run.column, run.path.name, run.entries] for run in self._tally.runs]
        mark = {"rows": list(rows.items()), "counted": counted, "missing": self._tally.missing, "runs": runs}
        self._job.mark(f"{_FOLDER}/{name}.json", mark)

    def _count(self, item: ChunkPiece, limit: int | None) -> Fault | tuple[int, int]:
        """Check a piece and count its first ``limit`` rows; returns its rows, and those counted."""
        parsed = parse_rows(item.piece.text)
        if isinstance(parsed, Fault):
            return parsed
        rows = len(parsed.labels)
        used = rows if limit is None else min(rows, limit)
        if used:
            categories = parsed.categories[:, :used]
            if self._rules.cap_modulo is not None:
                engine.take_modulo(categories, self._rules.cap_modulo)
            with self._turns:
                self._turn = (self._turn + _STRIDE) % NUM_CATEGORICAL
                first = self._turn
            self._tally.add(categories, first)
        return rows, used

    def _gather(self) -> Counted:
        marks = [mark for _, mark in self._job.marks(_FOLDER)] if self._comm.rank == 0 else []
        marks = self._job.agree(marks)[0]
        folder = self._job.folder / _FOLDER
        return Counted(
            rows={chunk: rows for mark in marks for chunk, rows in mark["rows"]},
            counted=sum(mark["counted"] for mark in marks),
            missing=[sum(mark["missing"][column] for mark in marks) for column in range(NUM_CATEGORICAL)],
            runs=[Run(column, folder / name, entries) for mark in marks for column, name, entries in mark["runs"]],
        )


def _batches(chunks: Sequence[Chunk]) -> Iterator[list[Chunk]]:
    """Chunks up to ``BATCH_BYTES``, at least one."""
    batch: list[Chunk] = []
    size = 0
    for chunk in chunks:
        batch.append(chunk)
        size += chunk.bytes
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
