"""Raw and jagged files put together byte by byte from docs/formats.md are read as meant, and written the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from format_cases import bytes_of, read_rows, schema_of, write_block

from pipeline.dataset import load_dataset
from pipeline.formats.block import make_block

RAW_COUNTS = bytes_of("""
    01 00 00 00                # label
    05 00 00 00  ff ff ff ff   # two counts, the second missing
    02 00 00 00  07 00 00 00   # C1, C2
    00 00 00 00
    00 00 00 00  ff ff ff 7f
    00 00 00 00  08 00 00 00
""")
RAW_FLOATS = bytes_of("""
    00 00 80 3f                                        # label 1.0 (float_label_dense)
    00 00 00 3f  00 00 20 c0                           # 0.5, -2.5
    02 00 00 00 00 00 00 00                            # C1
    07 00 00 00 00 00 00 00  05 00 00 00 01 00 00 00   # C2: 7 and 2^32 + 5
""")


def test_raw_of_hugectr(tmp_path: Path) -> None:
    schema = schema_of("int32", 2, (3, 1), (9, 1))
    block = make_block(np.array([1, 0]), np.array([[5, -1], [0, 2**31 - 1]]), np.array([[2, 7], [0, 8]]))
    write_block("raw", tmp_path / "counts", schema, block)
    assert (tmp_path / "counts" / "train.bin").read_bytes() == RAW_COUNTS
    batch = load_dataset(tmp_path / "counts").split("train").read(slice(None))
    np.testing.assert_allclose(batch.dense, np.log([[6, 1], [1, 2.0**31]]), rtol=1e-7)
    assert read_rows(tmp_path / "counts").bags == [[[2], [7]], [[0], [8]]]

    schema = schema_of("float32", 2, (3, 1), (2**33, 2), key_dtype="int64")
    block = make_block(np.array([1]), np.array([[0.5, -2.5]]), np.array([[2, 7, 2**32 + 5]]))
    write_block("raw", tmp_path / "floats", schema, block, label_dtype="float32")
    assert (tmp_path / "floats" / "train.bin").read_bytes() == RAW_FLOATS
    found = read_rows(tmp_path / "floats")
    assert (found.labels, found.dense.tolist(), found.bags) == ([1], [[0.5, -2.5]], [[[2], [7, 2**32 + 5]]])


JAGGED = {
    "rows.bin": bytes_of("""
        01 00 00 00  00 00 00 3f  00 00 20 c0   # label 1, dense 0.5 and -2.5
        00 00 00 00  00 00 00 00  00 00 80 3f   # label 0, dense 0.0 and 1.0
        01 00 00 00  00 00 80 bf  00 00 00 00   # label 1, dense -1.0 and 0.0
    """),
    # Table C1: bags [7, 7, 2^32 + 5], [], [8]
    "000.offsets.bin": bytes_of("""
        00 00 00 00 00 00 00 00  03 00 00 00 00 00 00 00  03 00 00 00 00 00 00 00  04 00 00 00 00 00 00 00
    """),
    "000.keys.bin": bytes_of("""
        07 00 00 00 00 00 00 00  07 00 00 00 00 00 00 00  05 00 00 00 01 00 00 00   # row 0: a key may stand twice
        08 00 00 00 00 00 00 00                                                     # row 2
    """),
    "000.weights.bin": bytes_of("00 00 00 3f  00 00 80 3e  00 00 80 bf  00 00 00 40"),  # 0.5, 0.25, -1; 2
    # Table C2: bags [2], [0], [1]
    "001.offsets.bin": bytes_of("""
        00 00 00 00 00 00 00 00  01 00 00 00 00 00 00 00  02 00 00 00 00 00 00 00  03 00 00 00 00 00 00 00
    """),
    "001.keys.bin": bytes_of("""
        02 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00  01 00 00 00 00 00 00 00
    """),
    "001.weights.bin": bytes_of("00 00 80 3f  00 00 80 3f  00 00 00 00"),
}


def jagged_manifest() -> str:
    """By hand, without the fields that have a default."""
    parts = [("rows", None), *((part, table) for table in ("C1", "C2") for part in ("offsets", "keys", "weights"))]
    files = [
        {"path": f"train/{name}", "rows": 3, "bytes": len(JAGGED[name]), "part": part, "table": table}
        for name, (part, table) in zip(JAGGED, parts, strict=True)
    ]
    return json.dumps(
        {
            "format": "crosslane-dataset",
            "version": 1,
            "name": "by hand",
            "layout": "jagged",
            "dense": {"names": ["I1", "I2"], "dtype": "float32", "transform": "as_is"},
            "key_dtype": "int64",
            "weighted": True,
            "tables": [
                {"name": "C1", "rows": 2**33, "hotness": 3},
                {"name": "C2", "rows": 3, "hotness": 1},
            ],
            "splits": {"train": {"rows": 3, "files": files}},
        }
    )


def test_jagged(tmp_path: Path) -> None:
    (tmp_path / "set" / "train").mkdir(parents=True)
    (tmp_path / "set" / "dataset.json").write_text(jagged_manifest())
    for name, content in JAGGED.items():
        (tmp_path / "set" / "train" / name).write_bytes(content)
    batch = load_dataset(tmp_path / "set").split("train").read(np.array([2, 0]))
    assert (batch.labels.tolist(), batch.dense.tolist()) == ([1, 1], [[-1, 0], [0.5, -2.5]])
    assert batch.keys.keys.tolist() == [8, 7, 7, 2**32 + 5, 1, 2]
    assert batch.keys.offsets is not None
    assert batch.keys.weights is not None
    assert batch.keys.offsets.tolist() == [0, 1, 4, 5, 6]
    assert batch.keys.weights.tolist() == [2, 0.5, 0.25, -1, 0, 1]
    found = read_rows(tmp_path / "set")
    assert found.labels == [1, 0, 1]
    assert found.bags == [
        [[(7, 0.5), (7, 0.25), (2**32 + 5, -1)], [(2, 1)]],
        [[], [(0, 1)]],
        [[(8, 2)], [(1, 0)]],
    ]

    schema = schema_of("float32", 2, (2**33, 3), (3, 1), key_dtype="int64", weighted=True, missing_keys=True)
    keys = np.array([[7, 7, 2**32 + 5, 2], [-1, -1, -1, 0], [8, -1, -1, 1]])
    weights = np.array([[0.5, 0.25, -1, 1], [0, 0, 0, 1], [2, 0, 0, 0]], np.float32)
    dense = np.array([[0.5, -2.5], [0, 1], [-1, 0]], np.float32)
    write_block("jagged", tmp_path / "written", schema, make_block(np.array([1, 0, 1]), dense, keys, weights))
    names = {path.name: path.read_bytes() for path in (tmp_path / "written" / "train").iterdir()}
    assert names == JAGGED
