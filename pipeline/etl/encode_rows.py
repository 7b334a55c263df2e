"""Further Criteo rows, encoded as a prepared set's were: the same numbers, from its vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dlrm.errors import CrosslaneError, DataError
from embedding.comm import Comm, SingleComm
from pipeline.etl import chunks as chunked
from pipeline.etl.chunks import cut_files
from pipeline.etl.criteo_encode import Cut, EncodePass
from pipeline.etl.job import PUBLISHING, Job
from pipeline.etl.memory import table_budget
from pipeline.etl.publishing import criteo_manifest, publish, publish_again
from pipeline.etl.text_blocks import check_distinct, check_files
from pipeline.etl.vocabulary import ENCODING_FOLDER, ENCODING_NAME, read_encoding
from pipeline.manifest import check_split_name
from pipeline.threads import threads_per_rank


def encode_rows(
    files: Sequence[Path],
    like: Path,
    out: Path,
    *,
    split: str = "test",
    labelled: bool = True,
    name: str = "criteo",
    overwrite: bool = False,
    memory_limit: int | None = None,
    comm: Comm | None = None,
    threads: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Path:
    """Encode files into a data set of one split that has the tables of another set (collective).

    Args:
        files: rows in order, plain or ``.gz``.
        like: folder of a set of ``prepare_criteo``, or its ``encoding`` folder alone.
        out: folder of the new set.
        split: name of its split.
        labelled: the rows start with the label; without, it is stored as 0.
        name: name of the new set.
        overwrite: replace a data set that is in ``out``.
        memory_limit: bytes that all ranks of a machine may take together; ``None``: half of what is free.
        comm: of all ranks; ``None``: this process alone.
        threads: of this rank; ``None``: its share of the cores.
        progress: called after each piece with ``encode``, bytes done and in all.

    Returns:
        ``out``.

    Raises:
        ConfigError: the memory limit leaves too little.
        DataError: a file is missing or malformed, or ``like`` has no vocabulary.
    """
    comm = comm or SingleComm()
    threads = threads or threads_per_rank()
    check_files(files, split)
    check_distinct({split: files})
    check_split_name(split)
    folder = like if (like / ENCODING_NAME).is_file() else like / ENCODING_FOLDER
    encoding = read_encoding(folder)
    if folder.resolve() == (out / ENCODING_FOLDER).resolve():
        raise DataError(f"{out}: holds the vocabulary itself; choose another folder for the encoded rows")
    budget = table_budget(
        memory_limit, local_ranks=comm.split_node().size, pieces=3 * threads + 2, piece_bytes=chunked.PIECE_BYTES
    )
    inputs = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    stamp = (folder / ENCODING_NAME).stat().st_mtime_ns
    description = {"inputs": inputs, "like": [str(folder.resolve()), stamp], "encode": [split, labelled, name]}
    job = Job(comm, out, description, overwrite=overwrite)
    report = progress or (lambda *_: None)
    try:
        if job.read(PUBLISHING) is None:
            chunks = cut_files({"test": list(files)})
            with ThreadPoolExecutor(threads, thread_name_prefix="encode") as pool:
                encode = EncodePass(
                    job,
                    comm,
                    pool,
                    encoding,
                    threads=threads,
                    budget_bytes=budget,
                    labelled=labelled,
                    progress=lambda done, total: report("encode", done, total),
                )
                shards = encode.run(chunks, {chunk.number: Cut(split) for chunk in chunks})
            if comm.rank == 0:
                notes = [
                    f"{split}: {', '.join(path.name for path in files)}",
                    "encoded with the vocabulary of another set",
                ]
                publish(job, shards, criteo_manifest(name, encoding, shards, [*notes, *encoding.rules.notes()]))
        elif comm.rank == 0:
            publish_again(job)
    except CrosslaneError:
        job.discard()
        raise
    comm.barrier()
    return out
