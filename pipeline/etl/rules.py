"""What becomes of Criteo's values: thresholds, caps, transforms, missing values.

The defaults are those of facebookresearch/dlrm for Kaggle's set but for the threshold. ``docs/data.md`` says which
published preparation is which combination.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, get_args

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from dlrm.config import describe_validation
from dlrm.errors import ConfigError, DataError

DenseTransform = Literal["clip_log1p", "add2_log1p", "add3_log"]
MissingCategory = Literal["own", "zero", "rare"]
Counting = Literal["train", "all"]

# Transform: (floor, what a missing integer counts as). All three are log(1 + max(x, floor) - floor).
_CONVENTIONS: dict[str, tuple[int, int]] = {"clip_log1p": (0, 0), "add2_log1p": (-2, -2), "add3_log": (-2, 0)}
LARGEST_INTEGER = 10**18 - 1
_NUM_VALUES = 2**32


@dataclass(frozen=True, slots=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Rules:
    """How values are encoded; the same for rows that come later."""

    frequency_threshold: Annotated[int, Field(ge=1)] = 2
    """Categories seen less often in the counted rows share number 0."""
    count: Counting = "train"
    """Whose categories are counted and numbered: the training rows', or those of every split (facebookresearch/dlrm:
    MLPerf's row counts are those of all 24 days)."""
    cap_modulo: Annotated[int, Field(ge=1, le=_NUM_VALUES)] | None = None
    """Values are taken modulo this before they are counted (MLPerf DLRM: 40,000,000)."""
    cap_rows: Annotated[int, Field(ge=1)] | None = None
    """Rows of a table at most, number 0 included: the most frequent categories stay."""
    dense_transform: DenseTransform = "clip_log1p"
    """``clip_log1p``: log(1 + max(x, 0)), missing 0 (facebookresearch/dlrm); ``add2_log1p``: log(1 + (x + 2)),
    missing -2, so 0 after it (NVIDIA DeepLearningExamples); ``add3_log``: log(x + 3), missing 0 (TorchRec)."""
    missing_integer: Annotated[int, Field(ge=-LARGEST_INTEGER, le=LARGEST_INTEGER)] | None = None
    """What an empty integer counts as before the transform; ``None``: as the transform's convention has it."""
    missing_category: MissingCategory = "own"
    """``own``: a category like any other; ``zero``: the value 00000000 (facebookresearch/dlrm); ``rare``: number 0."""

    @property
    def dense_floor(self) -> int:
        """Smaller integers count as this one; the dense value is log(1 + max(x, floor) - floor)."""
        return _CONVENTIONS[self.dense_transform][0]

    @property
    def dense_fill(self) -> int:
        """What a missing integer counts as."""
        return _CONVENTIONS[self.dense_transform][1] if self.missing_integer is None else self.missing_integer

    def notes(self) -> tuple[str, ...]:
        """The rules in words, for the manifest."""
        formulas = {
            "clip_log1p": "log(1 + max(x, 0))",
            "add2_log1p": "log(1 + (x + 2)), x at least -2",
            "add3_log": "log(x + 3), x at least -2",
        }
        filled = math.log1p(max(self.dense_fill, self.dense_floor) - self.dense_floor)
        threshold = self.frequency_threshold
        rare = f"seen fewer than {threshold} times" if threshold > 1 else "never seen"
        where = "in the training rows" if self.count == "train" else "in the rows of all splits"
        notes = [
            f"dense: {formulas[self.dense_transform]} as float32; {filled:.6g} where missing",
            f"categories: numbered from 1 by descending count {where}, equal counts by value",
            f"category 0: {rare} {where}",
        ]
        if self.cap_modulo is not None:
            notes.append(f"categories: value modulo {self.cap_modulo}, then counted")
        if self.cap_rows is not None:
            notes.append(f"tables: the {self.cap_rows} most frequent rows, category 0 among them")
        notes.append(
            {
                "own": "a missing category is a value like any other",
                "zero": "a missing category is the value 00000000",
                "rare": "a missing category is category 0",
            }[self.missing_category]
        )
        return tuple(notes)


_ADAPTER: TypeAdapter[Rules] = TypeAdapter(Rules)


def make_rules(**options: Any) -> Rules:
    """Rules from options.

    Raises:
        ConfigError: one is out of range.
    """
    try:
        return Rules(**options)
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0]).replace("_", " ")
        value = options.get(str(error.errors()[0]["loc"][0]))
        choices = {
            "dense transform": get_args(DenseTransform),
            "missing category": get_args(MissingCategory),
            "count": get_args(Counting),
        }
        wanted = " or ".join(choices[name]) if name in choices else error.errors()[0]["msg"].lower()
        raise ConfigError(f"{name}: {value}, but {wanted.replace('input ', 'it ')}") from None


def rules_to_values(rules: Rules) -> dict[str, Any]:
    """The rules as JSON values."""
    values: dict[str, Any] = _ADAPTER.dump_python(rules, mode="json")
    return values


def rules_from_values(values: Any, where: str) -> Rules:
    """The rules from JSON values.

    Args:
        values: of ``rules_to_values``.
        where: the file, for the error.

    Raises:
        DataError: a field is wrong.
    """
    try:
        return _ADAPTER.validate_python(values)
    except ValidationError as error:
        raise DataError(f"{where}: rules: " + "; ".join(describe_validation(error))) from None
