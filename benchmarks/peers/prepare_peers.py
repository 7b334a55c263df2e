"""The work of ``crosslane prepare criteo`` in DuckDB, Polars and plain pandas; runs under their own interpreter.

    python benchmarks/peers/prepare_peers.py ENGINE TSV OUT THRESHOLD

Categories (text to 32 bits) are numbered from 1 by descending count, equal counts by value, missing ones first; 0 is
what is rarer than THRESHOLD. Integers become log(1 + max(x, 0)), missing 0, as float32. Each engine writes what suits
it: Raw rows (pandas) or Parquet. None of them checks fields, makes checksums or can go on after a kill.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

DENSE = [f"I{number}" for number in range(1, 14)]
CATEGORIES = [f"C{number}" for number in range(1, 27)]
NAMES = ["label", *DENSE, *CATEGORIES]
_PANDAS_ROWS = 500_000


def with_duckdb(source: Path, out: Path, threshold: int) -> None:
    """Text into a table, 26 counts, one statement with 26 joins. Joins lose the order: a row's number goes with it."""
    import duckdb

    database = duckdb.connect(str(out / "stage.duckdb"))
    database.execute(f"SET temp_directory='{out}'")
    database.execute("SET preserve_insertion_order=false")
    types = {"label": "INTEGER", **dict.fromkeys(DENSE, "BIGINT"), **dict.fromkeys(CATEGORIES, "VARCHAR")}
    columns = ", ".join(f"'{name}': '{kind}'" for name, kind in types.items())
    numbers = ", ".join(f"('0x' || {name})::UINTEGER AS {name}" for name in CATEGORIES)
    database.execute(
        f"CREATE TABLE rows AS SELECT row_number() OVER () AS row, label, {', '.join(DENSE)}, {numbers} FROM "
        f"read_csv('{source}', delim='\t', header=false, quote='', columns={{{columns}}})"
    )
    for name in CATEGORIES:
        database.execute(
            f"CREATE TABLE {name}_numbers AS SELECT value, "
            "row_number() OVER (ORDER BY n DESC, value NULLS FIRST)::INTEGER AS number FROM "
            f"(SELECT {name} AS value, count(*) AS n FROM rows GROUP BY 1 HAVING n >= {threshold})"
        )
    dense = ", ".join(f"ln(1 + greatest(coalesce({name}, 0), 0))::FLOAT AS {name}" for name in DENSE)
    keys = ", ".join(f"coalesce({name}_numbers.number, 0) AS {name}" for name in CATEGORIES)
    joins = " ".join(
        f"LEFT JOIN {name}_numbers ON rows.{name} IS NOT DISTINCT FROM {name}_numbers.value" for name in CATEGORIES
    )
    database.execute(
        f"COPY (SELECT row, label, {dense}, {keys} FROM rows {joins}) TO '{out / 'rows.parquet'}' "
        "(FORMAT parquet, COMPRESSION lz4)"
    )


def with_polars(source: Path, out: Path, threshold: int) -> None:
    """Text into Parquet, 26 counts, one plan with 26 joins; all of it in the streaming engine."""
    import polars as pl

    types = {"label": pl.Int32, **dict.fromkeys(DENSE, pl.Int64), **dict.fromkeys(CATEGORIES, pl.String)}
    text = pl.scan_csv(source, separator="\t", has_header=False, schema=types, quote_char=None)
    staged = out / "stage.parquet"
    hexadecimal = pl.col(CATEGORIES).str.to_integer(base=16, dtype=pl.UInt32)
    text.with_columns(hexadecimal).sink_parquet(staged, compression="lz4")
    rows = pl.scan_parquet(staged)
    dense = pl.col(DENSE).fill_null(0).clip(lower_bound=0).cast(pl.Float64).log1p().cast(pl.Float32)
    encoded = rows.with_columns(dense)
    for name in CATEGORIES:
        counts = rows.group_by(name).len().filter(pl.col("len") >= threshold).collect(engine="streaming")
        ordered = counts.sort(["len", name], descending=[True, False], nulls_last=False).select(name)
        numbered = ordered.with_row_index("number", offset=1).with_columns(pl.col("number").cast(pl.Int32))
        encoded = (
            encoded.join(numbered.lazy(), on=name, how="left", nulls_equal=True, maintain_order="left")
            .with_columns(pl.col("number").fill_null(0).alias(name))
            .drop("number")
        )
    encoded.sink_parquet(out / "rows.parquet", compression="lz4")
    staged.unlink()


def with_pandas(source: Path, out: Path, threshold: int) -> None:
    """A script as one would write it: two passes over the file in pieces that fit into memory."""
    import numpy as np
    import pandas as pd

    def pieces() -> Any:
        types: dict[str, Any] = {
            "label": "int32",
            **dict.fromkeys(DENSE, "float64"),
            **dict.fromkeys(CATEGORIES, "str"),
        }
        return pd.read_csv(source, sep="\t", header=None, names=NAMES, dtype=types, chunksize=_PANDAS_ROWS)

    counts: dict[str, Any] = {}
    for piece in pieces():
        for name in CATEGORIES:
            found = piece[name].value_counts(dropna=False)
            counts[name] = counts[name].add(found, fill_value=0) if name in counts else found
    numbers = {}
    for name, found in counts.items():
        kept = found[found >= threshold].rename("n").rename_axis("value").reset_index()
        ordered = kept.sort_values("value", na_position="first").sort_values("n", ascending=False, kind="stable")
        numbers[name] = pd.Series(np.arange(1, len(ordered) + 1), index=ordered["value"])
    with (out / "rows.bin").open("wb") as file:
        for piece in pieces():
            words = np.empty((len(piece), 40), np.int32)
            words[:, 0] = piece["label"]
            words[:, 1:14] = np.log1p(piece[DENSE].fillna(0).clip(lower=0)).astype("float32").to_numpy().view(np.int32)
            for place, name in enumerate(CATEGORIES, 14):
                words[:, place] = piece[name].map(numbers[name]).fillna(0)
            file.write(words.data)


ENGINES = {"duckdb": with_duckdb, "polars": with_polars, "pandas": with_pandas}

if __name__ == "__main__":
    begin = time.perf_counter()
    ENGINES[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
    print(time.perf_counter() - begin)
