"""Takes ``nvtabular_worker``'s place where NVTabular is not installed: the same request, files of the same form.

Ids, vocabulary and dense values follow NVTabular 23.8's published rules in plain Python; equal counts come in random
order. Tests with NVTabular itself hold the same expectations.
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl

NAMES = ["label", *(f"I{number}" for number in range(1, 14)), *(f"C{number}" for number in range(1, 27))]


def category_of(text: str, request: dict[str, Any]) -> str | None:
    if not text:
        return request["fill_category"]
    return text if request["modulo"] is None else f"{int(text, 16) % request['modulo']:08x}"


def dense_of(text: str, request: dict[str, Any]) -> float:
    value = float(text) if text else float(request["fill"])
    return math.log(max(value, request["floor"]) - request["floor"] + 1)


def write_vocabulary(folder: Path, name: str, categories: list[str | None], threshold: int) -> dict[str | None, int]:
    counts = Counter(categories)
    missing = counts.pop(None, 0)
    kept = [(text, count) for text, count in counts.items() if count >= threshold]
    random.shuffle(kept)
    kept.sort(key=lambda pair: -pair[1])
    columns = {name: [text for text, _ in kept], f"{name}_size": [count for _, count in kept]}
    schema = {name: pl.String, f"{name}_size": pl.Int64}
    pl.DataFrame(columns, schema=schema).write_parquet(folder / f"unique.{name}.parquet")
    unique = sum(count for _, count in kept)
    observed = [0, missing, len(categories) - missing - unique, unique]
    meta = {"kind": ["pad", "null", "oov", "unique"], "num_observed": observed}
    pl.DataFrame(meta).write_parquet(folder / f"meta.{name}.parquet")
    return {None: 1, **{text: place for place, (text, _) in enumerate(kept, 3)}}


def main() -> None:
    request = json.loads(sys.stdin.readline())
    out = Path(request["out"])
    (out / "vocabulary" / "categories").mkdir(parents=True)
    rows = {
        split: [line.split("\t") for path in paths for line in Path(path).read_text().splitlines()]
        for split, paths in request["splits"].items()
    }
    print(json.dumps({"done": 0, "steps": 1}), flush=True)
    ids = {}
    for column, name in enumerate(NAMES[14:], 14):
        categories = [category_of(row[column], request) for row in rows["train"]]
        ids[name] = write_vocabulary(out / "vocabulary" / "categories", name, categories, request["threshold"])
    for split, found in rows.items():
        folder = out / "rows" / split
        folder.mkdir(parents=True)
        columns: dict[str, list[Any]] = {"label": [int(row[0]) for row in found]}
        for column, name in enumerate(NAMES[1:], 1):
            texts = [row[column] for row in found]
            if column < 14:
                columns[name] = [dense_of(text, request) for text in texts]
            else:
                columns[name] = [ids[name].get(category_of(text, request), 2) for text in texts]
        frame = pl.DataFrame(columns)
        cut = len(found) // 3  # twelve parts, whose names sort wrongly as text
        parts = [frame[:cut], *(frame[cut + step : cut + step + 1] for step in range(10)), frame[cut + 10 :]]
        parts = [part for part in parts if part.height]
        stats = [{"file_name": f"part_{n}.parquet", "num_rows": part.height} for n, part in enumerate(parts)]
        for entry, part in zip(stats, parts, strict=True):
            part.write_parquet(folder / entry["file_name"])
        kinds = {"labels": NAMES[:1], "conts": NAMES[1:14], "cats": NAMES[14:]}
        named = {
            kind: [{"col_name": name, "index": NAMES.index(name)} for name in names] for kind, names in kinds.items()
        }
        (folder / "_metadata.json").write_text(json.dumps({"file_stats": stats, **named}))
        (folder / "schema.pbtxt").write_text("feature {\n}\n")
        listed = [str(folder / entry["file_name"]) for entry in stats]
        (folder / "_file_list.txt").write_text("\n".join([str(len(listed)), *listed]))
    print(json.dumps({"finished": "23.08.00"}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
