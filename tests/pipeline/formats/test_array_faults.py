"""Damaged .npy and .npz files are refused with one sentence that names file, row and byte."""

from __future__ import annotations

import struct
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from format_cases import MULTI_HOT, poke, refused

from dlrm.errors import DataError
from pipeline.convert import convert, detect
from pipeline.formats.arrays import open_npy


def npy_start(path: Path) -> int:
    return path.read_bytes().index(b"\n") + 1


_LETTERS = b"0123456789,()'{}: -L[]" + bytes([0, 92])


def damaged(header: bytes, rng: np.random.Generator) -> bytes:
    """A header with up to four places changed, most of them to what a Python expression may have there."""
    changed = bytearray(header)
    for _ in range(rng.integers(1, 5)):
        at, kind, letter = int(rng.integers(len(changed))), rng.integers(4), _LETTERS[rng.integers(len(_LETTERS))]
        if kind == 0:
            changed[at] = letter
        elif kind == 1:
            changed[at : at + 20] = bytes(int(rng.integers(1, 21)))
        elif kind == 2:
            del changed[at]
        else:
            changed.insert(at, letter)
    return bytes(changed)


def test_no_damage_to_a_header_is_more_than_a_sentence(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.zeros((100, 3), np.float32))
    good = path.read_bytes()
    kept = [good[:10] + b"{'descr': '<f4', 'fortran_order': False, 'shape': (", good[:10] + bytes(30) + good[40:]]
    for content in kept:
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"x\.npy: bad header \(byte 0\)"):
            open_npy(path)
    for _ in range(300):
        path.write_bytes(damaged(good[:128], rng) + good[128:])
        with suppress(DataError):  # what was changed may also mean the same
            assert open_npy(path).values.nbytes == 1200


def test_torchrec(converted: Any) -> None:
    folder = converted("torchrec-npy")
    dense, sparse, labels = (folder / f"train_{part}.npy" for part in ("dense", "sparse", "labels"))
    starts = {path: npy_start(path) for path in (dense, sparse, labels)}
    for path, byte, content, message in (
        (labels, 28, struct.pack("<i", 3), rf"train_labels\.npy: row 7 \(byte {starts[labels] + 28}\): label 3"),
        (
            dense,
            88,
            struct.pack("<f", np.inf),
            rf"train_dense\.npy: row 7 \(byte {starts[dense] + 88}\): dense column 'd1'",
        ),
        (
            sparse,
            116,
            struct.pack("<i", 100),
            rf"train_sparse\.npy: row 7 \(byte {starts[sparse] + 116}\): key 100 .*'T1'",
        ),
        (sparse, 116, struct.pack("<i", -7), rf"row 7 \(byte {starts[sparse] + 116}\): key -7 of table 'T1'"),
        (sparse, 116, struct.pack(">i", 99), r"key 1660944384 of table 'T1' .*big-endian"),
    ):
        good = path.read_bytes()
        poke(path, starts[path] + byte, content)
        refused("torchrec-npy", folder, message)
        path.write_bytes(good)
    good = sparse.read_bytes()
    for content, message in (
        (good[:-1], rf"train_sparse\.npy: truncated, {len(good) - 1} bytes where .* \(row 49, byte {len(good) - 1}\)"),
        (good + b"\0", rf"train_sparse\.npy: oversized, {len(good) + 1} bytes where .* \(row 50, byte {len(good)}\)"),
        (b"PNG" + good[3:], r"train_sparse\.npy: bad header \(byte 0\)"),
        (good[:20], r"train_sparse\.npy: bad header \(byte 0\)"),
        (good.replace(b"<i4", b">i4", 1), r"train_sparse\.npy: values of type >i4 are big-endian"),
        (good.replace(b"<i4", b"<f4", 1), r"train_sparse\.npy: array of float32 \[50, 4\], but must be of kind i "),
        (good.replace(b"(50, 4)", b"(40, 5)", 1), r"array of int32 \[40, 5\], but must be .* shape \[50, any\]"),
    ):
        sparse.write_bytes(content)
        refused("torchrec-npy", folder, message)
    sparse.unlink()
    refused("torchrec-npy", folder, r"train_sparse_multi_hot\.npz")


def test_torchrec_multi_hot(converted: Any) -> None:
    folder = converted("torchrec-npy", shape=MULTI_HOT)
    path = folder / "train_sparse_multi_hot.npz"
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("2.npy").header_offset
    start = member + 30 + len("2.npy")
    good = path.read_bytes()
    start += good[start:].index(b"\n") + 1
    poke(path, start + 4 * (7 * 5 + 3), b"\xff\xff\xff\x7f")
    message = rf"\(Bad CRC-32 for file '2\.npy', which starts at byte {member}\)"
    refused("torchrec-npy", folder, rf"multi_hot\.npz: damaged or truncated .npz {message}")
    end = start + 4 * (7 * 5 + 3) + 1
    path.write_bytes(good[:end])
    message = rf"multi_hot\.npz: damaged or truncated .*; it ends at byte {end}, in row 7 of array '2'\)"
    refused("torchrec-npy", folder, message)
    path.write_bytes(good + b"more")
    refused("torchrec-npy", folder, rf"multi_hot\.npz: oversized, {len(good) + 4} bytes .* ends at byte {len(good)}")


def test_facebook(prepared: Any, tmp_path: Path) -> None:
    convert(prepared(dense_dtype="int32", least=0), tmp_path / "out", to="facebook-npz")
    (tmp_path / "out" / "test.npz").unlink()
    path = tmp_path / "out" / "train.npz"
    good = dict(np.load(path).items())

    def changed(name: str, index: Any, value: Any, dtype: str = "<i4") -> None:
        array = good[name].astype(dtype)
        array[index] = value
        np.savez(path, **{**good, name: array})

    start = 128  # of a .npy file whose header is short
    for name, index, value, dtype, message in (
        ("y", 7, 2, "<i4", rf"train\.npz: y: row 7 \(byte {start + 28}\): label 2 is neither"),
        ("X_int", (7, 1), -1, "<i4", rf"train\.npz: X_int: row 7 \(byte {start + 88}\): count -1 is negative"),
        ("X_int", (7, 1), 0.5, "<f8", rf"X_int: row 7 \(byte {start + 176}\): 0.5 is no whole number"),
        ("X_int", (7, 1), np.nan, "<f8", r"X_int: row 7 .*: nan is no whole number"),
        ("X_int", (7, 1), 2**31, "<i8", rf"X_int: row 7 \(byte {start + 176}\): 2147483648 is no whole number of 32"),
        ("X_cat", (7, 1), 100, "<i4", rf"X_cat: row 7 \(byte {start + 116}\): key 100 of table 'T1' lies outside"),
        ("X_cat", (7, 1), 5, ">i4", r"X_cat: values of type >i4 are big-endian"),
    ):
        changed(name, index, value, dtype)
        refused("facebook-npz", tmp_path / "out", message)
    np.savez(path, X_int=good["X_int"], X_cat=good["X_cat"][:-1], y=good["y"])
    refused("facebook-npz", tmp_path / "out", r"X_cat: array of int32 \[49, 4\], but must be .* \[50, any\]")
    np.savez(path, X_int=good["X_int"], y=good["y"])
    refused("facebook-npz", tmp_path / "out", r"no \.npz file with X_int, X_cat and y")
    np.savez_compressed(path, **good)
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("X_cat.npy")
    poke(path, info.header_offset + 30 + len("X_cat.npy") + 20 + info.compress_size // 2, b"\x55\xaa\x55\xaa")
    refused("facebook-npz", tmp_path / "out", r"train\.npz: (damaged or truncated .npz|X_cat: bad header)")


NPZ = {
    "X_int": np.arange(60, dtype=np.int32).reshape(20, 3),
    "X_cat": np.arange(80, dtype=np.int32).reshape(20, 4) % 9,
    "y": np.arange(20, dtype=np.int32) % 2,
}


def test_npz_that_is_cut_short_names_array_row_and_byte(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "day_1.npz"
    np.savez(path, **NPZ)
    good = path.read_bytes()
    for name, array in NPZ.items():
        row = int(rng.integers(0, 20))
        start = good.index(b"\x93NUMPY", good.index(f"{name}.npy".encode())) + 128  # behind the header
        end = start + row * array.strides[0] + 3
        path.write_bytes(good[:end])
        message = (
            rf"day_1\.npz: damaged or truncated \.npz \(.*; it ends at byte {end}, in row {row} of array '{name}'\)"
        )
        refused("facebook-npz", tmp_path, message)
        refused("facebook-npz", path, message)
    directory = good.index(b"PK\x01\x02")
    path.write_bytes(good[: directory + 20])
    refused(
        "facebook-npz", path, rf"day_1\.npz: .*; behind array 'y' \(byte {directory}\) something is missing or wrong"
    )
    for content in (b"", b"PNG" + good[3:directory]):
        path.write_bytes(content)
        refused("facebook-npz", path, r"day_1\.npz: damaged or truncated .*bad header at byte 0")
    path.write_bytes(good + b"\0")
    message = rf"day_1\.npz: oversized, {len(good) + 1} bytes where its directory ends at byte {len(good)}"
    refused("facebook-npz", path, message)

    np.savez_compressed(path, **NPZ)
    good = path.read_bytes()
    end = good.index(b"y.npy") - 35
    path.write_bytes(good[:end])
    refused("facebook-npz", path, rf"day_1\.npz: .*; it ends at byte {end}, in array 'X_cat'\)")


def test_a_damaged_day_is_not_left_out(tmp_path: Path) -> None:
    """The rows of the others alone would look like a whole set."""
    path = tmp_path / "day_1.npz"
    np.savez(path, **NPZ)
    (tmp_path / "day_0.npz").write_bytes(path.read_bytes())
    path.write_bytes(path.read_bytes()[:500])
    assert detect(tmp_path).name == "facebook-npz"
    with pytest.raises(DataError, match=r"day_1\.npz: damaged or truncated"):
        convert(tmp_path, tmp_path.with_name("out"), to="raw")
    assert not tmp_path.with_name("out").exists()
