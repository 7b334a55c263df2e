"""A tiny program of several ranks that speaks the engine's protocol: for tests of the launcher."""

import json
import os
import signal
import sys
import time
from pathlib import Path

stopped = False


def stop(_number, _frame):
    global stopped
    stopped = True


signal.signal(signal.SIGUSR1, stop)
if os.environ.get("OMPI_COMM_WORLD_SIZE", os.environ.get("PMI_SIZE", "1")) == "1":
    signal.signal(signal.SIGTERM, stop)

from mpi4py import MPI  # noqa: E402  after the handlers, as the engine does

comm = MPI.COMM_WORLD
config = json.loads(Path(sys.argv[1]).read_text())
directory = Path(config["run"]["directory"])
(directory / f"rank{comm.rank}.pid").write_text(str(os.getpid()))
if comm.rank == 0 and config["name"] != "mute":
    with (directory / "progress.jsonl").open("a") as file:
        file.write(json.dumps({"type": "start", "time": time.time(), "safe_path": sys.flags.safe_path}) + "\n")
for step in range(1, 3000):
    if comm.rank == comm.size - 1 and config["name"] == "raise" and step == 3:
        raise ValueError("one rank fails")
    if config["name"] == "short" and step == 5:
        sys.exit(0)
    # As in the engine, the ranks agree on a stop, so that all leave at the same step.
    if comm.allreduce(int(stopped)):
        time.sleep(1.0)  # a checkpoint takes longer than Open MPI's patience with SIGTERM
        (directory / f"saved{comm.rank}").touch()
        comm.Barrier()
        sys.exit(75)
    time.sleep(0.02)
