"""The working folder of a preparation: what is done is marked in it, so that the same command goes on after a kill.

Marks are JSON files that appear whole or not at all, each after what it stands for is on the disk. What no mark names
is removed when a preparation goes on. The folder lies in the data set's own and is gone when the set is complete.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dlrm.errors import DataError
from embedding.comm import Comm, all_gather_bytes, broadcast_bytes
from pipeline.formats.output import make_folders, remove_folders
from pipeline.manifest import MANIFEST_NAME

FOLDER = ".preparing"
_JOB = "job.json"
PUBLISHING = "publishing.json"
_VERSION = 3


class Job:
    """A working folder, shared by all ranks.

    Attributes:
        out: folder of the data set.
        folder: the working folder.
        resumed: whether it was there already, of the same job.
    """

    def __init__(self, comm: Comm, out: Path, description: Mapping[str, Any], *, overwrite: bool) -> None:
        """Make the folder, or go on with that of the same job; another job's is removed with a warning (collective).

        Args:
            comm: of all ranks.
            out: folder of the data set.
            description: all that the result depends on, as JSON values.
            overwrite: a data set in ``out`` may be replaced.

        Raises:
            DataError: there is a data set already, or the folder cannot be made.
        """
        self.out, self.folder = out, out / FOLDER
        self._comm = comm
        self._made: list[Path] = []
        job = {"version": _VERSION, "description": json.loads(json.dumps(description))}
        answer = {"error": "", "resumed": False}
        if comm.rank == 0:
            try:
                answer["resumed"] = self._open(job, overwrite)
            except DataError as error:
                answer["error"] = str(error)
            except OSError as error:
                answer["error"] = f"{out}: {error.strerror or error}; choose a folder that can be written"
        answer = json.loads(broadcast_bytes(comm, json.dumps(answer).encode()))
        if answer["error"]:
            raise DataError(answer["error"])
        self.resumed: bool = answer["resumed"]

    def _open(self, job: dict[str, Any], overwrite: bool) -> bool:
        found = self._found()
        same = found.items() >= job.items()
        # A kill while the files get their names leaves a manifest of this very job, or none.
        publishing = same and (self.folder / PUBLISHING).exists()
        if (self.out / MANIFEST_NAME).exists() and not overwrite and not publishing:
            raise DataError(
                f"{self.out}: holds a data set already; choose another folder, or replace it with --overwrite"
            )
        if same:
            self._made = [Path(name) for name in found["made"]]
        else:
            if any(path.is_file() for path in self.folder.rglob("*")):
                print(
                    f"warning: {self.folder}: an unfinished preparation {_difference(found, job)} is discarded; "
                    "this one starts from its beginning",
                    file=sys.stderr,
                    flush=True,
                )
            shutil.rmtree(self.folder, ignore_errors=True)
            self._made = make_folders(self.folder)[1:]
            for name in ("counts", "numbering", "shards", "encoding"):
                (self.folder / name).mkdir()
            self.mark(_JOB, {**job, "made": [str(path) for path in self._made]})
        return same

    def _found(self) -> dict[str, Any]:
        try:
            found = json.loads((self.folder / _JOB).read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def mark(self, name: str, values: Any) -> None:
        """Write a mark."""
        path = self.folder / name
        temporary = path.with_name(f".{path.name}.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(values, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    def read(self, name: str) -> Any:
        """A mark's values; ``None`` where it is not there."""
        try:
            return json.loads((self.folder / name).read_bytes())
        except FileNotFoundError:
            return None

    def marks(self, folder: str) -> Iterator[tuple[str, Any]]:
        """Names (without folder) and values of the marks in a folder, by name."""
        for path in sorted((self.folder / folder).glob("[!.]*.json")):
            yield path.name, json.loads(path.read_bytes())

    def remove_unnamed(self, folder: str, keep: Sequence[str]) -> None:
        """Remove the files of a folder that are neither marks nor named."""
        for path in (self.folder / folder).iterdir():
            if path.name not in keep and (path.suffix != ".json" or path.name.startswith(".")):
                path.unlink()

    def agree(self, values: Any) -> list[Any]:
        """Every rank's JSON values, in rank order (collective)."""
        return [json.loads(data) for data in all_gather_bytes(self._comm, json.dumps(values).encode())]

    def discard(self) -> None:
        """Remove everything, and folders made for it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        remove_folders(self._made)

    def finish(self) -> None:
        """Remove the working folder of a complete set."""
        shutil.rmtree(self.folder)


def _difference(found: Mapping[str, Any], job: Mapping[str, Any]) -> str:
    """What is other in the job of a working folder than in the one that is to be done."""
    if not found:
        return f"whose {_JOB} cannot be read"
    if found.get("version") != job["version"]:
        return "of a release with marks of another form"
    theirs, ours = (_named(one["description"]) for one in (found, job))
    other = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
    return f"begun with other {', '.join(other)}"


def _named(description: Mapping[str, Any]) -> dict[str, Any]:
    """A description's values, those of its mappings by names such as ``rules.count``."""
    values: dict[str, Any] = {}
    for name, value in description.items():
        values |= {f"{name}.{part}": one for part, one in value.items()} if isinstance(value, dict) else {name: value}
    return values
