"""What engines share: the vocabulary's files, and from a complete working folder to the data set.

Files get their names at the end, the manifest comes last.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

from pydantic import TypeAdapter

from embedding.comm import Comm
from pipeline.etl.criteo_encode import ROW_BYTES, Shard
from pipeline.etl.criteo_text import DENSE_NAMES
from pipeline.etl.job import PUBLISHING, Job
from pipeline.etl.numbering import Numbered
from pipeline.etl.rules import Rules
from pipeline.etl.statistics import stamp_statistics, write_statistics
from pipeline.etl.vocabulary import ENCODING_FOLDER, ENCODING_NAME, Encoding, encoding_values, num_parts, write_part
from pipeline.manifest import MANIFEST_NAME, DenseInfo, FileInfo, Manifest, SplitInfo, TableInfo, write_manifest
from pipeline.replacement import left_behind, remove_left_behind
from pipeline.statistics import STATISTICS

_MANIFEST: TypeAdapter[Manifest] = TypeAdapter(Manifest)
_SOURCE = "Criteo rows: label, 13 integers, 26 hexadecimal categories, tab-separated"


def write_encoding(job: Job, comm: Comm, rules: Rules, numbered: Sequence[Numbered], rows: int) -> None:
    """Write the vocabulary and its statistics into the working folder (collective).

    Args:
        job: working folder.
        comm: of all ranks, which share the files out.
        rules: of values.
        numbered: by column.
        rows: counted.
    """
    folder = job.folder / ENCODING_FOLDER
    places = [(column, part) for column, one in enumerate(numbered) for part in range(num_parts(one))]
    mine = places[comm.rank :: comm.size]
    written = [write_part(folder, column, numbered[column], part) for column, part in mine]
    everyone = job.agree([[*place, entry] for place, entry in zip(mine, written, strict=True)])
    files = {(column, part): entry for entries in everyone for column, part, entry in entries}
    if comm.rank == 0:
        job.mark(f"{ENCODING_FOLDER}/{ENCODING_NAME}", encoding_values(rules, numbered, files))
        write_statistics(job, rows, numbered)


def shard_names(shards: Sequence[Shard]) -> list[str]:
    """File names in the data set: ``<split>.bin``, or ``<split>.<number>.bin`` where a split has several shards."""
    splits = [shard.split for shard in shards]
    return [
        f"{split}.bin" if splits.count(split) == 1 else f"{split}.{splits[:place].count(split):05d}.bin"
        for place, split in enumerate(splits)
    ]


def criteo_manifest(name: str, encoding: Encoding, shards: Sequence[Shard], notes: Sequence[str]) -> Manifest:
    """The manifest of a set of Criteo rows.

    Args:
        name: of the set.
        encoding: of its values.
        shards: in order.
        notes: how the values came about.
    """
    files: dict[str, list[FileInfo]] = {}
    for shard, path in zip(shards, shard_names(shards), strict=True):
        info = FileInfo(path=path, rows=shard.rows, bytes=shard.rows * ROW_BYTES, checksum=shard.checksum)
        files.setdefault(shard.split, []).append(info)
    order = sorted(files, key=lambda split: ("train", "validation", "test").index(split) if split in _USUAL else 3)
    return Manifest(
        name=name,
        layout="raw",
        dense=DenseInfo(names=DENSE_NAMES),
        tables=tuple(TableInfo(name=table.name, rows=table.rows, frequency_ordered=True) for table in encoding.tables),
        splits={
            split: SplitInfo(rows=sum(file.rows for file in files[split]), files=tuple(files[split])) for split in order
        },
        source=_SOURCE,
        notes=tuple(notes),
    )


_USUAL = ("train", "validation", "test")


def publish(job: Job, shards: Sequence[Shard], manifest: Manifest) -> None:
    """Give the files of a complete working folder their names, and write the manifest.

    Args:
        job: the working folder.
        shards: in it, in order.
        manifest: of the set.
    """
    if job.read(STATISTICS) is not None:
        stamp_statistics(job, manifest)
    renames = [[shard.path.name, name] for shard, name in zip(shards, shard_names(shards), strict=True)]
    values: dict[str, Any] = {
        "renames": renames,
        "manifest": _MANIFEST.dump_python(manifest, mode="json"),
        "left_behind": left_behind(job.out, manifest),  # noted while the old set can still say it
    }
    job.mark(PUBLISHING, values)
    publish_again(job)


def publish_again(job: Job) -> None:
    """Do, or go on with, what the mark of ``publish`` says."""
    values = job.read(PUBLISHING)
    # Gone before the first file changes: old and new files together must not pass for a set.
    (job.out / MANIFEST_NAME).unlink(missing_ok=True)
    for working, name in values["renames"]:
        source = job.folder / "shards" / working
        if source.exists():
            source.replace(job.out / name)
    encoding = job.folder / ENCODING_FOLDER
    if encoding.is_dir() and any(encoding.iterdir()):
        shutil.rmtree(job.out / ENCODING_FOLDER, ignore_errors=True)
        encoding.replace(job.out / ENCODING_FOLDER)
    write_manifest(job.out, _MANIFEST.validate_python(values["manifest"]))
    remove_left_behind(job.out, values["left_behind"])
    job.finish()
