"""Packed text as pieces of whole lines, and what is said of it where it is cut short or damaged."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import numpy as np
import pytest

from dlrm.errors import DataError
from pipeline.etl.text_blocks import pieces


def text_of(rng: np.random.Generator, lines: int) -> bytes:
    """Lines of 0 to 300 letters."""
    lengths = rng.integers(0, 301, lines)
    return b"\n".join(rng.integers(97, 123, length, np.uint8).tobytes() for length in lengths) + b"\n"


@pytest.mark.parametrize("piece_bytes", [1, 100, 5000, 1 << 20])
@pytest.mark.parametrize("ended", [False, True])
def test_pieces_of_packed_text_join_to_it(
    tmp_path: Path, rng: np.random.Generator, piece_bytes: int, ended: bool
) -> None:
    parts = [text_of(rng, 200), text_of(rng, 50) + (b"" if ended else b"the last")]
    path = tmp_path / "t.gz"
    path.write_bytes(b"".join(map(gzip.compress, parts)))  # two members, as cat makes them
    cut = list(pieces(path, piece_bytes))
    assert b"".join(piece.text.tobytes() for piece in cut) == b"".join(parts)
    assert all(piece.text[-1] == ord("\n") for piece in cut[:-1])
    assert all(len(piece.text) <= piece_bytes + 100_000 for piece in cut)
    assert sum(piece.bytes_on_disk for piece in cut) == path.stat().st_size


@pytest.mark.parametrize("piece_bytes", [1000, 1 << 20])
@pytest.mark.parametrize("kept", [5, 40_000, -9, -3])
def test_packed_text_that_is_cut_short_says_how_far_it_goes(
    tmp_path: Path, rng: np.random.Generator, piece_bytes: int, kept: int
) -> None:
    text = text_of(rng, 1000)
    path = tmp_path / "t.gz"
    path.write_bytes(gzip.compress(text)[:kept])
    parts: list[bytes] = []
    with pytest.raises(DataError, match=r"t\.gz: damaged or truncated gzip .* get the file again") as caught:
        parts.extend(piece.text.tobytes() for piece in pieces(path, piece_bytes))
    read = b"".join(parts)
    lines, length = map(int, re.findall(r"after (\d+) whole lines \((\d+) bytes of text\)", str(caught.value))[0])
    assert read == text[:length]
    assert length == 0 or read.endswith(b"\n")
    assert read.count(b"\n") == lines
    if kept < 0:  # only the checksum behind it is cut
        assert lines > 990
    elif kept > 5:
        assert 200 < lines < 900


def test_packed_text_with_a_flipped_bit_says_how_far_it_goes(tmp_path: Path, rng: np.random.Generator) -> None:
    packed = bytearray(gzip.compress(text_of(rng, 1000)))
    packed[len(packed) // 2] ^= 16
    path = tmp_path / "t.gz"
    path.write_bytes(packed)
    with pytest.raises(DataError, match=r"t\.gz: damaged or truncated gzip .* after \d+ whole lines"):
        list(pieces(path, 5000))
