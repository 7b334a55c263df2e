"""Program of one MPI rank: tables exchanged by lists of fixed capacity, against one rank."""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.threads import launched_ranks, settle_threads

settle_threads()
sys.path.insert(0, str(Path(__file__).parent))

import exchange_cases as xc  # noqa: E402
import numpy as np  # noqa: E402

from embedding.comm_mpi import world  # noqa: E402


def main() -> None:
    comm = world(launched_ranks())
    assert comm.size > 1
    for case in xc.CASES:
        if comm.size % case.nodes:
            continue
        outcome = xc.train(case, comm)
        xc.check(case, outcome, xc.run_alone(case), comm.rank, comm.size)
        assert (outcome.overflows > 0) == (case.short < 1)
        for table, _, _, replicated, arrays, _ in outcome.shards:
            if not replicated:
                continue
            for name, array in arrays.items():
                everyones = np.empty((comm.size, *array.shape), array.dtype)
                comm.all_gather(array, everyones).wait()
                assert (everyones == array).all(), f"replicas of {table}.{name} differ"
    comm.barrier()
    if comm.rank == 0:
        print(f"all exchanges hold on {comm.size} ranks")


if __name__ == "__main__":
    main()
