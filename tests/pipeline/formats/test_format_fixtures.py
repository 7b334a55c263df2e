"""Files put together byte by byte from each format's published description are read as meant, and written the same."""

from __future__ import annotations

import json
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import yaml
from format_cases import bytes_of, read_rows, schema_of, write_block

from pipeline.convert import convert, detect, format_named
from pipeline.dataset import load_dataset
from pipeline.formats.block import MISSING_COUNT, make_block
from pipeline.formats.interchange import ReadOptions

LINE = (
    "1\t5\t\t-1\t0\t2147483647\t7\t\t\t3\t1\t\t0\t12\t"
    "68fd1e64\t80e26c9b\tffffffff\t\t00000000" + "\t0000000a" * 20 + "\t\n"
)


def test_criteo_text(tmp_path: Path) -> None:
    (tmp_path / "day_0").write_text(LINE)
    found = read_rows(tmp_path)
    assert found.labels == [1]
    missing = MISSING_COUNT
    assert found.dense.tolist() == [[5, missing, -1, 0, 2**31 - 1, 7, missing, missing, 3, 1, missing, 0, 12]]
    assert found.bags == [[[0x68FD1E64], [0x80E26C9B], [0xFFFFFFFF], [], [0], *[[10]] * 20, []]]
    convert(tmp_path / "day_0", tmp_path / "raw", to="raw")
    convert(tmp_path / "raw", tmp_path / "back", to="criteo-tsv")
    assert (tmp_path / "back" / "train.tsv").read_text() == LINE


NORM_HEADER = """
    {check} 00 00 00 00 00 00 00   # error_check
    02 00 00 00 00 00 00 00   # number_of_records
    01 00 00 00 00 00 00 00   # label_dim
    01 00 00 00 00 00 00 00   # dense_dim
    02 00 00 00 00 00 00 00   # slot_num
    00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00
"""
NORM_SAMPLES = (
    """
    00 00 80 3f  00 00 00 3f                # label 1.0, dense 0.5
    02 00 00 00  01 00 00 00  02 00 00 00   # slot 0: keys 1 and 2
    01 00 00 00  fe ff ff ff                # slot 1: key 2^32 - 2, unsigned
    """,
    """
    00 00 00 00  00 00 80 bf                # label 0.0, dense -1.0
    00 00 00 00                             # slot 0: none
    01 00 00 00  03 00 00 00                # slot 1: key 3
    """,
)
NORM_ROWS = ([1, 0], [[0.5], [-1.0]], [[[1, 2], [2**32 - 2]], [[], [3]]])


def framed(body: bytes) -> bytes:
    """Length, content, and the sum of its bytes, spelled out."""
    total = 0
    for byte in body:
        total = (total + byte) & 0xFF
    return struct.pack("<i", len(body)) + body + bytes([total])


def norm_file(*, check_sum: bool) -> bytes:
    parts = [bytes_of(NORM_HEADER.format(check="01" if check_sum else "00")), *map(bytes_of, NORM_SAMPLES)]
    assert [len(part) for part in parts] == [64, 28, 20]
    return b"".join(framed(part) for part in parts) if check_sum else b"".join(parts)


def test_norm_of_hugectr(tmp_path: Path) -> None:
    for check_sum in (False, True):
        folder = tmp_path / f"sum-{check_sum}"
        folder.mkdir()
        (folder / "file_list.txt").write_text("1\n./norm/0.data\n")
        (folder / "0.data").write_bytes(norm_file(check_sum=check_sum))
        assert detect(folder).name == "norm"
        found = read_rows(folder)
        assert (found.labels, found.dense.tolist(), found.bags) == NORM_ROWS
        assert detect(folder).read(folder, ReadOptions()).schema.key_dtype == "int32"

        schema = schema_of("float32", 1, (3, 2), (2**32 - 1, 1), missing_keys=True)
        keys = np.array([[1, 2, 2**32 - 2], [-1, -1, 3]])
        block = make_block(np.array([1, 0]), np.array([[0.5], [-1.0]]), keys)
        written = tmp_path / f"written-{check_sum}"
        write_block("norm", written, schema, block, check_sum=check_sum, offset_keys=False)
        assert (written / "train" / "0.data").read_bytes() == norm_file(check_sum=check_sum)
        assert (written / "train" / "file_list.txt").read_text() == "1\n0.data\n"


def test_norm_with_keys_of_8_bytes_that_are_raised_by_the_tables_before(tmp_path: Path) -> None:
    body = bytes_of(
        NORM_HEADER.format(check="00").replace("02 00 00 00 00 00 00 00   # number", "01" + " 00" * 7 + " #")
    )
    body += bytes_of("""
        00 00 80 3f  00 00 00 3f
        01 00 00 00  02 00 00 00 00 00 00 00   # slot 0: key 2 of 3
        01 00 00 00  08 00 00 00 00 00 00 00   # slot 1: key 5, raised by 3
    """)
    (tmp_path / "list").write_text("1\ndata\n")
    (tmp_path / "data").write_bytes(body)
    found = read_rows(tmp_path / "list", table_rows=(3, 9), offset_keys=True)
    assert found.bags == [[[2], [5]]]
    schema = schema_of("float32", 1, (3, 1), (9, 1), key_dtype="int64", offset_keys=True)
    block = make_block(np.array([1]), np.array([[0.5]]), np.array([[2, 5]]))
    write_block("norm", tmp_path / "written", schema, block)
    assert (tmp_path / "written" / "train" / "0.data").read_bytes() == body


FEATURE_SPEC = """
feature_spec:
  num_0: {dtype: float16}
  num_1: {dtype: float16}
  cat_0.bin: {dtype: int8, cardinality: 100}
  cat_1.bin: {dtype: int16, cardinality: 127}
  cat_2.bin: {dtype: int32, cardinality: 40000}
  label: {dtype: bool}
channel_spec:
  categorical: [cat_0.bin, cat_1.bin, cat_2.bin]
  numerical: [num_0, num_1]
  label: [label]
source_spec:
  train:
    - {type: split_binary, features: [num_0, num_1], files: [train/numerical.bin]}
    - {type: split_binary, features: [label], files: [train/label.bin]}
    - {type: split_binary, features: [cat_0.bin], files: [train/cat_0.bin]}
    - {type: split_binary, features: [cat_1.bin], files: [train/cat_1.bin]}
    - {type: split_binary, features: [cat_2.bin], files: [train/cat_2.bin]}
metadata: {}
"""
SPLIT_BINARY = {
    "label.bin": bytes_of("01 00"),
    "numerical.bin": bytes_of("00 38  00 c1   00 00  ff 7b"),  # 0.5, -2.5; 0, 65504
    "cat_0.bin": bytes_of("63 00"),  # 99, 0
    "cat_1.bin": bytes_of("7e 00  01 00"),  # 126, 1
    "cat_2.bin": bytes_of("3f 9c 00 00  00 01 00 00"),  # 39999, 256
}


def test_split_binary_of_deeplearningexamples(tmp_path: Path) -> None:
    (tmp_path / "set" / "train").mkdir(parents=True)
    (tmp_path / "set" / "feature_spec.yaml").write_text(FEATURE_SPEC)
    for name, content in SPLIT_BINARY.items():
        (tmp_path / "set" / "train" / name).write_bytes(content)
    found = read_rows(tmp_path / "set")
    assert (found.labels, found.dense.tolist()) == ([1, 0], [[0.5, -2.5], [0, 65504]])
    assert found.bags == [[[99], [126], [39999]], [[0], [1], [256]]]

    source = format_named("split-binary").read(tmp_path / "set", ReadOptions())
    write_block("split-binary", tmp_path / "written", source.schema, next(iter(source.blocks("train"))))
    for name, content in SPLIT_BINARY.items():
        assert (tmp_path / "written" / "train" / name).read_bytes() == content, name
    ours, theirs = (yaml.safe_load((tmp_path / one / "feature_spec.yaml").read_text()) for one in ("written", "set"))
    assert sorted(ours["source_spec"]["train"], key=str) == sorted(theirs["source_spec"]["train"], key=str)
    assert all(ours[part] == theirs[part] for part in ("feature_spec", "channel_spec", "metadata"))


def npy_file(descr: str, shape: str, body: bytes) -> bytes:
    """A .npy file of version 1.0: its header ends with a line end at a multiple of 64 bytes."""
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
    # NumPy leaves room for a number of rows of 21 digits.
    text += " " * (21 - len(shape.strip("(").split(",")[0]))
    text += " " * (-(10 + len(text) + 1) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + body


DENSE_NPY = npy_file("<f4", "(2, 2)", bytes_of("00 00 00 3f  00 00 20 c0   00 00 00 00  00 00 80 3f"))
SPARSE_NPY = npy_file(
    "<i4", "(2, 3)", bytes_of("02 00 00 00 07 00 00 00 01 00 00 00  00 00 00 00 08 00 00 00 00 00 00 00")
)
LABELS_NPY = npy_file("<i4", "(2, 1)", bytes_of("01 00 00 00  00 00 00 00"))


def test_npy_triple_of_torchrec(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for part, content in (("dense", DENSE_NPY), ("sparse", SPARSE_NPY), ("labels", LABELS_NPY)):
        (tmp_path / "set" / f"day_0_{part}.npy").write_bytes(content)
    found = read_rows(tmp_path / "set")
    assert (found.labels, found.dense.tolist()) == ([1, 0], [[0.5, -2.5], [0, 1]])
    assert found.bags == [[[2], [7], [1]], [[0], [8], [0]]]
    convert(tmp_path / "set", tmp_path / "raw", to="raw")
    convert(tmp_path / "raw", tmp_path / "back", to="torchrec-npy")
    for part, content in (("dense", DENSE_NPY), ("sparse", SPARSE_NPY), ("labels", LABELS_NPY)):
        assert (tmp_path / "back" / f"train_{part}.npy").read_bytes() == content


def zip_file(members: dict[str, bytes]) -> bytes:
    """A .zip file of stored members, by APPNOTE 4.3."""
    body, directory = b"", b""
    for name, content in members.items():
        sizes = struct.pack("<IIIHH", zlib.crc32(content), len(content), len(content), len(name), 0)
        start = struct.pack("<HHHHH", 20, 0, 0, 0, 0x21) + sizes
        directory += b"PK\x01\x02" + struct.pack("<H", 20) + start
        directory += struct.pack("<HHHII", 0, 0, 0, 0, len(body)) + name.encode()
        body += b"PK\x03\x04" + start + name.encode() + content
    ending = struct.pack("<HHHHIIH", 0, 0, len(members), len(members), len(directory), len(body), 0)
    return body + directory + b"PK\x05\x06" + ending


NPZ = {
    "X_int.npy": npy_file("<i4", "(2, 2)", bytes_of("05 00 00 00 00 00 00 00  01 00 00 00 ff ff ff 7f")),
    "X_cat.npy": SPARSE_NPY,
    "y.npy": npy_file("<i4", "(2,)", bytes_of("01 00 00 00  00 00 00 00")),
    "counts.npy": npy_file("<i4", "(3,)", bytes_of("03 00 00 00  0a 00 00 00  02 00 00 00")),
}


MULTI_HOT = {
    "0.npy": npy_file("<i4", "(2, 2)", bytes_of("02 00 00 00 01 00 00 00  00 00 00 00 02 00 00 00")),
    "1.npy": npy_file("<i4", "(2, 1)", bytes_of("07 00 00 00  ff ff 00 00")),
    "2.npy": npy_file(
        "<i4",
        "(2, 3)",
        bytes_of("""
        00 00 00 00 00 00 00 00 01 00 00 00   # a key may stand twice
        03 00 00 00 02 00 00 00 01 00 00 00
    """),
    ),
}


def test_multi_hot_npz_of_torchrec(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "day_0_dense.npy").write_bytes(DENSE_NPY)
    (tmp_path / "set" / "day_0_labels.npy").write_bytes(LABELS_NPY)
    (tmp_path / "set" / "day_0_sparse_multi_hot.npz").write_bytes(zip_file(MULTI_HOT))
    assert detect(tmp_path / "set").name == "torchrec-npy"
    found = read_rows(tmp_path / "set")
    assert (found.labels, found.dense.tolist()) == ([1, 0], [[0.5, -2.5], [0, 1]])
    assert found.bags == [[[2, 1], [7], [0, 0, 1]], [[0, 2], [65535], [3, 2, 1]]]
    convert(tmp_path / "set", tmp_path / "raw", to="raw")
    tables = load_dataset(tmp_path / "raw").tables
    assert [(table.rows, table.hotness) for table in tables] == [(3, 2), (65536, 1), (4, 3)]
    convert(tmp_path / "raw", tmp_path / "back", to="torchrec-npy")
    with zipfile.ZipFile(tmp_path / "back" / "train_sparse_multi_hot.npz") as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == MULTI_HOT
    assert (tmp_path / "back" / "train_dense.npy").read_bytes() == DENSE_NPY


def test_npz_of_facebookresearch(tmp_path: Path) -> None:
    (tmp_path / "kaggle_processed.npz").write_bytes(zip_file(NPZ))
    found = read_rows(tmp_path / "kaggle_processed.npz")
    assert (found.labels, found.dense.tolist()) == ([1, 0], [[5, 0], [1, 2**31 - 1]])
    assert found.bags == [[[2], [7], [1]], [[0], [8], [0]]]
    convert(tmp_path / "kaggle_processed.npz", tmp_path / "raw", to="raw")
    assert [table.rows for table in load_dataset(tmp_path / "raw").tables] == [3, 10, 2]
    convert(tmp_path / "raw", tmp_path / "back", to="facebook-npz")
    with zipfile.ZipFile(tmp_path / "back" / "train.npz") as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == NPZ


def test_npz_as_its_own_shuffle_writes_it(tmp_path: Path) -> None:
    """``*_reordered.npz``: compressed, float64, and columns after one another where they were transposed."""
    keys = np.array([[2.0, 7, 1], [0, 8, 0]])
    np.savez_compressed(
        tmp_path / "train_day_1_reordered.npz",
        X_cat=np.asfortranarray(keys),
        X_int=np.array([[5.0], [6]]),
        y=np.ones(2),
    )
    np.savez_compressed(
        tmp_path / "train_day_0_reordered.npz", X_cat=keys[::-1], X_int=np.array([[7.0], [8]]), y=np.zeros(2)
    )
    found = read_rows(tmp_path)
    assert (found.labels, found.dense.tolist()) == ([0, 0, 1, 1], [[7], [8], [5], [6]])
    assert found.bags == [[[0], [8], [0]], [[2], [7], [1]], [[2], [7], [1]], [[0], [8], [0]]]


class Compact:
    """Thrift's compact protocol, as far as a Parquet footer needs it."""

    @staticmethod
    def varint(value: int) -> bytes:
        out = b""
        while value > 127:
            out, value = out + bytes([value & 127 | 128]), value >> 7
        return out + bytes([value])

    @classmethod
    def integer(cls, value: int) -> bytes:
        return cls.varint(value << 1)  # zigzag of what is not negative

    @classmethod
    def text(cls, value: str) -> bytes:
        return cls.varint(len(value)) + value.encode()

    @classmethod
    def sequence(cls, kind: int, items: list[bytes]) -> bytes:
        return bytes([len(items) << 4 | kind]) + b"".join(items)

    @staticmethod
    def struct(*fields: tuple[int, int, bytes]) -> bytes:
        """Fields as (number, kind, content), in order; kinds: 5 i32, 6 i64, 8 binary, 9 list, 12 struct."""
        out, last = b"", 0
        for number, kind, content in fields:
            out, last = out + bytes([(number - last) << 4 | kind]) + content, number
        return out + b"\x00"


def parquet_file(rows: int, columns: list[tuple[str, int, bytes, int, bool]]) -> bytes:
    """A Parquet file of one row group: columns as (name, physical type, page, values, whether it is a list).

    Pages are PLAIN and uncompressed, by the parquet-format specification.
    """
    c = Compact
    body, chunks = b"PAR1", []
    schema = [c.struct((4, 8, c.text("schema")), (5, 5, c.integer(len(columns))))]
    for name, kind, page, values, is_list in columns:
        path = [name, "list", "element"] if is_list else [name]
        if is_list:  # <name> (required LIST) > list (repeated) > element (required)
            schema.append(
                c.struct((3, 5, c.integer(0)), (4, 8, c.text(name)), (5, 5, c.integer(1)), (6, 5, c.integer(3)))
            )
            schema.append(c.struct((3, 5, c.integer(2)), (4, 8, c.text("list")), (5, 5, c.integer(1))))
        schema.append(c.struct((1, 5, c.integer(kind)), (3, 5, c.integer(0)), (4, 8, c.text(path[-1]))))
        data = c.struct((1, 5, c.integer(values)), (2, 5, c.integer(0)), (3, 5, c.integer(3)), (4, 5, c.integer(3)))
        size = c.integer(len(page))
        header = c.struct((1, 5, c.integer(0)), (2, 5, size), (3, 5, size), (5, 12, data))
        whole = c.integer(len(header) + len(page))
        meta = c.struct(
            (1, 5, c.integer(kind)),
            (2, 9, c.sequence(5, [c.integer(0), c.integer(3)])),
            (3, 9, c.sequence(8, [c.text(part) for part in path])),
            (4, 5, c.integer(0)),
            (5, 6, c.integer(values)),
            (6, 6, whole),
            (7, 6, whole),
            (9, 6, c.integer(len(body))),
        )
        chunks.append(c.struct((2, 6, c.integer(len(body))), (3, 12, meta)))
        body += header + page
    group = c.struct((1, 9, c.sequence(12, chunks)), (2, 6, c.integer(len(body) - 4)), (3, 6, c.integer(rows)))
    footer = c.struct(
        (1, 5, c.integer(1)),
        (2, 9, c.sequence(12, schema)),
        (3, 6, c.integer(rows)),
        (4, 9, c.sequence(12, [group])),
    )
    return body + footer + struct.pack("<I", len(footer)) + b"PAR1"


LIST_PAGE = bytes_of("""
    06 00 00 00  02 00  02 01  02 00     # repetition levels, runs of one: 0, 1, 0
    02 00 00 00  06 01                   # definition levels, a run of three: 1
    07 00 00 00 00 00 00 00  05 00 00 00 01 00 00 00  08 00 00 00 00 00 00 00
""")
PARQUET = parquet_file(
    2,
    [
        ("C2", 2, LIST_PAGE, 3, True),  # [7, 2^32 + 5], [8]
        ("label", 4, bytes_of("00 00 80 3f  00 00 00 00"), 2, False),
        ("I1", 4, bytes_of("00 00 00 3f  00 00 20 c0"), 2, False),
        ("C1", 2, bytes_of("02 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00"), 2, False),
    ],
)


def test_parquet_of_hugectr(tmp_path: Path) -> None:
    (tmp_path / "_file_list.txt").write_text("1\n./parquet_data/train/file0.parquet\n")
    (tmp_path / "file0.parquet").write_bytes(PARQUET)
    metadata = {
        "file_stats": [{"file_name": "file0.parquet", "num_rows": 2}],
        "cats": [{"col_name": "C1", "index": 3}, {"col_name": "C2", "index": 0}],
        "conts": [{"col_name": "I1", "index": 2}],
        "labels": [{"col_name": "label", "index": 1}],
    }
    (tmp_path / "_metadata.json").write_text(json.dumps(metadata))
    for path in (tmp_path, tmp_path / "_file_list.txt", tmp_path / "file0.parquet"):
        assert detect(path).name == "parquet"
        found = read_rows(path)
        assert (found.labels, found.dense.tolist()) == ([1, 0], [[0.5], [-2.5]])
        assert found.bags == [[[2], [7, 2**32 + 5]], [[0], [8]]]
    convert(tmp_path / "_file_list.txt", tmp_path.with_name("written"), to="parquet")
    written = tmp_path.with_name("written") / "train"
    assert (written / "_file_list.txt").read_text() == "1\n0.parquet\n"
    assert json.loads((written / "_metadata.json").read_text()) == {
        "file_stats": [{"file_name": "0.parquet", "num_rows": 2}],
        "cats": [{"col_name": "C1", "index": 2}, {"col_name": "C2", "index": 3}],
        "conts": [{"col_name": "I1", "index": 1}],
        "labels": [{"col_name": "label", "index": 0}],
    }
    assert read_rows(written.parent).bags == found.bags


def test_parquet_without_metadata_tells_its_columns_by_their_types(tmp_path: Path) -> None:
    (tmp_path / "file0.parquet").write_bytes(PARQUET)
    found = read_rows(tmp_path / "file0.parquet")
    assert found.bags == [[[7, 2**32 + 5], [2]], [[8], [0]]]  # in the order of the file
