"""Whether the service works, and how busy it is."""

from __future__ import annotations

from fastapi import APIRouter

from service.jobs import JobState, free_cores, free_gpus
from service.schemas import Health, Slots
from service.state import Parts, version

router = APIRouter(tags=["health"])


@router.get("/healthz")
def healthz(service: Parts) -> Health:
    """Version, queue and free slots; needs no token."""
    running = service.store.in_state(JobState.RUNNING)
    settings = service.settings
    return Health(
        status="ok",
        version=version(),
        queued=service.store.count(JobState.QUEUED),
        running=len(running),
        cores=Slots(total=settings.cores, free=max(0, free_cores(running, settings))),
        gpus=Slots(total=len(settings.gpus), free=len(free_gpus(running, settings))),
    )
