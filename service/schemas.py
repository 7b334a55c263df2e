"""What travels over REST."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from service.jobs import Job, JobState


class JobRequest(BaseModel):
    """A training run to be queued."""

    model_config = ConfigDict(extra="forbid")

    config: Annotated[dict[str, Any], Field(description="Fields of RunConfig (`crosslane config schema`).")]
    dataset: Annotated[
        str | None,
        Field(
            min_length=1,
            description="Name of a prepared data set in the service's data folder, or an absolute path; "
            "goes before config.data.path.",
        ),
    ] = None
    ranks: Annotated[int, Field(ge=1, strict=True, description="MPI ranks.")] = 1
    threads_per_rank: Annotated[int, Field(ge=1, strict=True, description="Cores of each rank.")] = 1
    gpus: Annotated[int, Field(ge=0, strict=True, description="GPUs that no other running job gets.")] = 0
    name: Annotated[str | None, Field(min_length=1, max_length=200, description="Unset: the config's.")] = None


class JobView(BaseModel):
    """One job."""

    id: str
    name: str
    state: JobState
    reason: Annotated[str | None, Field(description="Why it ended as it did.")]
    exit_code: int | None
    error: Annotated[str | None, Field(description="The last error line of a failed or lost job.")]
    ranks: int
    threads_per_rank: int
    gpus: int
    gpu_ids: list[str]
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    cancel_requested: bool
    dataset: str
    run_directory: str
    progress: Annotated[
        dict[str, Any],
        Field(
            description="Latest step, steps, samples, samples_per_s, loss, lr and metrics, device, precision, and "
            "skipped_steps with a dynamic loss scale; empty before the first record."
        ),
    ]
    config: Annotated[dict[str, Any] | None, Field(description="Only where one job is asked for.")] = None

    @classmethod
    def of(cls, job: Job, progress: dict[str, Any], *, with_config: bool = False) -> JobView:
        """The view of a stored job."""
        return cls(
            id=job.id,
            name=job.name,
            state=job.state,
            reason=job.reason,
            exit_code=job.exit_code,
            error=job.error,
            ranks=job.ranks,
            threads_per_rank=job.threads_per_rank,
            gpus=job.gpus,
            gpu_ids=job.gpu_ids,
            created_at=_moment(job.created_at),
            started_at=None if job.started_at is None else _moment(job.started_at),
            finished_at=None if job.finished_at is None else _moment(job.finished_at),
            cancel_requested=job.cancel_at is not None,
            dataset=job.config["data"]["path"],
            run_directory=job.run_directory,
            progress=progress,
            config=job.config if with_config else None,
        )


class JobPage(BaseModel):
    """Some of the jobs, newest first."""

    jobs: list[JobView]
    total: int
    limit: int
    offset: int


class ProgressPage(BaseModel):
    """Some of a job's progress records (pipeline/progress.py)."""

    records: list[dict[str, Any]]
    offset: Annotated[int, Field(description="Give this as `offset` to get what follows.")]
    state: JobState
    complete: Annotated[bool, Field(description="The job has ended and nothing follows.")]


class Slots(BaseModel):
    """How much of something there is."""

    total: int
    free: int


class Health(BaseModel):
    """That the service works, and how busy it is."""

    status: str
    version: str
    queued: int
    running: int
    cores: Slots
    gpus: Slots


class Problem(BaseModel):
    """An error."""

    detail: Annotated[str, Field(description="One sentence.")]


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, tz=UTC)
