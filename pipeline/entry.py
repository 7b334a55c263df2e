"""How an engine process starts and ends, whoever launched it: threads, signals, errors, MPI (light imports only)."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dlrm.errors import CrosslaneError
from pipeline import stop
from pipeline.progress import ProgressWriter
from pipeline.threads import launched_ranks, settle_threads

if TYPE_CHECKING:
    from embedding.comm import Comm


class Process:
    """What the work of a process needs from outside, and what is needed to report its failure.

    Attributes:
        comm: communicator of all ranks.
        threads: threads of this rank.
        run_directory: set by the work once it knows it; an error is recorded in its ``progress.jsonl``.
    """

    def __init__(self, comm: Comm, threads: int) -> None:
        """One per process."""
        self.comm = comm
        self.threads = threads
        self.run_directory: Path | None = None


def run_process(work: Callable[[Process], int], *, debug: bool = False, stoppable: bool = True) -> int:
    """Run the work of one rank and turn whatever happens into an exit code.

    An error is one line on standard error and one progress record, with a traceback only for ``debug``. With
    more than one rank it aborts all of them: a rank that merely ended would leave the others waiting. A
    regular end, also a graceful stop, is barrier, finalize, return.

    Args:
        work: gets the process's surroundings, returns its exit code.
        debug: show tracebacks.
        stoppable: the work looks at ``pipeline.stop``; signals end work that does not as they end any program.

    Returns:
        What the work returned, or the exit code of its error (see ``dlrm.errors``).
    """
    ranks = launched_ranks()
    if stoppable:
        stop.install(single=ranks == 1)
    threads = settle_threads()
    process: Process | None = None
    try:
        from embedding.comm_mpi import finalize, world

        process = Process(world(ranks), threads)
        code = work(process)
        process.comm.barrier()
        finalize()
    except KeyboardInterrupt:
        code = 130
        _report("interrupted", "KeyboardInterrupt", code, process, debug=False)
    except CrosslaneError as error:
        code = error.exit_code
        _report(str(error), type(error).__name__, code, process, debug=debug)
    except OSError as error:
        code = 1
        name = f"{error.filename}: " if error.filename else ""
        _report(f"{name}{error.strerror or error}", type(error).__name__, code, process, debug=debug)
    except Exception as error:  # noqa: BLE001  the last stop: anything else would hang the other ranks
        code = 1
        sentence = f"internal error: {type(error).__name__}: {error} (--debug shows the traceback)"
        _report(sentence, type(error).__name__, code, process, debug=debug)
    else:
        return code
    if ranks > 1:
        time.sleep(0.2)  # mpirun's own words on the abort would run into the sentence, which goes through its pipe
        _abort(process, code)
    return code


def _report(sentence: str, kind: str, code: int, process: Process | None, *, debug: bool) -> None:
    rank = process.comm.rank if process else 0
    if rank:
        # An error that every rank meets is told once, by rank 0, whose abort ends this wait.
        time.sleep(0.5)
    if debug:
        traceback.print_exc()
    where = f"rank {rank}: " if rank and not sentence.startswith(f"rank {rank}: ") else ""
    print(f"error: {where}{sentence}", file=sys.stderr, flush=True)
    if process and process.run_directory and process.run_directory.is_dir():
        with contextlib.suppress(OSError):
            ProgressWriter(process.run_directory / "progress.jsonl").write(
                "error", error=kind, message=sentence, exit_code=code, rank=rank
            )


def _abort(process: Process | None, code: int) -> None:
    if process:
        with contextlib.suppress(CrosslaneError):
            process.comm.abort(code)
    os._exit(code)  # MPI itself is what failed; mpirun ends the other ranks
