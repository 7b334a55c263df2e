"""``feature_spec.yaml`` of DeepLearningExamples' split binary: read, and checked part by part."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import yaml
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from dlrm.config import describe_validation
from dlrm.errors import DataError
from pipeline.formats.names import split_name

SPEC = "feature_spec.yaml"
CHUNK_TYPE = "split_binary"
CATEGORY_TYPES = ("int8", "int16", "int32")
_DENSE_TYPES = ("float16", "float32")
_LABEL_TYPES = ("bool", "int8", "uint8")


@dataclass(frozen=True, slots=True)
class Spec:
    """What ``feature_spec.yaml`` says.

    Attributes:
        path: the file.
        label: name of the label.
        dense: names of the dense columns.
        tables: names of the categories.
        dtypes: type of every column.
        cardinalities: rows of every table.
        files: for each mapping, the file of each first column.
    """

    path: Path
    label: str
    dense: list[str]
    tables: list[str]
    dtypes: dict[str, str]
    cardinalities: dict[str, int]
    files: dict[str, dict[str, Path]]


@pydantic_dataclass(frozen=True)
class Feature:
    """One column."""

    dtype: str
    cardinality: int | None = None


@pydantic_dataclass(frozen=True)
class Channels:
    """Columns by what they are for."""

    label: list[str] | None = None
    numerical: list[str] | None = None
    categorical: list[str] | None = None


@pydantic_dataclass(frozen=True)
class Chunk:
    """The file of some columns."""

    features: Annotated[list[str], Field(min_length=1)]
    files: list[str]
    type: str = CHUNK_TYPE


@pydantic_dataclass(frozen=True)
class SpecFile:
    """The parts of the file that are read; what else it holds is left alone."""

    feature_spec: dict[str, Feature]
    channel_spec: Channels
    source_spec: dict[str, list[Chunk]]


_SPEC_FILE: TypeAdapter[SpecFile] = TypeAdapter(SpecFile)


def _load(path: Path) -> SpecFile:
    """The file's values, each of its type."""
    fault = f"{path}: no feature specification as DeepLearningExamples writes it"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (yaml.YAMLError, ValueError) as error:
        raise DataError(f"{fault} (not YAML: {' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        found = "empty" if values is None else f"holds {type(values).__name__}"
        raise DataError(f"{fault} ({found}, but needs feature_spec, channel_spec and source_spec)")
    try:
        return _SPEC_FILE.validate_python(values)
    except ValidationError as error:
        raise DataError(f"{fault} ({'; '.join(describe_validation(error))})") from None


def read_spec(path: Path) -> Spec:
    """What the file at ``path`` says.

    Raises:
        DataError: it cannot be read, lacks something, or says what the format does not allow.
    """
    file = _load(path)
    channels = file.channel_spec
    labels, dense, tables = (list(names or ()) for names in (channels.label, channels.numerical, channels.categorical))
    dtypes, cardinalities = {}, {}
    for name, feature in file.feature_spec.items():
        try:
            dtypes[name] = str(np.dtype(feature.dtype))
        except (TypeError, ValueError):
            raise DataError(f"{path}: feature_spec.{name}.dtype: {feature.dtype!r}; NumPy knows no such type") from None
    for name in tables:
        known = file.feature_spec.get(name)
        if known is None or known.cardinality is None:
            raise DataError(
                f"{path}: feature_spec.{name}{'.cardinality' if known else ''}: missing; categories need it"
            )
        cardinalities[name] = known.cardinality
    files: dict[str, dict[str, Path]] = {}
    for mapping, chunks in file.source_spec.items():
        own = files[split_name(mapping)] = {}
        for chunk in chunks:
            if chunk.type != CHUNK_TYPE or len(chunk.files) != 1:
                raise DataError(f"{path}: source_spec.{mapping}: needs chunks of type {CHUNK_TYPE} with one file each")
            if chunk.features != dense and len(chunk.features) != 1:
                raise DataError(
                    f"{path}: source_spec.{mapping}: features {chunk.features} in one file; only the numerical "
                    "ones may be, in the order of channel_spec"
                )
            own[chunk.features[0]] = path.parent / chunk.files[0]
    if len(labels) != 1:
        raise DataError(f"{path}: channel_spec.label: {labels}, but there must be one")
    spec = Spec(path, labels[0], dense, tables, dtypes, cardinalities, files)
    _check_spec(spec)
    return spec


def _check_spec(spec: Spec) -> None:
    wanted = [*spec.tables, *spec.dense[:1], spec.label]
    for name, allowed in (
        (spec.label, _LABEL_TYPES),
        *((name, _DENSE_TYPES) for name in spec.dense),
        *((name, CATEGORY_TYPES) for name in spec.tables),
    ):
        if spec.dtypes.get(name) not in allowed:
            raise DataError(
                f"{spec.path}: feature {name!r} has dtype {spec.dtypes.get(name)}, but must be {' or '.join(allowed)}"
            )
    if len({spec.dtypes[name] for name in spec.dense}) > 1:
        raise DataError(f"{spec.path}: numerical features have several dtypes, but lie in one file")
    for mapping, files in spec.files.items():
        missing = [name for name in wanted if name not in files]
        if missing:
            raise DataError(f"{spec.path}: source_spec.{mapping}: no file for {', '.join(missing)}")
