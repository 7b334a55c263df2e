"""Criteo's rows through NVTabular: its workflow in an environment of its own, then our numbers and files.

A script (``nvtabular_worker``) under the other interpreter fits and transforms to NVTabular's Parquet in the working
folder; that is read as any Parquet source is, its ids become our numbers (``nvtabular_numbers``), and vocabulary,
statistics and Raw shards are written as Crosslane's own engine (``criteo``) writes them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from dlrm.errors import ConfigError, CrosslaneError, DataError
from embedding.comm import SingleComm
from pipeline.etl import nvtabular_worker
from pipeline.etl.criteo import CriteoInputs, ProgressCallback
from pipeline.etl.criteo_encode import Cut, Shard, ShardFiles
from pipeline.etl.criteo_text import NUM_COLUMNS, NUM_DENSE, TABLE_NAMES
from pipeline.etl.job import PUBLISHING, Job
from pipeline.etl.nvtabular_numbers import FIRST_ID, read_uniques, renumber
from pipeline.etl.publishing import criteo_manifest, publish, publish_again, write_encoding
from pipeline.etl.rules import Rules, rules_to_values
from pipeline.etl.vocabulary import ENCODING_FOLDER, read_encoding
from pipeline.formats.interchange import ReadOptions
from pipeline.formats.parquet import ParquetSource, files_of

BLOCK_BYTES = 64 << 20
"""Text of one Dask partition."""
_FOLDER = "nvtabular"
_DONE = "transformed.json"
_FIRST_KEY = 1 + NUM_DENSE


def prepare_with_nvtabular(
    inputs: CriteoInputs,
    out: Path,
    *,
    python: Path,
    rules: Rules | None = None,
    name: str = "criteo",
    overwrite: bool = False,
    scheduler: str | None = None,
    block_bytes: int = BLOCK_BYTES,
    progress: ProgressCallback | None = None,
) -> Path:
    """Prepare plain Criteo files with NVTabular's workflow.

    Args:
        inputs: the files.
        out: folder of the prepared data set.
        python: interpreter of an environment that has NVTabular (``nvtabular_env``).
        rules: what becomes of values.
        name: name of the data set.
        overwrite: replace a data set that is in ``out``.
        scheduler: address of a Dask scheduler, whose workers see the files and ``out``; ``None``: one process.
        block_bytes: text of one Dask partition.
        progress: called after each step with ``workflow`` or ``encode``, what is done and what there is in all.

    Returns:
        ``out``.

    Raises:
        ConfigError: the inputs ask for what NVTabular's workflow has no place for.
        DataError: a file is missing or malformed, or the workflow failed.
    """
    rules = rules or Rules()
    report = progress or (lambda *_: None)
    check_inputs(inputs, rules)
    description = {"inputs": inputs.described(), "rules": rules_to_values(rules), "name": name, "engine": "nvtabular"}
    job = Job(SingleComm(), out, description, overwrite=overwrite)
    try:
        if job.read(PUBLISHING) is not None:
            publish_again(job)
            return out
        if job.read(_DONE) is None:
            _transform(job, inputs, rules, python, scheduler, block_bytes, report)
        shards = _encode(job, rules, report)
        notes = [*inputs.notes(), *rules.notes(), f"engine: NVTabular {job.read(_DONE)['version']}"]
        publish(job, shards, criteo_manifest(name, read_encoding(job.folder / ENCODING_FOLDER), shards, notes))
    except CrosslaneError:
        job.discard()
        raise
    return out


def check_inputs(inputs: CriteoInputs, rules: Rules) -> None:
    """Refuse what the workflow has no place for.

    Raises:
        ConfigError: a fraction for validation, counting of all splits, or a packed file.
    """
    if rules.count != "train":
        raise ConfigError(
            f"--count {rules.count}: --engine nvtabular counts the training rows alone; leave it out, or use --engine "
            "crosslane"
        )
    if inputs.validation_fraction:
        raise ConfigError(
            f"--validation-fraction {inputs.validation_fraction:g}: --engine nvtabular counts whole files; give the "
            "last rows as a file with --validation, or use --engine crosslane"
        )
    for paths in inputs.by_role.values():
        for path in paths:
            if path.suffix == ".gz":
                raise ConfigError(
                    f"{path}: --engine nvtabular reads plain text, since a packed file cannot be cut into blocks; "
                    "unpack it, or use --engine crosslane"
                )


def _transform(
    job: Job,
    inputs: CriteoInputs,
    rules: Rules,
    python: Path,
    scheduler: str | None,
    block_bytes: int,
    report: ProgressCallback,
) -> None:
    """NVTabular's part: vocabulary and Parquet rows into the working folder."""
    folder = (job.folder / _FOLDER).absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    request = {
        "splits": {role: [str(path.absolute()) for path in paths] for role, paths in inputs.by_role.items() if paths},
        "out": str(folder),
        "threshold": rules.frequency_threshold,
        "modulo": rules.cap_modulo,
        "fill_category": "00000000" if rules.missing_category == "zero" else None,
        "floor": rules.dense_floor,
        "fill": rules.dense_fill,
        "block_bytes": block_bytes,
        "scheduler": scheduler,
    }
    version = None
    with _worker(python, request, folder / "worker.log") as lines:
        for values in lines:
            version = values.get("finished", version)
            if "steps" in values:
                report("workflow", values["done"], values["steps"])
    job.mark(_DONE, {"version": version})


@contextmanager
def _worker(python: Path, request: dict[str, Any], log: Path) -> Iterator[Iterator[dict[str, Any]]]:
    """The script under the other interpreter, and the lines of JSON that it prints.

    Raises:
        DataError: it failed, with the last line of what it said.
    """
    # numba's settings of this process name a threading layer that the other environment lacks.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("NUMBA_", "PYTHON"))}
    # Isolated: the folder of the script holds modules that are called as some of the standard library.
    command = [str(python), "-I", "-u", nvtabular_worker.__file__]
    with (
        log.open("wb") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with suppress(BrokenPipeError):  # ended already; its exit code and last words say why
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
            yield (json.loads(line) for line in process.stdout if line.startswith("{"))
            code = process.wait()
        finally:
            process.kill()
            with suppress(BrokenPipeError):
                process.stdin.close()
    if code:
        said = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        reason = said[-1][:300] if said else "silently"
        raise DataError(
            f"--engine nvtabular: NVTabular's workflow ended with code {code} ({reason}); "
            "check the rows with --engine crosslane, which names a malformed line, or the environment with "
            "`crosslane env nvtabular`"
        )


def _encode(job: Job, rules: Rules, report: ProgressCallback) -> list[Shard]:
    """Our part: vocabulary, statistics and Raw shards."""
    rows_folder, categories = job.folder / _FOLDER / "rows", job.folder / _FOLDER / "vocabulary" / "categories"
    uniques = [read_uniques(categories, table) for table in TABLE_NAMES]
    options = ReadOptions(
        table_rows=tuple(FIRST_ID + len(one.values) for one in uniques), allow=frozenset({"fp32-dense"})
    )
    source = ParquetSource(files_of(rows_folder), rows_folder, options)
    counted = source.splits["train"]
    for table, one in zip(TABLE_NAMES, uniques, strict=True):
        seen = int(one.counts.sum()) + one.missing + one.rare
        if seen != counted:
            raise DataError(f"column {table}: NVTabular counted {seen} categories in {counted} training rows")
    numbered, numbers = [], []
    for column, one in enumerate(uniques):
        made = renumber(one, rules, counted, job.folder / "numbering" / f"C{column + 1:02d}.values")
        numbered.append(made[0])
        numbers.append(made[1])
    write_encoding(job, SingleComm(), rules, numbered, counted)
    shards: list[Shard] = []
    done, total = 0, sum(source.splits.values())
    for role in source.splits:
        files = _shard_files(job, role, source.splits[role], len(shards))
        try:
            for block in source.blocks(role):
                files.append(raw_rows(block, numbers))
                done += block.rows
                report("encode", done, total)
        except DataError as error:
            raise DataError(f"rows of {role}, as NVTabular wrote them: {error}") from None
        finally:
            entries = files.close(hashed=True)
        shards += [
            Shard(len(shards) + place, split, files.paths[place], rows, digest)
            for place, (split, rows, digest) in enumerate(entries)
            if rows
        ]
    return shards


def _shard_files(job: Job, role: str, rows: int, number: int) -> ShardFiles:
    cut = Cut("test", -(-rows // 2), "validation") if role == "last_day" else Cut(role)
    paths = [job.folder / "shards" / f"{number:06d}.{split}.bin" for split in (cut.first, cut.second) if split]
    return ShardFiles(cut, paths, fresh=True)


def raw_rows(block: Any, numbers: Sequence[Any]) -> Any:
    """Raw rows [B, 40] int32 of NVTabular's rows.

    Args:
        block: rows with NVTabular's ids.
        numbers: by column, our number by id.
    """
    words = np.empty((block.rows, NUM_COLUMNS), np.int32)
    words[:, 0] = block.labels
    words[:, 1:_FIRST_KEY] = block.dense.view(np.int32)
    for column, table in enumerate(numbers):
        np.take(table, block.keys[:, column], out=words[:, _FIRST_KEY + column], mode="clip")
    return words
