"""Entry point of training: ``python -m pipeline.train CONFIG``, on one rank or under mpirun.

Light until the process is settled: threads and signals come before NumPy and MPI.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dlrm.config import RunConfig, load_run_config
from dlrm.errors import STOPPED
from pipeline.entry import Process, run_process
from pipeline.threads import threads_per_rank
from pipeline.waking import wake_gpu

if TYPE_CHECKING:
    from embedding.comm import Comm
    from pipeline.course import TrainResult


def train(config: RunConfig, *, comm: Comm | None = None, threads: int | None = None) -> TrainResult:
    """Train, evaluate and report (collective); the Python API.

    Args:
        config: the run.
        comm: communicator of all ranks; ``None``: this process alone.
        threads: of this rank; ``None``: its share of the cores.

    Raises:
        CrosslaneError: what is wrong with the config, the data or a checkpoint.
    """
    from embedding.comm import SingleComm
    from embedding.topology import discover

    comm, threads = comm or SingleComm(), threads_per_rank() if threads is None else threads
    wake_gpu(config, discover(comm).local_rank)

    from pipeline.dedicated import EvaluationRank, assign_roles
    from pipeline.trainer import Trainer

    if not config.eval.ranks:
        return Trainer(config, comm=comm, threads=threads).run()
    roles = assign_roles(config, comm)
    if roles.trains:
        return Trainer(config, comm=roles.own, threads=threads, roles=roles).run()
    return EvaluationRank(config, roles=roles, threads=threads).serve()


def main(config: str, *, overrides: Sequence[str] = (), init: str | None = None, debug: bool = False) -> int:
    """One rank of a training run, from its config file to its exit code.

    Args:
        config: YAML or JSON file.
        overrides: ``field.path=value`` each.
        init: weights (.npz) to start from; overrides ``run.init``.
        debug: show tracebacks.

    Returns:
        0, 75 after a graceful stop, or the exit code of the error.
    """

    def work(process: Process) -> int:
        run = load_run_config(config, overrides)
        if init is not None:
            run = replace(run, run=replace(run.run, init=init))
        process.run_directory = Path(run.run.directory)
        result = train(run, comm=process.comm, threads=process.threads)
        return STOPPED if result.reason == "stopped" else 0

    return run_process(work, debug=debug)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pipeline.train", description="Train one model.")
    parser.add_argument("config", help="YAML or JSON config")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD.PATH=VALUE", dest="overrides")
    parser.add_argument("--init", help="weights (.npz) to start from")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)


if __name__ == "__main__":
    options = _parse(sys.argv[1:])
    sys.exit(main(options.config, overrides=options.overrides, init=options.init, debug=options.debug))
