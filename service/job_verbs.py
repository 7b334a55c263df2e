"""The verbs of the command line that concern the service and its jobs."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from dlrm.config import apply_overrides, read_config_file
from dlrm.errors import ServiceError
from pipeline.console import RunProgress, print_fields, print_json, print_rows, terminal
from service.client import TERMINAL, ServiceClient, local_path
from service.settings import load_settings, read_token

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

_PANEL = "Service"
_FOLLOW_SECONDS = 0.5

JobId = Annotated[str, typer.Argument(metavar="JOB", help="The job's id, as `crosslane jobs` lists it.")]
Url = Annotated[
    str | None, typer.Option("--url", help="Address of the service; default: CROSSLANE_URL, then 127.0.0.1:8470.")
]
TokenFile = Annotated[
    Path | None, typer.Option("--token-file", help="File with the service's token; default: CROSSLANE_TOKEN.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.command(rich_help_panel=_PANEL)
def serve(
    host: Annotated[
        str | None, typer.Option(help="Address to bind, 127.0.0.1 unless set; another one needs a token.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port to bind, 8470 unless set; 0 takes a free one.")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder for jobs, data sets and the data base; default: CROSSLANE_HOME.")
    ] = None,
    token_file: TokenFile = None,
    stop_jobs: Annotated[
        bool, typer.Option("--stop-jobs", help="Stop the running jobs, after a checkpoint, when the service ends.")
    ] = False,
) -> None:
    """Run the control service until SIGTERM or Ctrl-C; running jobs outlive it."""
    from service.app import serve as serve_settings  # FastAPI is of no use to the other verbs

    settings = load_settings(host=host, port=port, home=data_dir, token_file=token_file, stop_jobs=stop_jobs)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)

    def ready(url: str) -> None:
        gpus = f" and {len(settings.gpus)} GPUs" if settings.gpus else ""
        typer.echo(f"Crosslane on {url}, {settings.cores} cores{gpus}, folder {settings.home}")
        sys.stdout.flush()

    serve_settings(settings, ready=ready)


@app.command(rich_help_panel=_PANEL)
def submit(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML or JSON config of the run.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show progress until the job has ended.")] = False,
    dataset: Annotated[
        str | None, typer.Option(help="Prepared data set: a name in the service's folder, or a path.")
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, help="MPI ranks.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Cores of each rank.")] = 1,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs.")] = 0,
    name: Annotated[str | None, typer.Option(help="Name of the job; default: the config's.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Set one field; may be repeated.")
    ] = None,
    url: Url = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Queue a training run; with --follow the exit code is the run's."""
    values = with_local_paths(apply_overrides(read_config_file(config), overrides or []))
    with _client(url, token_file) as client:
        job = client.submit(
            values,
            dataset=local_path(dataset) if dataset is not None else None,
            ranks=ranks,
            threads_per_rank=threads,
            gpus=gpus,
            name=name,
        )
        if not follow:
            _print_job(client, job, as_json=as_json)
            return
        try:
            job = follow_job(client, job["id"])
        except KeyboardInterrupt:
            note = f"job {job['id']} runs on; `crosslane status {job['id']}` shows it, `crosslane cancel` ends it"
            terminal(errors=True).print(note)
            raise
        _print_job(client, job, as_json=as_json)
    if code := exit_code_of(job):
        raise typer.Exit(code)


@app.command("jobs", rich_help_panel=_PANEL)
def list_jobs(
    state: Annotated[
        Literal["queued", "running", "succeeded", "failed", "cancelled", "lost"] | None,
        typer.Option(help="Only jobs in this state."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=500, help="Most jobs to list.")] = 50,
    offset: Annotated[int, typer.Option(min=0, help="Newer jobs to leave out.")] = 0,
    url: Url = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first."""
    with _client(url, token_file) as client:
        page = client.jobs(state=state, limit=limit, offset=offset)
    if as_json:
        print_json(page)
        return
    print_rows(f"{len(page['jobs'])} of {page['total']} jobs", [_row(job) for job in page["jobs"]], as_json=False)


@app.command(rich_help_panel=_PANEL)
def status(job: JobId, url: Url = None, token_file: TokenFile = None, as_json: AsJson = False) -> None:
    """Show one job: state, progress, latest metrics, error."""
    with _client(url, token_file) as client:
        _print_job(client, client.job(job), as_json=as_json)


@app.command(rich_help_panel=_PANEL)
def logs(
    job: JobId,
    tail: Annotated[int | None, typer.Option(min=0, help="Only the last lines.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
    url: Url = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Print what a run printed."""
    with _client(url, token_file) as client:
        text, offset, state = client.logs(job, tail=tail)
        parts = [text]
        if not as_json:
            _write(text)
        done = tail is not None and not follow
        while not done:  # a part is limited in size; an empty one is the end, for now
            text, offset, state = client.logs(job, offset=offset)
            parts.append(text)
            if not as_json:
                _write(text)
            if not text:
                done = not follow or state in TERMINAL
                time.sleep(0 if done else _FOLLOW_SECONDS)
    if as_json:
        print_json({"job": job, "state": state, "offset": offset, "logs": "".join(parts)})


@app.command(rich_help_panel=_PANEL)
def cancel(
    job: JobId,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the job has ended.")] = False,
    url: Url = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """End a job: a queued one at once, a running one after a checkpoint."""
    with _client(url, token_file) as client:
        found = client.cancel(job)
        if wait:
            found = client.wait(job, every=_FOLLOW_SECONDS)
        _print_job(client, found, as_json=as_json)


@app.command(rich_help_panel=_PANEL)
def report(
    job: JobId,
    out: Annotated[Path | None, typer.Option(help="Write the HTML page into this file.")] = None,
    url: Url = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Print the figures of the evaluation report, or write its page to a file."""
    with _client(url, token_file) as client:
        if out is not None:
            page = client.report(job, "html")
            try:
                out.write_text(page, encoding="utf-8")
            except OSError as error:
                raise ServiceError(f"report {out}: cannot be written ({error.strerror}); name another file") from None
            print_fields("Report", {"job": job, "file": str(out), "bytes": len(page.encode())}, as_json=as_json)
            return
        text = client.report(job, "json")
        if as_json:
            _write(text if text.endswith("\n") else text + "\n")
            return
        figures = json.loads(text)
        shown = {key: value for key, value in figures.items() if not isinstance(value, dict | list)}
        print_fields(f"Report of job {job}", {**shown, "page": client.report_url(job)}, as_json=False)


def follow_job(client: ServiceClient, job_id: str) -> dict[str, Any]:
    """Show a job's progress on standard error until it has ended; returns the job."""
    console = terminal(errors=True)
    job = client.job(job_id)
    if job["state"] == "queued":
        console.print(f"job {job_id} ({job['name']}) is queued")
    with RunProgress(console) as view:
        for record in client.follow(job_id, every=_FOLLOW_SECONDS):
            view.feed(record)
    return client.job(job_id)


def exit_code_of(job: dict[str, Any]) -> int:
    """The exit code with which a command that waited for a job ends."""
    if job["state"] == "succeeded":
        return 0
    code = job["exit_code"]
    return code if isinstance(code, int) and code else 1


def with_local_paths(values: dict[str, Any]) -> dict[str, Any]:
    """A config whose relative paths of existing files are absolute: the service stands in another folder."""
    result = dict(values)
    for section, field in (("data", "path"), ("run", "init")):
        part = result.get(section)
        if isinstance(part, dict) and isinstance(part.get(field), str):
            result[section] = {**part, field: local_path(part[field])}
    return result


def _client(url: str | None, token_file: Path | None) -> ServiceClient:
    return ServiceClient(url, read_token(token_file))


_SHOWN = ("device", "precision", "samples", "samples_per_s", "skipped_steps", "lr", "metrics")


def _print_job(client: ServiceClient, job: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(job)
        return
    fields = {**_row(job), "reason": job["reason"], "exit_code": job["exit_code"], "error": job["error"]}
    progress = job["progress"]
    fields |= {name: progress.get(name) for name in _SHOWN}
    fields |= {name: job[name] for name in ("created_at", "started_at", "finished_at", "dataset", "run_directory")}
    if job["state"] == "succeeded":
        fields["report"] = client.report_url(job["id"])
    shown = {name: value for name, value in fields.items() if value is not None}
    print_fields(f"Job {job['id']}", shown, as_json=False)


def _row(job: dict[str, Any]) -> dict[str, Any]:
    progress = job["progress"]
    steps = f"{progress.get('step', 0)}/{progress.get('steps', '?')}" if progress else None
    auc = (progress.get("metrics") or {}).get("auc")
    return {
        "job": job["id"],
        "name": job["name"],
        "state": "stopping" if job["state"] == "running" and job["cancel_requested"] else job["state"],
        "ranks": job["ranks"],
        "step": steps,
        "loss": progress.get("loss"),
        "auc": auc,
    }


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
