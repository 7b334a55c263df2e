"""Threads of one rank, settled before NumPy and numba load (standard library only)."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import sys
from collections.abc import Mapping

_LOCAL_RANKS = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "PMI_LOCAL_SIZE")
_SRUN_SIZE = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
_WORLD_SIZE = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_SIZE")


def launched_ranks(environ: Mapping[str, str] = os.environ) -> int:
    """Ranks that mpirun (Open MPI or MPICH) or ``srun --mpi=pmix`` says it started; 1 without them."""
    return _first_int(environ, (*_WORLD_SIZE, *(_SRUN_SIZE if _started_by_srun(environ) else ()))) or 1


def _started_by_srun(environ: Mapping[str, str]) -> bool:
    """Slurm's variables stand in a batch script, too, whose commands are no ranks: PMIx gives a rank its number."""
    return "PMIX_RANK" in environ


def threads_per_rank(environ: Mapping[str, str] = os.environ) -> int:
    """Cores of this process's affinity mask divided by the ranks on this machine, at least 1.

    ``CROSSLANE_THREADS`` overrides; under srun, cores that were asked for each task.
    """
    srun = ("SLURM_CPUS_PER_TASK",) if _started_by_srun(environ) else ()
    if chosen := _first_int(environ, ("CROSSLANE_THREADS", *srun)):
        return chosen
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    local = (*_LOCAL_RANKS, *(("SLURM_NTASKS_PER_NODE",) if srun else ()))
    return max(1, cores // (_first_int(environ, local) or 1))


def settle_threads() -> int:
    """Set the environment of BLAS and numba and load oneTBB; returns the threads per rank.

    Two pools share the cores: OpenBLAS and numba. OpenBLAS workers spin for 2^26 cycles after each product
    unless ``OPENBLAS_THREAD_TIMEOUT`` says otherwise (the exponent), and so does numba's OpenMP layer, which
    costs a third of the speed; oneTBB parks its workers. numba finds it only where it is already loaded.
    """
    threads = threads_per_rank()
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if "numba" not in sys.modules and _load_tbb():
        os.environ.setdefault("NUMBA_THREADING_LAYER", "tbb")
    return threads


def _load_tbb() -> bool:
    try:
        files = importlib.metadata.files("tbb") or []
    except importlib.metadata.PackageNotFoundError:
        return False
    for file in files:
        if file.name.startswith("libtbb.so"):
            path = file.locate()
            try:
                ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
            except OSError:
                continue
            return True
    return False


def _first_int(environ: Mapping[str, str], names: tuple[str, ...]) -> int | None:
    for name in names:
        value = environ.get(name, "")
        if value.isdigit() and int(value) > 0:
            return int(value)
    return None
