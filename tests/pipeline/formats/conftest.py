"""Prepared sets of random rows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.convert import convert
from pipeline.formats.interchange import WriteOptions
from pipeline.manifest import TableInfo
from pipeline.writer import DatasetWriter

sys.path.insert(0, str(Path(__file__).parent))  # for format_cases

from format_cases import ONE_HOT


@pytest.fixture
def prepared(tmp_path: Path, rng: np.random.Generator) -> Callable[..., Path]:
    """Writes a prepared set of random rows; returns its folder."""

    def write(
        name: str = "source",
        *,
        shape: Sequence[tuple[int, int]] = ONE_HOT,
        dense_dtype: str = "float32",
        missing: bool = False,
        weighted: bool = False,
        num_dense: int = 3,
        rows: int = 50,
        least: int = -5,
        **options: Any,
    ) -> Path:
        tables = [
            TableInfo(name=f"T{t}", rows=count, hotness=hotness, frequency_ordered=t == 1)
            for t, (count, hotness) in enumerate(shape)
        ]
        folder = tmp_path / name
        names = [f"d{n}" for n in range(num_dense)]
        with DatasetWriter(
            folder,
            name=name,
            dense_names=names,
            tables=tables,
            dense_dtype=dense_dtype,
            weighted=weighted,
            **options,
        ) as writer:
            for split, count in (("train", rows), ("test", rows // 2 + 1)):
                keys = np.concatenate(
                    [rng.integers(-1 if missing else 0, limit, (count, hotness)) for limit, hotness in shape], axis=1
                )
                dense = rng.normal(size=(count, num_dense)).astype(np.float32)
                if dense_dtype == "int32":
                    dense = rng.integers(least, 2**31 - 1, (count, num_dense))
                weights = rng.normal(size=keys.shape).astype(np.float32) if weighted else None
                writer.write(split, rng.integers(0, 2, count), dense, keys, weights)
            writer.finish(licence="CC0", notes=["made up"])
        return folder

    return write


@pytest.fixture
def converted(prepared: Any, tmp_path: Path) -> Callable[..., Path]:
    """A folder of one format, its split ``train`` with 50 rows."""

    def make(name: str, *, write: WriteOptions | None = None, **options: Any) -> Path:
        source = prepared(**options)
        losses = frozenset({"fp16-dense"} if name == "split-binary" else ())
        convert(source, tmp_path / "out", to=name, write=write, allow=losses)  # type: ignore[arg-type]
        return tmp_path / "out"

    return make
