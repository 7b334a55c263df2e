"""Damaged .npy and .npz files are refused with one sentence that names file, row and byte."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from format_cases import MULTI_HOT, poke, refused

from pipeline.convert import convert


def npy_start(path: Path) -> int:
    return path.read_bytes().index(b"\n") + 1


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
    path.write_bytes(good[: len(good) // 2])
    refused("torchrec-npy", folder, r"multi_hot\.npz")


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
