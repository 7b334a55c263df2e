"""What the routes work with, and how they get it."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, HTTPException, Request

from service.jobs import Job
from service.run_files import ProgressSummaries
from service.settings import Settings
from service.store import JobStore
from service.supervisor import Supervisor


@dataclass(frozen=True, slots=True)
class Service:
    """The parts of one service."""

    settings: Settings
    store: JobStore
    supervisor: Supervisor
    summaries: ProgressSummaries


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


Parts = Annotated[Service, Depends(_service)]


def _job(job_id: str, service: Parts) -> Job:
    job = service.store.get(job_id)
    if job is None:
        raise HTTPException(404, f"job {job_id!r}: not known here; GET /v1/jobs lists the jobs")
    return job


KnownJob = Annotated[Job, Depends(_job)]


def version() -> str:
    """The installed version; ``0+source`` for a checkout that is not installed."""
    try:
        return importlib.metadata.version("crosslane")
    except importlib.metadata.PackageNotFoundError:
        return "0+source"
