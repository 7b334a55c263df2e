"""Reads how often each row is looked up in all training rows, where preparation has counted it.

``pipeline.etl.statistics`` writes the file and says what is in it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from dlrm.errors import DataError
from embedding.frequency import Frequency
from pipeline.manifest import Manifest

STATISTICS = "encoding/statistics.json"


def train_digest(manifest: Manifest) -> str:
    """Stands for the training rows of a set."""
    # Without the name of SHA-256, which older sets do not give.
    files = manifest.splits["train"].files if "train" in manifest.splits else ()
    digests = [(file.checksum or "").removeprefix("sha256:") for file in files]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def read_frequencies(directory: Path, manifest: Manifest) -> dict[str, Frequency] | None:
    """Look-ups of every table's rows, by table; ``None`` where a set has none, or those of other rows.

    Args:
        directory: of the set.
        manifest: its.

    Raises:
        DataError: the file is damaged.
    """
    path = directory / STATISTICS
    try:
        values: Any = json.loads(path.read_bytes())
        if values["train"] != train_digest(manifest):
            return None
        found = {
            table["name"]: Frequency.from_steps(
                [table["lookups_of_row_0"], *table["counts"]], [1, *table["rows_of_count"]], table["rows"]
            )
            for table in values["tables"]
        }
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged ({type(error).__name__}: {error}); remove it or prepare again") from None
    rows = {table.name: table.rows for table in manifest.tables}
    return found if {name: one.rows for name, one in found.items()} == rows else None
