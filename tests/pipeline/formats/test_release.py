"""Rows that have gone by give their memory back, whatever the order of an array, and can be read again."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest

from pipeline.formats.arrays import open_npy
from pipeline.formats.batch import MappedFile

SMAPS = Path("/proc/self/smaps")
AROUND = 2 << 20
"""The system maps up to a huge page around a touched page."""


def resident_bytes(path: Path) -> int:
    """How much of a file's mappings counts as this process's memory."""
    found, inside = 0, False
    for line in SMAPS.read_text().splitlines():
        if "-" in line.split(" ")[0] and not line.split(" ")[0].endswith(":"):
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


@pytest.mark.skipif(not SMAPS.exists(), reason="only Linux tells what of a mapping is resident")
def test_a_mapped_file_is_let_go_of(tmp_path: Path, rng: np.random.Generator) -> None:
    content = rng.integers(0, 256, (8 << 20) + 7, np.uint8)
    content.tofile(tmp_path / "file")
    file = MappedFile(tmp_path / "file", content.size)
    place = 0
    while place < content.size:
        size = int(rng.integers(1, 40 * mmap.PAGESIZE))
        np.testing.assert_array_equal(file.data[place : place + size], content[place : place + size])
        file.release(place, min(content.size, place + size))
        place += size
    assert resident_bytes(tmp_path / "file") <= AROUND
    np.testing.assert_array_equal(file.data, content)
    assert resident_bytes(tmp_path / "file") >= content.size


@pytest.mark.skipif(not SMAPS.exists(), reason="only Linux tells what of a mapping is resident")
@pytest.mark.parametrize("order", ["C", "F"])
def test_an_array_is_let_go_of(tmp_path: Path, rng: np.random.Generator, order: str) -> None:
    values = np.asarray(rng.integers(0, 2**31, (1_000_000, 3), np.int32), order=order)
    np.save(tmp_path / "a.npy", values)
    array = open_npy(tmp_path / "a.npy")
    for start in range(0, 1_000_000, 30_000):
        part = slice(start, min(1_000_000, start + 30_000))
        np.testing.assert_array_equal(array.values[part], values[part])
        array.release(part.start, part.stop)
    assert resident_bytes(tmp_path / "a.npy") <= AROUND
    np.testing.assert_array_equal(array.values, values)
