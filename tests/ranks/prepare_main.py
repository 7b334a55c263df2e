"""Prepares Criteo rows in small pieces and little memory; may kill itself after so many marks.

python prepare_main.py OUT KILL_AT BUDGET TRAIN... -- LAST_DAY
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from pipeline.threads import launched_ranks, settle_threads

settle_threads()

from embedding.comm_mpi import finalize, world  # noqa: E402
from pipeline.etl import chunks, criteo, criteo_count, numbering, vocabulary  # noqa: E402
from pipeline.etl.criteo import CriteoInputs, prepare_criteo  # noqa: E402
from pipeline.etl.job import Job  # noqa: E402
from pipeline.etl.rules import Rules  # noqa: E402


def main(out: str, kill_at: int, budget: int, train: list[str], last_day: str) -> None:
    chunks.SMALLEST_CHUNK, chunks.PIECE_BYTES = 8000, 1500
    criteo_count.BATCH_BYTES = 20000
    numbering._SPREAD_FROM = 50
    vocabulary.PART_ROWS = 37
    if budget:
        criteo.table_budget = lambda *_, **__: budget  # type: ignore[assignment]
    marked = 0
    mark = Job.mark

    def counted(self: Job, name: str, values: Any) -> None:
        nonlocal marked
        marked += 1
        mark(self, name, values)
        if marked == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    Job.mark = counted  # type: ignore[method-assign]
    comm = world(launched_ranks())
    inputs = CriteoInputs(train=[Path(name) for name in train], last_day=Path(last_day))
    prepare_criteo(inputs, Path(out), rules=Rules(frequency_threshold=1), comm=comm, threads=2)
    print(f"marks {marked}", flush=True)
    comm.barrier()
    finalize()


if __name__ == "__main__":
    split = sys.argv.index("--")
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:split], sys.argv[split + 1])
