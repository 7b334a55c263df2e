"""Files being written: bytes and sums, also of blocks hashed beside the writing and of files that are let go of."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from pipeline.formats import output
from pipeline.formats.output import WRITES_BEHIND, OutputFile
from pipeline.formats.record_files import PAGE, page_aligned


class Hesitant:
    """A stream that takes a part of what it is handed, as a system may."""

    def __init__(self, stream: Any, rng: np.random.Generator) -> None:
        self._stream, self._rng = stream, rng

    def write(self, data: memoryview) -> int:
        return int(self._stream.write(data[: int(self._rng.integers(1, len(data) + 1))]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no system that can be told to forget pages")
def test_what_is_written_is_what_is_summed(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    advised: list[tuple[int, int]] = []
    advise = os.posix_fadvise

    def note(descriptor: int, start: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_DONTNEED
        advised.append((start, start + length))
        advise(descriptor, start, length, advice)

    monkeypatch.setattr(output, "_HASHED_BESIDE", 3000)
    monkeypatch.setattr(output, "_ADVISED_BYTES", 1 << 16)
    monkeypatch.setattr(output, "CACHED_BYTES", 1 << 18)
    monkeypatch.setattr(os, "posix_fadvise", note)
    file = OutputFile(tmp_path, "train.bin", "rows", None)
    monkeypatch.setattr(file, "_stream", Hesitant(file._stream, rng))
    parts = [rng.integers(0, 2**31, int(size), np.int32) for size in rng.integers(0, 9000, 60)]
    for part in parts:
        file.write(part)
    info = file.close(60)
    file.publish()
    wanted = b"".join(part.tobytes() for part in parts)
    assert (tmp_path / "train.bin").read_bytes() == wanted
    assert (info.bytes, info.checksum) == (len(wanted), f"xxh128:{xxhash.xxh3_128_hexdigest(wanted)}")
    assert all(start > 0 and stop - start == 1 << 18 for start, stop in advised)
    assert len(advised) >= (len(wanted) - (1 << 18)) // ((1 << 16) + 4 * 9000) - 1
    assert advised == sorted(set(advised))


def test_a_full_disk_ends_the_hashing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, data: memoryview) -> int:
            raise OSError(28, "No space left on device")

    file = OutputFile(tmp_path, "train.bin", "rows", None)
    stream = file._stream
    monkeypatch.setattr(file, "_stream", Full())
    before = threading.active_count()
    with pytest.raises(OSError, match="No space left"):
        file.write(np.zeros(1 << 20, np.int32))
    assert threading.active_count() == before
    monkeypatch.setattr(file, "_stream", stream)
    file.discard()
    assert not list(tmp_path.iterdir())


def paged(rng: np.random.Generator, pages: int) -> Any:
    """Random words in whole pages, from a page's start on."""
    values = page_aligned(np.empty((pages + 1) * PAGE, np.uint8), pages * PAGE).view(np.int32)
    values[:] = rng.integers(0, 2**31, values.size, np.int32)
    return values


@pytest.mark.parametrize("fault", ["none", "flag refused", "write refused", "hesitant"])
@pytest.mark.parametrize("tail", [0, 1, 1000])
def test_direct_writes_give_the_same_file(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, fault: str, tail: int
) -> None:
    pwrite, refusals = os.pwrite, []

    def faulty(descriptor: int, data: memoryview, place: int) -> int:
        if fault == "write refused" and len(refusals) < 1:
            refusals.append(place)
            raise OSError(errno.EINVAL, "Invalid argument")
        if fault == "hesitant":  # in pages, and off them, after which the cache has to help
            size = int(rng.integers(1, len(data) + 1))
            data = data[: size if rng.random() < 0.3 else -(-size // PAGE) * PAGE]
        return pwrite(descriptor, data, place)

    monkeypatch.setattr(os, "pwrite", faulty)
    if fault == "flag refused":
        monkeypatch.setattr(output, "_pass_cache_by", lambda _, **__: False)
    file = OutputFile(tmp_path, "train.bin", "rows", None, direct=True)
    blocks = [paged(rng, int(pages)) for pages in rng.integers(1, 40, 8)]
    if tail:
        blocks += [rng.integers(0, 2**31, tail, np.int32), paged(rng, 3)]
    wanted = b"".join(block.tobytes() for block in blocks)
    for number, block in enumerate(blocks):
        file.write(block)
        if number >= WRITES_BEHIND:
            blocks[number - WRITES_BEHIND][:] = -1  # which the writer is done with
    info = file.close(1)
    file.publish()
    assert (tmp_path / "train.bin").read_bytes() == wanted
    assert (info.bytes, info.checksum) == (len(wanted), f"xxh128:{xxhash.xxh3_128_hexdigest(wanted)}")
    assert bool(refusals) == (fault == "write refused" and file_takes_direct(tmp_path))


def file_takes_direct(folder: Path) -> bool:
    with (folder / "probe").open("wb") as probe:
        return output._pass_cache_by(probe.fileno(), on=True)


def test_a_full_disk_is_told_by_a_later_direct_write(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    if not file_takes_direct(tmp_path):
        pytest.skip("the file system does not let the page cache be passed by")
    (tmp_path / "probe").unlink()
    before = threading.active_count()
    monkeypatch.setattr(os, "pwrite", full)
    file = OutputFile(tmp_path, "train.bin", "rows", None, direct=True)
    for _ in range(WRITES_BEHIND):
        file.write(paged(rng, 2))
    with pytest.raises(OSError, match="No space left"):
        file.write(paged(rng, 2))
    file.discard()
    assert threading.active_count() == before
    assert not list(tmp_path.iterdir())
