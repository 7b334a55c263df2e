"""Jobs: submit, list, look, cancel; their logs, progress and report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, HTTPException, Query, Response

from service.jobs import Job, JobState, admit
from service.launchers.wrapper import OUTPUT
from service.run_files import progress_page, read_part, read_tail
from service.schemas import JobPage, JobRequest, JobView, Problem, ProgressPage
from service.state import KnownJob, Parts, Service
from service.supervisor import CANCELLED

_UNKNOWN: dict[int | str, dict[str, Any]] = {404: {"model": Problem, "description": "No such job."}}
_MOST_LOG_BYTES = 4_194_304

# A report is written by the engine from names that users chose: it may draw and run its own script, and nothing else.
_REPORT_POLICY = (
    "sandbox allow-scripts; default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src data:; font-src data:"
)

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])


@router.post("", status_code=201, responses={409: {"model": Problem}, 422: {"model": Problem}})
def submit(request: JobRequest, response: Response, service: Parts) -> JobView:
    """Queue a training run; ``Location`` says where it can be looked at."""
    values = admit(
        request.config,
        service.settings,
        dataset=request.dataset,
        ranks=request.ranks,
        threads_per_rank=request.threads_per_rank,
        gpus=request.gpus,
        name=request.name,
    )
    job = service.store.add(values)
    service.supervisor.wake()
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return _view(service, job)


@router.get("")
def list_jobs(
    service: Parts,
    state: JobState | None = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
    offset: Annotated[int, Query(ge=0, le=2**31)] = 0,
) -> JobPage:
    """Jobs, newest first."""
    jobs, total = service.store.page(state=state, limit=limit, offset=offset)
    return JobPage(jobs=[_view(service, job) for job in jobs], total=total, limit=limit, offset=offset)


@router.get("/{job_id}", responses=_UNKNOWN)
def show(job: KnownJob, service: Parts) -> JobView:
    """One job with its latest progress and its config."""
    return _view(service, job, with_config=True)


@router.get("/{job_id}/logs", responses=_UNKNOWN)
def logs(
    job: KnownJob,
    tail: Annotated[int | None, Query(ge=0, le=100_000, description="Only the last lines.")] = None,
    offset: Annotated[int, Query(ge=0, le=2**62, description="Bytes to leave out.")] = 0,
    limit: Annotated[int, Query(ge=1, le=_MOST_LOG_BYTES, description="Most bytes to send.")] = 1_048_576,
) -> Response:
    """What the run printed, as text; ``X-Next-Offset`` is where a further call goes on."""
    path = Path(job.directory) / OUTPUT
    data, behind = read_part(path, offset, limit) if tail is None else read_tail(path, tail, limit)
    headers = {"X-Next-Offset": str(behind), "X-Job-State": job.state}
    return Response(data, media_type="text/plain; charset=utf-8", headers=headers)


@router.get("/{job_id}/progress", responses=_UNKNOWN)
def progress(
    job: KnownJob,
    offset: Annotated[int | None, Query(ge=0, le=2**62, description="The `offset` of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1_000,
) -> ProgressPage:
    """Progress records, oldest first."""
    # `job` was read before the file: what an ended job has written is all there.
    begin = job.progress_start if offset is None else offset
    records, behind = progress_page(Path(job.run_directory) / "progress.jsonl", begin, limit)
    complete = job.state.is_terminal() and len(records) < limit
    return ProgressPage(records=records, offset=behind, state=job.state, complete=complete)


@router.post(
    "/{job_id}/cancel", status_code=202, responses={**_UNKNOWN, 200: {"model": JobView}, 409: {"model": Problem}}
)
def cancel(job: KnownJob, response: Response, service: Parts) -> JobView:
    """End a job: a queued one at once (200), a running one after its checkpoint (202)."""
    if service.store.transition(job.id, JobState.QUEUED, JobState.CANCELLED, reason=f"{CANCELLED} before it started"):
        response.status_code = 200
        service.supervisor.wake()
    elif service.store.ask_to_cancel(job.id, CANCELLED):
        service.supervisor.wake()
    else:
        now = service.store.get(job.id) or job
        if now.state is not JobState.CANCELLED:
            raise HTTPException(409, f"job {job.id}: has ended already ({now.state})")
        response.status_code = 200
    return _view(service, service.store.get(job.id) or job)


@router.get("/{job_id}/report", responses={**_UNKNOWN, 409: {"model": Problem}})
def report(
    job: KnownJob,
    format: Annotated[Literal["html", "json"] | None, Query(description="Before `Accept`.")] = None,  # noqa: A002
    accept: Annotated[str, Header()] = "*/*",
) -> Response:
    """The evaluation report, as a page unless JSON is asked for."""
    kind = format or _preferred(accept)
    path = Path(job.run_directory) / f"report.{kind}"
    if not job.state.is_terminal():
        # A report of a former run may lie in a folder that the config named.
        raise HTTPException(409, f"job {job.id}: is {job.state}; its report is written at its end")
    try:
        written, content = path.stat().st_mtime, path.read_bytes()
    except OSError:
        written, content = None, b""
    # Clocks of files are coarser than those of processes.
    if written is None or job.started_at is None or written < job.started_at - 1:
        raise HTTPException(404, f"job {job.id}: {job.state} without a report; its logs say why")
    headers = {"Vary": "Accept"}
    if kind == "html":
        headers["Content-Security-Policy"] = _REPORT_POLICY
    media_type = "application/json" if kind == "json" else "text/html; charset=utf-8"
    return Response(content, media_type=media_type, headers=headers)


def _preferred(accept: str) -> Literal["html", "json"]:
    """Which of the two ``Accept`` ranks higher; a page where it does not care."""
    weights = {"html": 0.0, "json": 0.0}
    for part in accept.split(","):
        media, *parameters = (piece.strip().lower() for piece in part.split(";"))
        weight = 1.0
        for parameter in parameters:
            if parameter.startswith("q="):
                try:
                    weight = float(parameter[2:])
                except ValueError:
                    weight = 0.0
        if media == "application/json":
            weights["json"] = max(weights["json"], weight)
        elif media in {"text/html", "application/xhtml+xml"}:
            weights["html"] = max(weights["html"], weight)
    return "json" if weights["json"] > weights["html"] else "html"


def _view(service: Service, job: Job, *, with_config: bool = False) -> JobView:
    figures = {} if job.started_at is None else service.summaries.of(Path(job.run_directory), job.progress_start)
    return JobView.of(job, figures, with_config=with_config)
