"""What is evaluated, and by whom: a section of a run's config."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from dlrm.config_embedding import STRICT, CountInt, PositiveInt, Text


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class EvalConfig:
    """What is evaluated."""

    split: Text = "validation"
    """Split that evaluations during training look at, and that stopping rules decide by."""
    final_split: Text | None = "test"
    """Split of the closing evaluation and the report; ``None`` or absent from the data: ``split``."""
    batch_size: PositiveInt = 16_384
    """Rows of a global evaluation batch."""
    cache: bool = True
    """Keep the split in memory after its first pass, where it takes no more than a quarter of what is free."""
    ranks: CountInt = 0
    """Of the run's ranks the last so many evaluate and do not train: they hold the tables once more and get what
    changed since the last evaluation, while the others go on. 0: all train, and all evaluate."""
