"""Program of one MPI rank: every case of the two bodies beside it."""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.threads import launched_ranks, settle_threads

settle_threads()
sys.path.insert(0, str(Path(__file__).parent))

import comm_cases  # noqa: E402
import embedding_cases  # noqa: E402
import numpy as np  # noqa: E402

from embedding.comm import SingleComm  # noqa: E402
from embedding.comm_mpi import MpiComm, world  # noqa: E402


def main() -> None:
    comm = world(launched_ranks())
    assert not isinstance(comm, SingleComm)
    comm_cases.run_all(comm)
    # The same with pieces of three elements, as buffers beyond 2^30 would be cut.
    from mpi4py import MPI

    in_pieces = MpiComm(MPI.COMM_WORLD, most_elements=3)
    for dtype in comm_cases.DTYPES:
        for collective in (comm_cases.all_to_all, comm_cases.all_to_all_v, comm_cases.all_gather):
            collective(in_pieces, dtype)
        comm_cases.all_reduce(in_pieces, dtype)
        comm_cases.broadcast(in_pieces, dtype)
    names: set[str] = set()
    for case in embedding_cases.CASES:
        names |= embedding_cases.check(case, comm).keys()
    count = np.array([len(names)], np.int64)
    comm.all_reduce(count).wait()
    assert count[0] > 0
    if comm.rank == 0:
        print(f"all cases hold on {comm.size} ranks")


if __name__ == "__main__":
    main()
