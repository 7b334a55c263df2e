"""Jobs: their states, the transitions between them, and what may enter the queue."""

from __future__ import annotations

import dataclasses
import enum
import os
import secrets
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dlrm.config import RunConfig, parse_run_config, to_values
from dlrm.errors import STOPPED, ConfigError, DataError
from service.settings import Settings


class JobState(enum.StrEnum):
    """Where a job is in its life."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    LOST = "lost"
    """Its processes are gone and how it ended is not known."""

    def is_terminal(self) -> bool:
        """Whether the job has ended."""
        return not TRANSITIONS[self]


TRANSITIONS: Mapping[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.CANCELLED}),
    JobState.RUNNING: frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.LOST}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
    JobState.LOST: frozenset(),
}
"""What may follow what; the store refuses everything else."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One job as the store keeps it; times are seconds since the epoch."""

    number: int
    """Place in the order of submission."""
    id: str
    name: str
    state: JobState
    config: dict[str, Any]
    """The whole run config, as the engine gets it."""
    ranks: int
    threads_per_rank: int
    gpus: int
    directory: str
    """The job's folder."""
    run_directory: str
    created_at: float
    gpu_ids: list[str] = dataclasses.field(default_factory=list)
    reason: str | None = None
    started_at: float | None = None
    finished_at: float | None = None
    cancel_at: float | None = None
    """When it was asked to end."""
    cancel_reason: str | None = None
    pid: int | None = None
    pid_created: float | None = None
    progress_start: int = 0
    """Bytes of ``progress.jsonl`` from before this job."""
    exit_code: int | None = None
    error: str | None = None

    @property
    def cores(self) -> int:
        """Cores that it occupies."""
        return self.ranks * self.threads_per_rank


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The state in which a job ends."""

    state: JobState
    reason: str


def outcome(exit_code: int, *, cancel_reason: str | None, own_error: bool) -> Outcome:
    """Read the end of a job from its exit code.

    Args:
        exit_code: the engine's.
        cancel_reason: why it was asked to end; ``None``: it was not.
        own_error: the engine reported an error of its own, which a stop does not excuse.
    """
    if exit_code == 0:
        return Outcome(state=JobState.SUCCEEDED, reason="finished")
    if exit_code == STOPPED:
        why = cancel_reason or "stopped from outside the service"
        return Outcome(state=JobState.CANCELLED, reason=f"{why}; a checkpoint was written")
    if cancel_reason is not None and not own_error:
        return Outcome(state=JobState.CANCELLED, reason=f"{cancel_reason}; ended without a checkpoint")
    return Outcome(state=JobState.FAILED, reason=f"exit code {exit_code}")


def admit(
    values: Mapping[str, Any],
    settings: Settings,
    *,
    dataset: str | None,
    ranks: int,
    threads_per_rank: int,
    gpus: int,
    name: str | None,
) -> dict[str, Any]:
    """Check a request and fill in what the service decides.

    Args:
        values: fields of ``RunConfig``; ``data.path`` may be missing where ``dataset`` is given.
        settings: the service's.
        dataset: name of a data set in the service's folder, or an absolute path; goes before ``data.path``.
        ranks: MPI ranks.
        threads_per_rank: cores of each rank.
        gpus: GPUs of the job.
        name: shown in lists; ``None``: the config's.

    Returns:
        Columns of a new row of the store.

    Raises:
        ConfigError: a field is wrong, or the job can never fit this machine.
        DataError: the data set or the initial weights are not there.
    """
    config = parse_run_config(_with_choices(values, dataset=dataset, name=name))
    _check_fit(config, settings, ranks=ranks, threads_per_rank=threads_per_rank, gpus=gpus)
    path = resolve_dataset(config.data.path, settings)
    if config.run.init is not None and not _is_file(Path(config.run.init)):
        raise DataError(f"run.init: no file {config.run.init} on the service's machine; name it by its whole path")
    job_id = secrets.token_hex(5)
    directory = settings.jobs / job_id
    # A relative folder is the submitter's, not the service's: such a run writes into the job's folder.
    wanted = Path(config.run.directory)
    # Its real name, since one folder takes one job at a time, however it is spelled.
    run_directory = Path(os.path.realpath(wanted)) if wanted.is_absolute() else directory
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, path=str(path)),
        run=dataclasses.replace(config.run, directory=str(run_directory)),
    )
    return {
        "id": job_id,
        "name": config.name,
        "config": to_values(config),
        "ranks": ranks,
        "threads_per_rank": threads_per_rank,
        "gpus": gpus,
        "directory": str(directory),
        "run_directory": str(run_directory),
        "created_at": time.time(),
    }


def resolve_dataset(text: str, settings: Settings) -> Path:
    """The folder of a prepared data set.

    Args:
        text: an absolute path, or a name below the service's data folder.
        settings: the service's.

    Raises:
        DataError: there is no prepared data set.
    """
    path = Path(text)
    if not path.is_absolute():
        if ".." in path.parts:
            raise DataError(f"data.path: {text!r} leads out of the service's data folder; name an absolute path")
        path = settings.data / path
    if not _is_file(path / "dataset.json"):
        raise DataError(
            f"data.path: no prepared data set in {path} (it has no dataset.json); prepare it there, or name another"
        )
    return path


def free_cores(running: Iterable[Job], settings: Settings) -> int:
    """Cores that no running job occupies."""
    return settings.cores - sum(job.cores for job in running)


def free_gpus(running: Iterable[Job], settings: Settings) -> list[str]:
    """GPUs that no running job was given."""
    taken = {gpu for job in running for gpu in job.gpu_ids}
    return [gpu for gpu in settings.gpus if gpu not in taken]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, a folder that is not ours to look into
        return False


def _with_choices(values: Mapping[str, Any], *, dataset: str | None, name: str | None) -> dict[str, Any]:
    """The config's fields with those of the request that go before them."""
    merged = dict(values) if name is None else {**values, "name": name}
    if dataset is None:
        return merged
    data = merged.get("data", {})
    if not isinstance(data, dict):
        return merged  # the parser says what is wrong with it
    return {**merged, "data": {**data, "path": dataset}}


def _check_fit(config: RunConfig, settings: Settings, *, ranks: int, threads_per_rank: int, gpus: int) -> None:
    needed = ranks * threads_per_rank
    if needed > settings.cores:
        raise ConfigError(
            f"ranks: {ranks} with {threads_per_rank} thread(s) each need {needed} cores, but the service has "
            f"{settings.cores}; ask for fewer"
        )
    if gpus > len(settings.gpus):
        raise ConfigError(f"gpus: {gpus}, but the service has {len(settings.gpus)}; ask for fewer")
    _check_device(config, ranks=ranks, gpus=gpus)
    if config.data.batch_size < ranks:
        raise ConfigError(
            f"data.batch_size: {config.data.batch_size} rows are fewer than the {ranks} ranks; "
            "raise it or ask for fewer ranks"
        )


def _check_device(config: RunConfig, *, ranks: int, gpus: int) -> None:
    """A job sees the GPUs that it asked for and no others: ``device: auto`` takes the CPU where it asked for none."""
    half = sorted({config.precision, config.table_precision} & {"fp16", "bf16"})
    if gpus and (config.device == "cpu" or config.precision == "fp64"):
        why = "device is cpu" if config.device == "cpu" else "precision fp64 runs on CPUs alone"
        raise ConfigError(f"gpus: {gpus}, but {why}; ask for 0, or change the config")
    if not gpus and (config.device == "cuda" or half):
        why = "device is cuda" if config.device == "cuda" else f"precision {half[0]} needs a GPU"
        raise ConfigError(f"gpus: 0, but {why}; ask for one for each of the {ranks} rank(s), or change the config")
    if gpus > ranks:
        raise ConfigError(f"gpus: {gpus} for {ranks} rank(s), but a rank uses one; ask for as many ranks as GPUs")
