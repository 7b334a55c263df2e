"""Files being written: bytes and sums, also of blocks hashed beside the writing and of files that are let go of."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.formats import output
from pipeline.formats.output import OutputFile


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
    monkeypatch.setattr(output, "_BEHIND", 1 << 18)
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
    assert (info.bytes, info.sha256) == (len(wanted), hashlib.sha256(wanted).hexdigest())
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
