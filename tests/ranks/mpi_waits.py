"""Program of one of two MPI ranks: what a wait costs, and what it refuses."""

from __future__ import annotations

import time

import numpy as np

from dlrm.errors import CommError
from embedding.comm_mpi import world


def main() -> None:
    comm = world(2)
    comm.barrier()
    if comm.rank == 1:
        time.sleep(1.0)
    buffer = np.ones(4, np.float32)
    before = time.process_time()
    comm.all_reduce(buffer).wait()
    used = time.process_time() - before
    assert (buffer == 2).all()
    assert used < 0.5, f"waiting for a second took {used:.2f} s of a core"

    try:
        comm.all_gather(np.zeros(2, np.float16), np.zeros(4, np.float16))
    except CommError as error:
        assert "float16" in str(error)  # noqa: PT017
    else:
        raise AssertionError("float16 was sent")

    try:
        comm.all_to_all_v(np.zeros(3, np.int32), [2, 2], np.zeros(4, np.int32), [2, 2])
    except CommError as error:
        assert "buffer holds 3" in str(error)  # noqa: PT017
    else:
        raise AssertionError("more was sent than there is")
    comm.barrier()


if __name__ == "__main__":
    main()
