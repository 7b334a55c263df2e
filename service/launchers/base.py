"""What the supervisor asks of a launcher: jobs start, are found again, stop, and end with a code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Process:
    """A process that cannot be mistaken for a later one with the same id."""

    pid: int
    created: float
    """Seconds since the epoch, as the system tells it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a launcher needs to know of a job."""

    id: str
    directory: Path
    """The job's folder."""
    run_directory: Path
    """Where the engine writes; the job's folder unless the config names another one."""
    config: Path
    ranks: int
    threads: int
    """Cores of each rank."""
    gpus: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """How a job ended."""

    exit_code: int
    raw_code: int | None
    """What the starter (mpirun) returned; ``None``: it never ran."""
    stopped: bool
    """Whether it was asked to stop before it ended."""
    time: float
    error: str | None = None
    """Why it could not be started."""


class Running:
    """A job's process is there."""


@dataclass(frozen=True, slots=True)
class Vanished:
    """A job's process is gone and left no exit code."""

    reason: str


class Launcher(Protocol):
    """Starts jobs so that they outlive the service."""

    def start(self, task: Task) -> tuple[Process, int]:
        """Start a job.

        Returns:
            Its process, and the bytes that its progress file held before.

        Raises:
            LaunchError: it cannot be started.
        """

    def find(self, task: Task) -> Process | None:
        """The process of a job that was started but whose process was not noted."""

    def poll(self, task: Task, process: Process) -> Running | Exit | Vanished:
        """How a job is doing."""

    def stop(self, task: Task, process: Process) -> bool:
        """Ask a job to write a checkpoint and end; False: it is not ready to be asked, ask again."""

    def kill(self, task: Task, process: Process) -> None:
        """End every process of a job at once."""
