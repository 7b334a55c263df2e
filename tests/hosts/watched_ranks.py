"""Program of one rank that exchanges for ever under a heartbeat; rank 0 writes a file with each step's number.

Each node's first rank records why it ends, as ``lost.<node>`` beside that file.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.threads import launched_ranks, settle_threads

settle_threads()

import numpy as np  # noqa: E402

from embedding.comm_mpi import world  # noqa: E402
from embedding.heartbeat import Heartbeat  # noqa: E402
from embedding.topology import discover  # noqa: E402


def main() -> None:
    steps = Path(sys.argv[1])
    comm = world(launched_ranks())
    topology = discover(comm)
    last_words = steps.with_name(f"lost.{topology.node}")
    with Heartbeat(comm, topology, on_lost=lambda sentence: last_words.write_text(sentence) and None):
        step = 0
        while True:
            comm.all_reduce(np.ones(1000, np.float32)).wait()
            step += 1
            if comm.rank == 0:
                steps.write_text(str(step))


if __name__ == "__main__":
    main()
