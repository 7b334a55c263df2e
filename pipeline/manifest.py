"""``dataset.json``: what a prepared data set holds, field by field (no NumPy, so that the service may read it).

docs/formats.md describes every field; the classes are frozen pydantic dataclasses, so that unknown fields and
wrong types are refused where a manifest is read.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from dlrm.config import CountInt, describe_validation
from dlrm.errors import DataError
from pipeline.checksums import PATTERN

MANIFEST_NAME = "dataset.json"
FORMAT_VERSION: Literal[2] = 2
"""Version 1, which is read, has ``sha256`` in place of a file's ``checksum``."""
ADOPTED = "adopted from"
"""How ``source`` begins where Raw files were there before their manifest."""

Layout = Literal["raw", "jagged", "parquet", "synthetic"]
DenseDtype = Literal["float32", "int32"]
DenseTransform = Literal["as_is", "log1p_at_read"]
KeyDtype = Literal["int32", "int64"]
LabelDtype = Literal["int32", "float32"]
Part = Literal["rows", "offsets", "keys", "weights"]

_STRICT = ConfigDict(extra="forbid")
_SPLIT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class TableInfo:
    """One categorical feature and its embedding table."""

    name: Annotated[str, Field(min_length=1)]
    rows: CountInt
    """Keys are ``0 .. rows - 1``; 0 only while a writer does not know it yet."""
    hotness: CountInt = 1
    """Key columns of a Raw row; in the jagged layout the longest bag."""
    frequency_ordered: bool = False
    """Whether a smaller key is at least as frequent in the training split as a larger one; key 0, which rare and
    unseen values may share, stands apart from the order."""


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class DenseInfo:
    """The numeric columns."""

    names: tuple[str, ...] = ()
    dtype: DenseDtype = "float32"
    transform: DenseTransform = "as_is"
    """``log1p_at_read``: log(1 + max(x, 0)), so that a missing (negative) count is 0."""

    def __post_init__(self) -> None:
        """Check that the transform goes with the type.

        Raises:
            DataError: int32 without ``log1p_at_read``, or float32 with it.
        """
        if (self.dtype == "int32") != (self.transform == "log1p_at_read"):
            raise DataError(
                f"dense.transform: {self.transform!r} does not go with dense.dtype {self.dtype!r}; "
                "float32 columns are read 'as_is' and int32 columns 'log1p_at_read'"
            )


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class FileInfo:
    """One file of a split."""

    path: Annotated[str, Field(min_length=1)]
    """Relative to the folder of ``dataset.json``, or absolute."""
    rows: CountInt
    """Samples in it."""
    bytes: CountInt
    checksum: Annotated[str, Field(pattern=PATTERN)] | None = None
    """``<algorithm>:<digits>`` (``pipeline.checksums``); ``None``: adopted without."""
    part: Part = "rows"
    """What it holds; everything but ``rows`` only in the jagged layout."""
    table: str | None = None
    """Table of a jagged ``offsets``, ``keys`` or ``weights`` file."""


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class SplitInfo:
    """One split: its samples in the order of its files."""

    rows: CountInt
    files: tuple[FileInfo, ...]


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class Ceilings:
    """What models of three kinds can reach on the test split of a synthetic set (AUC)."""

    best: float
    """The true probability."""
    best_additive: float
    """The best sum of one function per table and one of the dense columns: no interaction."""
    dense_only: float
    """The best function of the dense columns alone."""


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class Recipe:
    """What makes the rows of a synthetic set (``pipeline.generator``), beside tables and dense columns."""

    seed: Annotated[int, Field(ge=0, lt=2**63)]
    exponents: tuple[Annotated[float, Field(ge=0, le=10)], ...]
    """Of each table's power law."""


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class Manifest:
    """``dataset.json``."""

    format: Literal["crosslane-dataset"] = "crosslane-dataset"
    version: Literal[2] = FORMAT_VERSION
    name: Annotated[str, Field(min_length=1)]
    layout: Layout
    label_dtype: LabelDtype = "int32"
    """``float32``: 0.0 and 1.0, as HugeCTR's ``float_label_dense`` has them."""
    label_column: str | None = None
    """Layout ``parquet``: the label's column; the others bear the names of dense columns and tables."""
    dense: DenseInfo = Field(default_factory=DenseInfo)
    key_dtype: KeyDtype = "int32"
    weighted: bool = False
    missing_keys: bool = False
    """Whether a table of hotness 1 may hold -1 (no key) in a row."""
    tables: tuple[TableInfo, ...]
    splits: dict[str, SplitInfo]
    licence: str = ""
    source: str = ""
    notes: tuple[str, ...] = ()
    """How the values came about: transforms, thresholds, rules for missing values."""
    ceilings: Ceilings | None = None
    recipe: Recipe | None = None
    """Layout ``synthetic``: the rows, which have no files; ``raw``: what the files were written from."""

    def __post_init__(self) -> None:
        """Check what spans fields.

        Raises:
            DataError: names repeat, a table has no rows, or the files of a split do not fit the layout.
        """
        names = [table.name for table in self.tables]
        for repeated in sorted({name for name in names if names.count(name) > 1}):
            raise DataError(f"tables: name {repeated!r} appears {names.count(repeated)} times; name each table once")
        for table in self.tables:
            if table.rows < 1 or (table.rows > 2**31 and self.key_dtype == "int32"):
                raise DataError(
                    f"table {table.name!r}: {table.rows} rows; at least 1, and at most 2147483648 with "
                    f"{self.key_dtype} keys (key_dtype int64 allows more)"
                )
            if self.layout != "jagged" and not table.hotness:
                raise DataError(f"table {table.name!r}: hotness 0; Raw rows have at least one key column a table")
        if self.layout == "synthetic" and (self.recipe is None or len(self.recipe.exponents) != len(self.tables)):
            raise DataError("recipe: missing, or without an exponent for each table; layout 'synthetic' needs them")
        if self.layout == "parquet" and (
            self.label_column is None or self.weighted or self.dense.dtype != "float32" or self.label_dtype != "int32"
        ):
            raise DataError(
                "layout 'parquet' needs label_column, float32 dense columns, no weights, and labels that become int32"
            )
        if not self.tables and not self.dense.names:
            raise DataError("tables and dense.names are both empty; a data set needs at least one feature")
        for name, split in self.splits.items():
            check_split_name(name)
            _check_files(name, split, self)


def row_words(manifest: Manifest) -> int:
    """32-bit words of a row of a ``rows`` file (Parquet: once decoded): label, dense and, unless jagged, keys."""
    words = 1 + len(manifest.dense.names)
    if manifest.layout != "jagged":
        columns = sum(table.hotness for table in manifest.tables)
        words += columns * (2 if manifest.key_dtype == "int64" else 1) + columns * manifest.weighted
    return words


def unit_of(manifest: Manifest, part: str) -> tuple[int, str] | None:
    """Bytes and name of what a file of a part is a sequence of; ``None``: files in another order (Parquet)."""
    if manifest.layout == "parquet":
        return None
    keys = 8 if manifest.key_dtype == "int64" else 4
    units = {"rows": 4 * row_words(manifest), "offsets": 8, "keys": keys, "weights": 4}
    names = {"rows": "row", "offsets": "offset", "keys": "key", "weights": "weight"}
    return units[part], names[part]


def expected_bytes(manifest: Manifest, file: FileInfo) -> int | None:
    """Bytes that a file must have by its rows; ``None`` where they do not follow (Parquet; jagged keys and weights)."""
    if manifest.layout == "parquet":
        return None
    if file.part == "rows":
        return file.rows * row_words(manifest) * 4
    return (file.rows + 1) * 8 if file.part == "offsets" else None


def check_split_name(name: str) -> None:
    """Refuse names of splits that would not do as names of files.

    Raises:
        DataError: the name is empty or has characters other than letters, digits, ``_``, ``-`` and ``.``.
    """
    if not _SPLIT_NAME.fullmatch(name):
        raise DataError(f"split {name!r}: a name has letters, digits, '_', '-' and '.' only, and starts with no '.'")


def read_manifest(directory: Path) -> Manifest:
    """Read ``directory/dataset.json``.

    Raises:
        DataError: it is missing, not JSON, or a field is wrong; the message names the file.
    """
    path = directory / MANIFEST_NAME
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"data set {directory}: no readable {MANIFEST_NAME} ({error.strerror}); name the folder of a prepared "
            "data set, or prepare one with `crosslane prepare`, `data adopt` or `synth`"
        ) from None
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); prepare the data set again") from None
    if not isinstance(values, dict):
        raise DataError(f"{path}: holds {type(values).__name__}, but must hold an object; prepare the data set again")
    version = values.get("version", 1)
    if isinstance(version, bool) or version not in (1, FORMAT_VERSION):
        raise DataError(f"{path}: version {version!r}, but this release reads versions 1 and {FORMAT_VERSION}")
    try:
        return _ADAPTER.validate_python(_upgraded(values) if version == 1 else values)
    except ValidationError as error:
        raise DataError(f"{path}: " + "; ".join(describe_validation(error))) from None
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def write_manifest(directory: Path, manifest: Manifest) -> Path:
    """Write ``directory/dataset.json`` atomically: a reader sees the old one or the whole new one."""
    path = directory / MANIFEST_NAME
    temporary = path.with_name(f".{MANIFEST_NAME}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(_ADAPTER.dump_python(manifest, mode="json"), file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return path


def _upgraded(values: dict[str, Any]) -> dict[str, Any]:
    """A manifest of version 1 as one of today; what has a wrong type is left for the check of types."""

    def file_of(file: Any) -> Any:
        if not isinstance(file, dict) or "checksum" in file:
            return file
        kept = {key: value for key, value in file.items() if key != "sha256"}
        digest = file.get("sha256")
        return kept if digest is None else {**kept, "checksum": f"sha256:{digest}"}

    def split_of(split: Any) -> Any:
        files = split.get("files") if isinstance(split, dict) else None
        return {**split, "files": [file_of(file) for file in files]} if isinstance(files, list) else split

    splits = values.get("splits")
    if isinstance(splits, dict):
        values = {**values, "splits": {name: split_of(split) for name, split in splits.items()}}
    return {**values, "version": FORMAT_VERSION}


def _check_files(name: str, split: SplitInfo, manifest: Manifest) -> None:
    if manifest.layout == "synthetic":
        if split.files:
            raise DataError(f"split {name!r}: lists {len(split.files)} files, but layout 'synthetic' has none")
        return
    for file in split.files:
        expected = expected_bytes(manifest, file)
        if expected is not None and file.bytes != expected:
            raise DataError(
                f"split {name!r}: {file.path} is listed with {file.bytes} bytes, but {file.rows} rows take {expected}"
            )
    parts: list[tuple[str, str | None]] = [(file.part, file.table) for file in split.files]
    wanted: list[tuple[str, str | None]]
    if manifest.layout in ("raw", "parquet"):
        wanted = [("rows", None)] * len(parts)
    else:
        kinds = ("offsets", "keys", "weights") if manifest.weighted else ("offsets", "keys")
        wanted = [("rows", None), *((kind, table.name) for table in manifest.tables for kind in kinds)]
    if parts != wanted or not parts:
        raise DataError(
            f"split {name!r}: lists parts {parts}, but layout {manifest.layout!r} needs {wanted or 'at least one file'}"
        )
    row_files = [file.rows for file in split.files if file.part == "rows"]
    if sum(row_files) != split.rows or any(
        file.rows != split.rows for file in split.files if manifest.layout == "jagged"
    ):
        raise DataError(f"split {name!r}: {split.rows} rows, but its files hold {sum(row_files)}")


_ADAPTER: TypeAdapter[Manifest] = TypeAdapter(Manifest)
