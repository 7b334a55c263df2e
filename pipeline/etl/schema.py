"""The schema of ``crosslane prepare table``: which columns of a file are label, dense or categorical, and how.

Frozen pydantic dataclasses, as in ``dlrm.config``: unknown fields, wrong types and values out of range are
refused with the path of the field. docs/data.md shows examples.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from dlrm.config import Fraction, PositiveInt, describe_validation, read_config_file
from dlrm.errors import ConfigError

Name = Annotated[str, Field(min_length=1)]
Separator = Annotated[str, Field(min_length=1, max_length=1)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]

_STRICT = ConfigDict(extra="forbid")
_RULE = re.compile(r"\s*(>=|<=|==|!=|>|<)\s*(-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*")
_COMPARISONS: Mapping[str, Callable[[Any, Any], Any]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class LabelColumn:
    """What a model learns to predict."""

    column: Name
    rule: str | None = None
    """``>= 4``: 1 where the column fulfils it, 0 elsewhere. ``None``: the column holds 0 and 1."""

    def __post_init__(self) -> None:
        """Check the rule.

        Raises:
            ConfigError: it is no comparison with a number.
        """
        if self.rule is not None and not _RULE.fullmatch(self.rule):
            raise ConfigError(
                f"label.rule: {self.rule!r}, but must be a comparison (>=, >, ==, !=, <, <=) with a number"
            )

    def comparison(self) -> tuple[Callable[[Any, Any], Any], float] | None:
        """The rule as a function and the number on its right."""
        match = _RULE.fullmatch(self.rule or "")
        return (_COMPARISONS[match[1]], float(match[2])) if match else None


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class DenseColumns:
    """One numeric column, or several alike."""

    column: Name
    """A column, or all columns that a pattern with ``*`` matches, in the file's order."""
    transform: Literal["as_is", "log1p", "standardise"] = "as_is"
    """``log1p``: log(1 + max(x, 0)). ``standardise``: (x - mean) / standard deviation of the training rows."""
    missing: Literal["refuse", "mean"] | FiniteFloat = "refuse"
    """What stands for an empty, null or NaN field before the transform; ``mean``: of the training rows."""


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class MultiHot:
    """A field with any number of keys."""

    separator: str | None = None
    """Splits a text field; ``None``: the column holds lists."""
    max: PositiveInt | None = None
    """Keys kept of a row, the first ones; ``None``: as many as the longest row has."""
    weights: Name | None = None
    """Column with a factor for each key, in lists or separated likewise."""


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class TableColumns:
    """One categorical column and its embedding table, or several alike."""

    column: Name
    """A column, or all columns that a pattern with ``*`` matches, in the file's order."""
    name: Name | None = None
    """Name of the table; ``None``: the column's."""
    encoding: Literal["frequency", "identity"] = "frequency"
    """``frequency``: numbered from 1 by descending count over the training rows, 0 for unseen and rare values.
    ``identity``: the column holds keys already; an empty field or -1 is no key."""
    threshold: PositiveInt = 1
    """Values seen less often in the training rows share number 0 (``frequency`` only)."""
    rows: PositiveInt | None = None
    """Rows of the table (``identity`` only); ``None``: the largest key + 1."""
    multi_hot: MultiHot | None = None
    """``None``: one key a row."""

    def __post_init__(self) -> None:
        """Check that the fields go with the encoding and the pattern.

        Raises:
            ConfigError: they do not.
        """
        if self.rows is not None and self.encoding != "identity":
            raise ConfigError(
                f"tables ({self.column}): rows = {self.rows} goes with encoding identity only; with frequency the "
                "training rows decide"
            )
        if self.threshold != 1 and self.encoding != "frequency":
            raise ConfigError(f"tables ({self.column}): threshold goes with encoding frequency only")
        if self.name is not None and "*" in self.column:
            raise ConfigError(f"tables ({self.column}): name {self.name!r} cannot name every column of a pattern")


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class SplitRule:
    """How rows become the splits ``train``, ``validation`` and ``test``."""

    by: Literal["files", "random", "order"] = "files"
    """``files``: each split has its own. ``random``: drawn by ``seed``. ``order``: test last, validation before."""
    validation: Fraction = 0.0
    """Part of all rows."""
    test: Fraction = 0.0
    """Part of all rows."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    column: Name | None = None
    """``order``: rows sorted by this column, such as a time, ties in file order; ``None``: file order."""

    def __post_init__(self) -> None:
        """Check that the parts leave training rows and that ``by`` uses what is set.

        Raises:
            ConfigError: they leave none, or it does not.
        """
        if self.validation + self.test >= 1:
            raise ConfigError(f"split: validation {self.validation} and test {self.test} leave no training rows")
        if self.by == "files" and (self.validation or self.test):
            raise ConfigError(
                "split.by: files, but split.validation or split.test asks for a part; set random or order"
            )
        if self.column is not None and self.by != "order":
            raise ConfigError(f"split.column: {self.column!r} goes with split.by order only")


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class TableSchema:
    """Everything that ``prepare_table`` needs to know about a set of files."""

    label: LabelColumn
    name: Name = "table"
    format: Literal["csv", "parquet", "npz"] | None = None
    """``None``: by the files' suffixes (.csv, .tsv, .txt, .parquet, .npz)."""
    separator: Separator = ","
    """Between the columns of CSV files."""
    quote: Separator | None = '"'
    """Around fields of CSV files that hold separators; ``None``: nowhere."""
    header: bool = True
    """Whether CSV files start with the columns' names; else they are ``column_1``, ``column_2``, ..."""
    dense: tuple[DenseColumns, ...] = ()
    tables: tuple[TableColumns, ...] = ()
    split: SplitRule = Field(default_factory=SplitRule)
    layout: Literal["raw", "jagged"] = "raw"
    """``raw``: each multi-hot table has as many key columns as its longest row. ``jagged``: keys and offsets."""
    licence: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        """Check that there is something to learn from.

        Raises:
            ConfigError: no feature.
        """
        if not self.dense and not self.tables:
            raise ConfigError("dense and tables are both empty; a data set needs at least one feature")


_ADAPTER: TypeAdapter[TableSchema] = TypeAdapter(TableSchema)


def parse_schema(values: Mapping[str, Any]) -> TableSchema:
    """Build a schema from plain values.

    Raises:
        ConfigError: a field is unknown, missing or out of range; the message starts with its path.
    """
    try:
        return _ADAPTER.validate_python(dict(values))
    except ValidationError as error:
        known = [
            clause.replace("`crosslane config schema` lists", "docs/data.md lists")
            for clause in describe_validation(error)
        ]
        raise ConfigError("; ".join(known)) from None


def load_schema(path: Path) -> TableSchema:
    """Read a schema from a YAML or JSON file.

    Raises:
        ConfigError: the file is missing or malformed, or a field is wrong.
    """
    try:
        return parse_schema(read_config_file(path))
    except ConfigError as error:
        raise ConfigError(str(error) if str(path) in str(error) else f"schema {path}: {error}") from None
