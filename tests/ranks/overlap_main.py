"""Program of one MPI rank: overlapped runs of every depth against the sequential one, to the bit.

python overlap_main.py DATASET FOLDER PLACEMENT...
"""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.threads import launched_ranks, settle_threads

settle_threads()

import numpy as np  # noqa: E402

from dlrm.config import parse_run_config  # noqa: E402
from embedding.comm_mpi import world  # noqa: E402
from pipeline.checkpoint import open_checkpoint  # noqa: E402
from pipeline.trainer import Trainer  # noqa: E402

HYBRID = {name: {"placement": "hybrid", "threshold": rows} for name, rows in (("user", 7), ("item", 100))}
PLACEMENTS = {
    "table_wise": {"placement": "table_wise"},
    "hybrid": {"placement": "row_wise", "deduplicate": True, "tables": HYBRID},
    "replicated": {"placement": "replicated"},
    "hierarchical": {"placement": "row_wise", "all_to_all": "hierarchical"},
}


def main() -> None:
    data, folder, *placements = sys.argv[1:]
    comm = world(launched_ranks())
    assert comm.size > 1

    def outcome(placement, name, overlap, depth):
        directory = f"{folder}/{placement}-{name}"
        values = {
            "deterministic": True,  # nothing is measured, so that the plan is the same
            "data": {"path": data, "batch_size": 33},
            "model": {"embedding_dim": 8, "bottom_mlp": [16, 8], "top_mlp": [16, 1]},
            "optimizer": {"kind": "adagrad", "lr": 0.02},
            "embedding": PLACEMENTS[placement],
            "train": {"epochs": 1, "eval_every": 5},
            "eval": {"batch_size": 31},
            "overlap": {"train": overlap, "eval": overlap, "depth": depth},
            "run": {"directory": directory},
        }
        result = Trainer(parse_run_config(values), comm=comm, threads=1).run()
        checkpoint = open_checkpoint(max((Path(directory) / "checkpoints").glob("step-*")))
        metrics = {name: result.report.get(name) for name in ("auc", "log_loss", "samples")}
        return {name: checkpoint.read(name) for name in checkpoint.names}, metrics

    for placement in placements:
        expected, metrics = outcome(placement, "sequential", False, 1)
        for depth in range(1, 5):
            tensors, overlapped_metrics = outcome(placement, f"depth-{depth}", "always", depth)
            assert metrics == overlapped_metrics
            assert tensors.keys() == expected.keys()
            for name, tensor in tensors.items():
                assert np.isfinite(tensor).all()
                np.testing.assert_array_equal(tensor, expected[name], err_msg=f"{placement}, depth {depth}: {name}")
    comm.barrier()
    if comm.rank == 0:
        print(f"every depth equals the sequential run on {comm.size} ranks")


if __name__ == "__main__":
    main()
