"""What is left of a data set that another one replaces in its folder."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from dlrm.errors import DataError
from pipeline.manifest import ADOPTED, Manifest, read_manifest


def left_behind(directory: Path, manifest: Manifest) -> list[str]:
    """The files that the manifest in a folder names and a new one does not; to be asked for before it is replaced.

    Files outside the folder, or behind a link, are nobody's to remove, nor are files of an adopted set, which its
    manifest only describes. Of a manifest that cannot be read nothing is known.

    Args:
        directory: of both sets.
        manifest: the new one.

    Returns:
        Paths relative to ``directory``.
    """
    try:
        old = read_manifest(directory)
    except DataError:
        return []
    if old.layout == "parquet" or old.source.startswith(ADOPTED):
        return []
    folder = directory.resolve()
    named, wanted = (
        {(folder / file.path).resolve() for split in one.splits.values() for file in split.files}
        for one in (old, manifest)
    )
    return sorted(str(path.relative_to(folder)) for path in named - wanted if path.is_relative_to(folder))


def remove_left_behind(directory: Path, names: Iterable[str]) -> None:
    """Remove what ``left_behind`` found, and folders that held nothing else; only once the new set is complete."""
    for name in names:
        path = directory / name
        path.unlink(missing_ok=True)
        with suppress(OSError):  # the folder of the set itself, or one that holds other files
            for folder in path.relative_to(directory).parents[:-1]:
                (directory / folder).rmdir()
