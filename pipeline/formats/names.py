"""Names of splits and days in folders of other programs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

_SPLITS = {"val": "validation", "valid": "validation", "eval": "validation"}
_DAY = re.compile(r"(?:^|_)day_?(\d+)(?:[._]|$)")


def split_name(text: str) -> str:
    """A split's name from that of a folder or file: ``val`` and ``valid`` are ``validation`` here."""
    return _SPLITS.get(text, text)


def day_order(name: str) -> int | None:
    """The number of the day in a name such as ``day_3`` or ``train_day_3_reordered.npz``, or ``None``."""
    found = _DAY.search(name)
    return int(found[1]) if found else None


def split_folders(path: Path, marks: Iterable[str]) -> dict[str, Path]:
    """Folders that hold one of the files ``marks``: the folder itself as ``train``, else its subfolders by name."""
    marks = tuple(marks)
    if not path.is_dir():
        return {}
    if any(next(path.glob(mark), None) for mark in marks):
        return {"train": path}
    inner = sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    found = {folder.name: folder for folder in inner if any(next(folder.glob(mark), None) for mark in marks)}
    order = ("train", "val", "valid", "validation", "test")
    names = sorted(found, key=lambda name: (order.index(name) if name in order else len(order), name))
    return {split_name(name): found[name] for name in names}
