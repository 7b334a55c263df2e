"""HugeCTR's file lists: the number of files in the first line, then their paths, one a line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dlrm.errors import DataError

_LONGEST = 1 << 24
_LONGEST_ECHO = 40


def looks_like_list(path: Path) -> bool:
    """Whether a file starts with a line that holds nothing but a number."""
    try:
        with path.open("rb") as file:
            return file.readline(20).strip().isdigit()
    except OSError:
        return False


def read_file_list(path: Path) -> list[Path]:
    """The files of a list; a path that is not there as it stands is looked for beside the list.

    Raises:
        DataError: it is malformed, or its number is not that of its files.
    """
    try:
        if path.stat().st_size > _LONGEST:
            raise DataError(f"{path}: {path.stat().st_size} bytes are no file list")
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: no readable file list ({error})") from None
    names = [line.strip() for line in lines[1:] if line.strip()]
    if not lines or not lines[0].strip().isdigit():
        found = lines[0] if lines else ""
        shown = f"{found!r}" if len(found) <= _LONGEST_ECHO else f"{found[:_LONGEST_ECHO]!r} and more"
        raise DataError(f"{path}: line 1: {shown}, but a file list starts with the number of files")
    if int(lines[0]) != len(names):
        raise DataError(f"{path}: line 1 says {lines[0].strip()} files, but {len(names)} follow; correct the list")
    return [_found(path.parent, name) for name in names]


def _found(folder: Path, name: str) -> Path:
    for candidate in (folder / name, Path(name), folder / Path(name).name):
        if candidate.is_file():
            return candidate
    return folder / name


def write_file_list(path: Path, names: Sequence[str]) -> None:
    """Write a list."""
    path.write_text("".join(f"{line}\n" for line in (len(names), *names)), encoding="utf-8")
