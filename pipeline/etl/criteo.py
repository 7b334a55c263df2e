"""Criteo's tab-separated rows (label, 13 integers, 26 hexadecimal categories) into a prepared data set.

Two passes in bounded memory, on any number of threads and ranks, with the same bytes as the result: the first checks
and counts the training rows (``criteo_count``), ``numbering`` turns the counts into numbers, the second writes Raw
shards (``criteo_encode``). What is done is marked in a working folder (``job``), so that the same command goes on
after a kill. ``rules`` says what becomes of values; validation and test rows influence no number unless they are
to be counted too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from dlrm.errors import ConfigError, CrosslaneError
from embedding.comm import Comm, SingleComm
from pipeline.etl import chunks as chunked
from pipeline.etl.chunks import Chunk, Role, count_chunk_lines, cut_files, share_of_rank
from pipeline.etl.criteo_count import Counted, CountPass
from pipeline.etl.criteo_encode import Cut, EncodePass, Shard
from pipeline.etl.job import PUBLISHING, Job
from pipeline.etl.memory import table_budget
from pipeline.etl.numbering import Numbering
from pipeline.etl.publishing import criteo_manifest, publish, publish_again, write_encoding
from pipeline.etl.rules import Rules, rules_to_values
from pipeline.etl.text_blocks import check_distinct, check_files
from pipeline.etl.vocabulary import ENCODING_FOLDER, read_encoding
from pipeline.threads import threads_per_rank

ProgressCallback = Callable[[str, int, int], None]
"""Called with the phase (``count``, ``number`` or ``encode``), what is done of it and what there is in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CriteoInputs:
    """Files by what they are for; Raises ``ConfigError`` and ``DataError`` where they will not do.

    Attributes:
        train: files of the training rows, in time order.
        validation: files of the split ``validation``.
        test: files of the split ``test``.
        last_day: the first half of its rows (rounded up) is ``test``, the rest ``validation``.
        validation_fraction: instead, this last part of the training rows is ``validation``.
    """

    train: Sequence[Path]
    validation: Sequence[Path] = ()
    test: Sequence[Path] = ()
    last_day: Path | None = None
    validation_fraction: float = 0.0
    by_role: dict[Role, list[Path]] = field(init=False)

    def __post_init__(self) -> None:
        """Check that the files are there and go together."""
        if not self.train:
            raise ConfigError("train files: none; name at least one")
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(f"validation fraction: {self.validation_fraction}, but must be at least 0 and below 1")
        if self.validation and self.validation_fraction:
            raise ConfigError("validation: both files and a fraction of the training rows; give one of them")
        if self.last_day and (self.validation or self.test or self.validation_fraction):
            raise ConfigError("last day: it is the splits test and validation; leave other files and fractions out")
        roles: dict[Role, list[Path]] = {
            "train": list(self.train),
            "validation": list(self.validation),
            "test": list(self.test),
            "last_day": [self.last_day] if self.last_day else [],
        }
        for role, paths in roles.items():
            check_files(paths, role)
        check_distinct({str(role): paths for role, paths in roles.items()})
        object.__setattr__(self, "by_role", roles)

    def described(self) -> dict[str, object]:
        """What the result depends on, as JSON values."""
        files = {
            role: [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
            for role, paths in self.by_role.items()
        }
        return {"files": files, "validation_fraction": self.validation_fraction}

    def notes(self) -> list[str]:
        """Which file went where, for the manifest."""
        notes = [f"{role}: {', '.join(path.name for path in paths)}" for role, paths in self.by_role.items() if paths]
        if self.last_day:
            notes.append("last day: the first half of its rows is test, the rest validation")
        if self.validation_fraction:
            fraction = f"{self.validation_fraction:g}"
            notes.append(f"validation: the last {fraction} of the training rows")
        return notes


def prepare_criteo(
    inputs: CriteoInputs,
    out: Path,
    *,
    rules: Rules | None = None,
    name: str = "criteo",
    overwrite: bool = False,
    memory_limit: int | None = None,
    comm: Comm | None = None,
    threads: int | None = None,
    progress: ProgressCallback | None = None,
) -> Path:
    """Prepare Criteo files, plain or ``.gz``; Windows line ends and a missing last one are fine (collective).

    Args:
        inputs: the files.
        out: folder of the prepared data set, the same for all ranks.
        rules: what becomes of values.
        name: name of the data set.
        overwrite: replace a data set that is in ``out``.
        memory_limit: bytes that all ranks of a machine may take together; ``None``: half of what is free.
        comm: of all ranks; ``None``: this process alone.
        threads: of this rank; ``None``: its share of the cores.
        progress: called after each piece, with what this rank did.

    Returns:
        ``out``.

    Raises:
        ConfigError: an argument is out of range.
        DataError: a file is missing or empty, or a row is malformed; the message says file, line and column.
    """
    comm = comm or SingleComm()
    threads = threads or threads_per_rank()
    rules = rules or Rules()
    budget = table_budget(
        memory_limit, local_ranks=comm.split_node().size, pieces=3 * threads + 2, piece_bytes=chunked.PIECE_BYTES
    )
    description = {"inputs": inputs.described(), "rules": rules_to_values(rules), "name": name}
    job = Job(comm, out, description, overwrite=overwrite)
    try:
        if job.read(PUBLISHING) is None:
            with ThreadPoolExecutor(threads, thread_name_prefix="prepare") as pool:
                preparation = _Preparation(job, comm, pool, inputs, rules, threads, budget, progress)
                shards = preparation.run()
                if comm.rank == 0:
                    manifest = criteo_manifest(
                        name, read_encoding(job.folder / ENCODING_FOLDER), shards, [*inputs.notes(), *rules.notes()]
                    )
                    publish(job, shards, manifest)
        elif comm.rank == 0:
            publish_again(job)
    except CrosslaneError:
        job.discard()  # the input will be another one; whatever else ends this, the same command goes on
        raise
    comm.barrier()
    return out


class _Preparation:
    """The steps of one preparation; every call is collective."""

    def __init__(
        self,
        job: Job,
        comm: Comm,
        pool: ThreadPoolExecutor,
        inputs: CriteoInputs,
        rules: Rules,
        threads: int,
        budget: int,
        progress: ProgressCallback | None,
    ) -> None:
        self._job, self._comm, self._pool = job, comm, pool
        self._inputs, self._rules = inputs, rules
        self._threads, self._budget = threads, budget
        self._progress = progress or (lambda *_: None)
        self._chunks = cut_files(inputs.by_role)

    def run(self) -> list[Shard]:
        """All steps that no mark says are done; the shards are complete in the working folder."""
        lines = self._lines()
        limits, cuts = self._cuts(lines)
        counted = self._count(limits)
        if self._job.read("numbered.json") is None:
            self._number(counted)
        encoding = read_encoding(self._job.folder / ENCODING_FOLDER)
        encode = EncodePass(
            self._job,
            self._comm,
            self._pool,
            encoding,
            threads=self._threads,
            budget_bytes=self._budget,
            progress=lambda done, total: self._progress("encode", done, total),
        )
        return encode.run(self._chunks, cuts)

    def _of(self, role: Role) -> list[Chunk]:
        return [chunk for chunk in self._chunks if chunk.role == role]

    def _lines(self) -> dict[int, int]:
        """Lines of the chunks whose rows two splits share."""
        role: Role = "train" if self._inputs.validation_fraction else "last_day"
        chunks = self._of(role)
        if not chunks:
            return {}
        known = self._job.agree(self._job.read("lines.json"))[0]
        if known is None:
            own = count_chunk_lines(self._pool, share_of_rank(chunks, self._comm.rank, self._comm.size))
            known = [pair for part in self._job.agree(list(own.items())) for pair in part]
            if self._comm.rank == 0:
                self._job.mark("lines.json", known)
        return dict(known)

    def _cuts(self, lines: Mapping[int, int]) -> tuple[dict[int, int], dict[int, Cut]]:
        """Rows to count of chunks not counted whole, and where each chunk's rows go."""
        limits: dict[int, int] = {}
        cuts = {chunk.number: Cut(chunk.role) for chunk in self._chunks}
        total = sum(lines.values())
        if self._inputs.validation_fraction:
            first = total - round(total * self._inputs.validation_fraction)
            names = ("train", "validation")
            if not 0 < first < total:
                raise ConfigError(
                    f"validation fraction: {self._inputs.validation_fraction} of {total} training rows leaves {first} "
                    f"to train on and {total - first} to validate on; both parts need at least one row"
                )
        else:
            first, names = -(-total // 2), ("test", "validation")
        before = 0
        for number in sorted(lines):
            rows = min(lines[number], max(0, first - before))
            cuts[number] = Cut(names[0], rows, names[1]) if rows < lines[number] else Cut(names[0])
            if self._inputs.validation_fraction and rows < lines[number]:
                limits[number] = rows
            before += lines[number]
        return limits, cuts

    def _count(self, limits: Mapping[int, int]) -> Counted:
        everything = self._rules.count == "all"
        chunks = self._chunks if everything else self._of("train")
        total = sum(chunk.bytes for chunk in chunks) // self._comm.size
        count = CountPass(
            self._job,
            self._comm,
            self._pool,
            self._rules,
            threads=self._threads,
            budget_bytes=self._budget,
            advance=_meter(lambda done: self._progress("count", done, total)),
        )
        return count.run(chunks, {} if everything else limits)

    def _number(self, counted: Counted) -> None:
        """Number the categories and write the vocabulary and its statistics."""
        total = sum(run.entries for run in counted.runs)
        numbering = Numbering(
            self._comm,
            self._job.folder / "numbering",
            threshold=self._rules.frequency_threshold,
            cap_rows=self._rules.cap_rows,
            budget_bytes=self._budget,
            advance=_meter(lambda done: self._progress("number", done, max(total // self._comm.size, done))),
        )
        own = self._rules.missing_category == "own"
        numbered = []
        for column, missing in enumerate(counted.missing):
            runs = [run for run in counted.runs if run.column == column][self._comm.rank :: self._comm.size]
            numbered.append(numbering.number(column, runs, missing if own else 0, counted.counted))
        write_encoding(self._job, self._comm, self._rules, numbered, counted.counted)
        if self._comm.rank == 0:
            self._job.mark("numbered.json", True)
            for scratch in ("counts", "numbering"):
                self._job.remove_unnamed(scratch, ())
        self._comm.barrier()


def _meter(report: Callable[[int], None]) -> Callable[[int], None]:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        report(done)

    return advance
