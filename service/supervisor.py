"""The thread that starts queued jobs where there is room, and notices how running ones end.

All that it knows lies in the store and in the jobs' folders, so that a restarted service goes on where the
former one ended, however it ended: there is no recovery besides the ordinary round.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from pathlib import Path

from dlrm.errors import LaunchError
from service.jobs import Job, JobState, free_cores, free_gpus, outcome
from service.launchers.base import Exit, Launcher, Process, Running, Task, Vanished
from service.launchers.wrapper import OUTPUT
from service.run_files import last_error_line, own_error
from service.settings import Settings
from service.store import JobStore

_LOG = logging.getLogger(__name__)

CANCELLED = "cancelled on request"
SERVICE_STOPPED = "the service was stopped together with its jobs"

_OVERDUE_SECONDS = 15.0
"""A job that outlives all steps of its stop by this much has lost the process that was to take them."""


class Supervisor:
    """First in, first out: the job at the head of the queue waits until there is room for it, and all wait behind."""

    def __init__(self, store: JobStore, launcher: Launcher, settings: Settings) -> None:
        """Take over the store's jobs; nothing happens before ``start`` or ``tick``."""
        self._store = store
        self._launcher = launcher
        self._settings = settings
        self._wake = threading.Event()
        self._ending = threading.Event()
        self._draining = False
        self._signalled: set[str] = set()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to look after the jobs."""
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Look now instead of at the next turn."""
        self._wake.set()

    def stop(self, *, stop_jobs: bool = False) -> None:
        """End the thread; running jobs run on unless ``stop_jobs``, queued ones stay queued."""
        self._ending.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        if stop_jobs:
            self._stop_jobs()

    def tick(self) -> None:
        """One round: ends, stops, starts."""
        for job in self._store.in_state(JobState.RUNNING):
            self._look_after(job)
        if not self._draining:
            self._start_queued()

    def _run(self) -> None:
        while not self._ending.is_set():
            try:
                self.tick()
            except Exception:  # noqa: BLE001  one bad round must not end all supervision
                _LOG.exception("a round of the supervisor failed")
            self._wake.wait(self._settings.poll_seconds)
            self._wake.clear()

    def _stop_jobs(self) -> None:
        self._draining = True
        deadline = time.monotonic() + self._settings.stop_seconds + self._settings.kill_seconds + _OVERDUE_SECONDS
        for job in self._store.in_state(JobState.RUNNING):
            self._store.ask_to_cancel(job.id, SERVICE_STOPPED)
        while self._store.count(JobState.RUNNING) and time.monotonic() < deadline:
            self.tick()
            time.sleep(min(0.1, self._settings.poll_seconds))

    def _look_after(self, job: Job) -> None:
        task = _task(job)
        process = _process(job)
        if process is None:
            process = self._launcher.find(task)
            if process is None:
                self._lose(job, "the service ended while it was starting the job, and no process of it was found")
                return
            self._store.note(job.id, pid=process.pid, pid_created=process.created)
        match self._launcher.poll(task, process):
            case Running():
                if job.cancel_at is not None:
                    self._stop(job, task, process)
            case Exit() as ended:
                self._finish(job, ended)
            case Vanished(reason):
                self._lose(job, reason)

    def _stop(self, job: Job, task: Task, process: Process) -> None:
        # A restarted service asks again, which does no harm.
        if job.id not in self._signalled and self._launcher.stop(task, process):
            self._signalled.add(job.id)
        overdue = self._settings.stop_seconds + self._settings.kill_seconds + _OVERDUE_SECONDS
        if job.cancel_at is not None and time.time() > job.cancel_at + overdue:
            _LOG.warning("job %s did not end when it was asked to; it is killed", job.id)
            self._launcher.kill(task, process)

    def _finish(self, job: Job, ended: Exit) -> None:
        message = own_error(Path(job.run_directory) / "progress.jsonl", job.progress_start)
        result = outcome(ended.exit_code, cancel_reason=job.cancel_reason, own_error=message is not None)
        error = None
        if result.state is JobState.FAILED:
            error = ended.error or message or last_error_line(Path(job.directory) / OUTPUT)
        self._end(
            job, result.state, reason=result.reason, exit_code=ended.exit_code, error=error, finished_at=ended.time
        )

    def _lose(self, job: Job, reason: str) -> None:
        if job.cancel_reason is not None:
            self._end(job, JobState.CANCELLED, reason=f"{job.cancel_reason}; ended without an exit code: {reason}")
        else:
            self._end(job, JobState.LOST, reason=reason, error=last_error_line(Path(job.directory) / OUTPUT))

    def _end(self, job: Job, state: JobState, **columns: object) -> None:
        self._signalled.discard(job.id)
        if self._store.transition(job.id, JobState.RUNNING, state, **columns):
            _LOG.info("job %s: %s (%s)", job.id, state, columns.get("reason"))

    def _start_queued(self) -> None:
        running = self._store.in_state(JobState.RUNNING)
        for job in self._store.in_state(JobState.QUEUED):
            gpus = free_gpus(running, self._settings)
            if job.cores > free_cores(running, self._settings) or job.gpus > len(gpus):
                if job.cores <= self._settings.cores and job.gpus <= len(self._settings.gpus):
                    return
                self._refuse(job)  # it came when the service had more to share out
                continue
            given = gpus[: job.gpus]
            claimed = self._store.transition(
                job.id, JobState.QUEUED, JobState.RUNNING, started_at=time.time(), gpu_ids=given
            )
            if claimed:  # not cancelled in between
                self._launch(job.id)
                running = self._store.in_state(JobState.RUNNING)

    def _refuse(self, job: Job) -> None:
        reason = (
            f"needs {job.cores} cores and {job.gpus} GPUs, but the service now has {self._settings.cores} and "
            f"{len(self._settings.gpus)}"
        )
        self._store.transition(job.id, JobState.QUEUED, JobState.CANCELLED, reason=reason)

    def _launch(self, job_id: str) -> None:
        job = self._store.get(job_id)
        if job is None:
            return
        task = _task(job)
        try:
            task.directory.mkdir(parents=True, exist_ok=True)
            task.run_directory.mkdir(parents=True, exist_ok=True)
            task.config.write_text(json.dumps(job.config, indent=2) + "\n", encoding="utf-8")
            process, progress_start = self._launcher.start(task)
        except OSError as error:
            self._not_started(
                job, f"folder {error.filename}: cannot be used ({error.strerror}); name another as run.directory"
            )
            return
        except LaunchError as error:
            self._not_started(job, str(error))
            return
        self._store.note(job.id, pid=process.pid, pid_created=process.created, progress_start=progress_start)
        _LOG.info("job %s (%s): started, %d rank(s), process %d", job.id, job.name, job.ranks, process.pid)

    def _not_started(self, job: Job, error: str) -> None:
        code = LaunchError.exit_code
        self._end(job, JobState.FAILED, reason=f"exit code {code}", exit_code=code, error=error)


def _task(job: Job) -> Task:
    directory = Path(job.directory)
    return Task(
        id=job.id,
        directory=directory,
        run_directory=Path(job.run_directory),
        config=directory / "config.json",
        ranks=job.ranks,
        threads=job.threads_per_rank,
        gpus=tuple(job.gpu_ids),
    )


def _process(job: Job) -> Process | None:
    if job.pid is None or job.pid_created is None:
        return None
    return Process(job.pid, job.pid_created)
