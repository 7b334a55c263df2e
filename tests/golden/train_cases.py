"""Trains many small runs one after the other on the ranks of one mpirun; started by ``test_golden.py``.

    python train_cases.py PLAN.json

The plan is a list of ``{"config": ..., "overrides": [...], "init": ... or null, "weights": ...}``; rank 0 exports
each run's final weights to ``weights``.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from dlrm.config import load_run_config
from pipeline.entry import Process, run_process


def work(process: Process) -> int:
    """Train every run of the plan."""
    from pipeline.trainer import Trainer
    from pipeline.weights import export_weights

    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        config = load_run_config(job["config"], job["overrides"])
        config = replace(config, run=replace(config.run, init=job["init"]))
        result = Trainer(config, comm=process.comm, threads=process.threads).run()
        if process.comm.rank == 0:
            export_weights(result.checkpoint, Path(job["weights"]))
    return 0


if __name__ == "__main__":
    sys.exit(run_process(work, debug=True))
