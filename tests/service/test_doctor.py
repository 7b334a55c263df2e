"""crosslane doctor: what it says of machines that are made up, and of this one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from dlrm.errors import LaunchError
from service.doctor import Check, as_fields, examine, exit_code
from service.launchers.mpi import Mpirun

PROBE = {name: {"found": "1.0"} for name in ("cupy", "nvrtc", "cublaslt", "nccl")}


@pytest.fixture(autouse=True)
def _launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.doctor.find_mpirun", lambda: Mpirun("mpirun", "openmpi", (5, 0)))


class Machine:
    """Answers for the programs that the doctor starts; an exception is raised."""

    def __init__(
        self, smi: str | LaunchError, probe: Any = PROBE, library: str | LaunchError = "Open MPI v5.0.11"
    ) -> None:
        self.answers = {"nvidia-smi": smi, "pipeline.gpu_probe": json.dumps(probe), "mpi4py": library}

    def __call__(self, command: Sequence[str]) -> str:
        answer = next(answer for key, answer in self.answers.items() if any(key in word for word in command))
        if isinstance(answer, LaunchError):
            raise answer
        return answer


def by_name(machine: Machine, environ: dict[str, str] | None = None) -> dict[str, Check]:
    return {check.name: check for check in examine(machine, environ or {})}


def test_without_a_gpu_nothing_is_wrong() -> None:
    missing = {name: {"error": "ModuleNotFoundError: No module named 'cupy'"} for name in PROBE}
    for smi in ("", LaunchError("nvidia-smi: [Errno 2] No such file or directory: 'nvidia-smi'")):
        checks = by_name(Machine(smi, missing))
        assert checks["GPU"].state == checks["cupy"].state == checks["rank to GPU"].state == "none"
        assert exit_code(list(checks.values()), require_gpu=False) == 0
        assert exit_code(list(checks.values()), require_gpu=True) == 4


def test_gpus_and_who_takes_which(rng: Any) -> None:
    count = int(rng.integers(1, 9))
    smi = "\n".join(f"{number}, NVIDIA H100, 580.1, 9.0, 81559 MiB" for number in range(count))
    checks = examine(Machine(smi), {})
    assert sum(check.name == "GPU" and check.state == "ok" for check in checks) == count
    mapping = next(check for check in checks if check.name == "rank to GPU")
    assert mapping.found.split(", ")[-1] == f"local rank {count - 1} on GPU {count - 1}"
    assert exit_code(checks, require_gpu=True) == 0
    named = by_name(Machine(smi), {"CUDA_VISIBLE_DEVICES": "5,3"})["rank to GPU"]
    assert named.found == "local rank 0 on GPU 5, local rank 1 on GPU 3"
    assert by_name(Machine(smi), {"CUDA_VISIBLE_DEVICES": ""})["rank to GPU"].state == "problem"
    assert len(as_fields(checks)) == len(checks)


@pytest.mark.parametrize(
    ("machine", "name", "remedy", "code"),
    [
        (Machine(LaunchError("Failed to initialize NVML: Driver/library version mismatch")), "driver", "driver", 4),
        (Machine("0, Tesla V100, 580.1, 7.0, 16384 MiB"), "GPU", "device: cpu", 4),
        (Machine("0, NVIDIA H100, 580.1, 9.0, 81559 MiB", PROBE | {"cupy": {"error": "gone"}}), "cupy", "cuda13", 4),
        (Machine("0, NVIDIA H100, 580.1, 9.0, 81559 MiB", {}), "nvrtc", "nvidia-cuda-nvrtc", 4),
        (Machine("", library=LaunchError("cannot load MPI library")), "MPI library", "MPI4PY_LIBMPI", 7),
        (Machine("", library="Open MPI v3.1.0"), "MPI", "mpirun first", 7),
    ],
)
def test_every_problem_has_a_remedy(machine: Machine, name: str, remedy: str, code: int) -> None:
    checks = examine(machine, {})
    check = next(check for check in checks if check.name == name and check.state == "problem")
    assert remedy in check.remedy
    assert exit_code(checks, require_gpu=False) == code


def test_of_this_machine() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "service.cli", "doctor", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "Traceback" not in done.stderr
    values = json.loads(done.stdout)
    assert values["exit_code"] == done.returncode
    names = {check["name"] for check in values["checks"]}
    assert {"MPI library", "MPI launcher", "nvrtc", "rank to GPU", "locked memory"} <= names
    assert all(check["remedy"] for check in values["checks"] if check["state"] == "problem")
