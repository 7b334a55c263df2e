"""NVTabular's own workflow over Criteo's rows; a script for the interpreter of ``crosslane env nvtabular``.

Nothing of Crosslane is imported here, and nothing of this file elsewhere: the two environments cannot be one. The
request is one line of JSON on standard input, progress and the result are lines of JSON on standard output. When
standard input ends, the process does too: whoever started it is gone.

Request: ``splits`` (name: files; ``train`` is what is counted), ``out`` (absolute folder), ``threshold``, ``modulo``
(or null), ``fill_category`` (or null), ``floor``, ``fill``, ``block_bytes``, ``scheduler`` (address or null).
"""

from __future__ import annotations

import csv
import json
import os
import sys
import threading
from typing import Any

DENSE = [f"I{number}" for number in range(1, 14)]
CATEGORIES = [f"C{number}" for number in range(1, 27)]
NAMES = ["label", *DENSE, *CATEGORIES]


def read_rows(paths: list[str], block_bytes: int) -> Any:
    """The rows of plain text files as a Dask frame, a partition a block, in order; categories stay text."""
    import dask.dataframe as dd

    types = {"label": "int64", **dict.fromkeys(DENSE, "float64"), **dict.fromkeys(CATEGORIES, "object")}
    return dd.read_csv(
        paths,
        sep="\t",
        header=None,
        names=NAMES,
        dtype=types,
        blocksize=block_bytes,
        quoting=csv.QUOTE_NONE,
        keep_default_na=False,
        na_values=[""],
    )


def make_workflow(request: dict[str, Any]) -> Any:
    """FillMissing, Clip and LogOp of the dense columns, Categorify of the categories."""
    import numpy as np
    import nvtabular as nvt
    from nvtabular import ops

    class Log64(ops.LogOp):  # type: ignore[misc]  # it is not there where types are checked
        """LogOp in 64 bits: rounded to 32 once, values are those of Crosslane's engine."""

        @property
        def output_dtype(self) -> Any:
            """What values are cast to before the logarithm."""
            return np.float64

    floor, modulo = request["floor"], request["modulo"]
    dense = DENSE >> ops.FillMissing(request["fill"]) >> ops.Clip(min_value=floor)
    if floor:
        dense = dense >> ops.LambdaOp(lambda column: column - floor)
    dense = dense >> Log64()
    categories: Any = CATEGORIES
    if request["fill_category"] is not None:
        categories = categories >> ops.FillMissing(request["fill_category"])
    if modulo is not None:
        categories = categories >> ops.LambdaOp(
            lambda column: column.map(lambda text: f"{int(text, 16) % modulo:08x}", na_action="ignore")
        )
    # An absolute path: NVTabular joins it with others by plain text.
    folder = os.path.join(request["out"], "vocabulary")  # noqa: PTH118
    categories = categories >> ops.Categorify(freq_threshold=request["threshold"], out_path=folder)
    return nvt.Workflow(["label"] + dense + categories)  # noqa: RUF005  nodes, which cannot be unpacked


def tell(**values: Any) -> None:
    """One line to whoever started this."""
    print(json.dumps(values), flush=True)


def end_with_parent() -> None:
    """Wait for the end of standard input."""
    while sys.stdin.readline():
        pass
    os._exit(1)


def main() -> None:
    """Fit on the training rows, transform all splits to Parquet: a folder each, a file a partition."""
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=end_with_parent, daemon=True).start()
    import nvtabular as nvt

    if request["scheduler"]:
        from distributed import Client

        Client(request["scheduler"])  # NVTabular finds the one that the process has
    splits = {name: read_rows(paths, request["block_bytes"]) for name, paths in request["splits"].items()}
    steps = len(splits) + 1
    datasets = {name: nvt.Dataset(rows, cpu=True) for name, rows in splits.items()}
    workflow = make_workflow(request)
    tell(done=0, steps=steps)
    workflow.fit(datasets["train"])
    tell(done=1, steps=steps)
    for number, (name, rows) in enumerate(splits.items(), 2):
        workflow.transform(datasets[name]).to_parquet(
            os.path.join(request["out"], "rows", name),  # noqa: PTH118
            output_files=rows.npartitions,
            cats=CATEGORIES,
            conts=DENSE,
            labels=["label"],
        )
        tell(done=number, steps=steps)
    tell(finished=nvt.__version__)
    os._exit(0)  # the thread that reads standard input still waits


if __name__ == "__main__":
    main()
