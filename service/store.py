"""Jobs in SQLite (SQLAlchemy Core, write-ahead log): short transactions, every change of state compare-and-set."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    URL,
    Column,
    Engine,
    Float,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    event,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.engine import Row
from sqlalchemy.exc import SQLAlchemyError

from dlrm.errors import ServiceError
from service.jobs import TRANSITIONS, Job, JobState

_SCHEMA_VERSION = 1
_METADATA = MetaData()
_JOBS = Table(
    "jobs",
    _METADATA,
    Column("number", Integer, primary_key=True),
    Column("id", String, nullable=False, unique=True),
    Column("name", String, nullable=False),
    Column("state", String, nullable=False, index=True),
    Column("config", JSON, nullable=False),
    Column("ranks", Integer, nullable=False),
    Column("threads_per_rank", Integer, nullable=False),
    Column("gpus", Integer, nullable=False),
    Column("gpu_ids", JSON, nullable=False),
    Column("directory", String, nullable=False),
    Column("run_directory", String, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("reason", String),
    Column("started_at", Float),
    Column("finished_at", Float),
    Column("cancel_at", Float),
    Column("cancel_reason", String),
    Column("pid", Integer),
    Column("pid_created", Float),
    Column("progress_start", Integer, nullable=False),
    Column("exit_code", Integer),
    Column("error", String),
    sqlite_autoincrement=True,  # the order of submission, never reused
)


class JobStore:
    """All jobs of one service."""

    def __init__(self, path: Path) -> None:
        """Open or create the data base.

        Raises:
            ServiceError: the file is no data base of this version.
        """
        self._engine: Engine = create_engine(URL.create("sqlite", database=str(path)))
        event.listen(self._engine, "connect", _configure)
        try:
            version = self._prepare()
        except SQLAlchemyError as error:
            self._engine.dispose()
            cause = getattr(error, "orig", None) or error
            raise ServiceError(f"data base {path}: cannot be opened ({cause}); move it away or repair it") from None
        if version != _SCHEMA_VERSION:
            self._engine.dispose()
            raise ServiceError(
                f"data base {path}: version {version}, but this service reads {_SCHEMA_VERSION}; "
                "use the version of Crosslane that wrote it, or another folder"
            )

    def _prepare(self) -> int:
        """Make the tables of a new data base; returns the version of what is there."""
        with self._engine.begin() as connection:
            version: int = connection.execute(text("PRAGMA user_version")).scalar_one()
            if version == 0:
                _METADATA.create_all(connection)
                connection.execute(text(f"PRAGMA user_version = {_SCHEMA_VERSION}"))
                version = _SCHEMA_VERSION
        return version

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def add(self, values: dict[str, Any]) -> Job:
        """Put a job at the end of the queue; ``values`` are those of ``service.jobs.admit``.

        Raises:
            ServiceError: a job that has not ended writes into the same folder.
        """
        row = {"state": JobState.QUEUED, "gpu_ids": [], "progress_start": 0, **values}
        with self._engine.begin() as connection:
            # The insert comes first, since it takes the write lock: two submissions cannot both miss the other.
            connection.execute(insert(_JOBS).values(row))
            other = connection.execute(
                select(_JOBS.c.id).where(
                    _JOBS.c.run_directory == row["run_directory"],
                    _JOBS.c.id != row["id"],
                    _JOBS.c.state.in_([JobState.QUEUED, JobState.RUNNING]),
                )
            ).scalar()
            if other is not None:
                raise ServiceError(
                    f"run.directory: job {other} writes into {row['run_directory']} and has not ended; "
                    "wait for it, or name another folder"
                )
            added = connection.execute(select(_JOBS).where(_JOBS.c.id == row["id"])).one()
        return _job(added)

    def get(self, job_id: str) -> Job | None:
        """One job."""
        with self._engine.connect() as connection:
            row = connection.execute(select(_JOBS).where(_JOBS.c.id == job_id)).one_or_none()
        return None if row is None else _job(row)

    def page(self, *, state: JobState | None = None, limit: int = 50, offset: int = 0) -> tuple[list[Job], int]:
        """Jobs, newest first, and how many there are in all."""
        rows, count = select(_JOBS), select(func.count()).select_from(_JOBS)
        if state is not None:
            rows, count = rows.where(_JOBS.c.state == state), count.where(_JOBS.c.state == state)
        with self._engine.connect() as connection:
            total = connection.execute(count).scalar_one()
            found = connection.execute(rows.order_by(_JOBS.c.number.desc()).limit(limit).offset(offset)).all()
        return [_job(row) for row in found], total

    def in_state(self, state: JobState) -> list[Job]:
        """All jobs of a state, in the order of their submission."""
        with self._engine.connect() as connection:
            rows = connection.execute(select(_JOBS).where(_JOBS.c.state == state).order_by(_JOBS.c.number)).all()
        return [_job(row) for row in rows]

    def count(self, state: JobState) -> int:
        """Jobs of a state."""
        with self._engine.connect() as connection:
            found = select(func.count()).select_from(_JOBS).where(_JOBS.c.state == state)
            return connection.execute(found).scalar_one()

    def transition(self, job_id: str, source: JobState, target: JobState, **columns: Any) -> bool:
        """Move a job from one state to another, and set further columns with it.

        Returns:
            Whether it was in ``source``; if not, nothing has changed.

        Raises:
            ValueError: no job may go from ``source`` to ``target``, or it would be lost without a reason.
        """
        if target not in TRANSITIONS[source]:
            raise ValueError(f"a job may not go from {source} to {target}")
        if target is JobState.LOST and not columns.get("reason"):
            raise ValueError("a job may be lost only with a reason")
        if target.is_terminal():
            columns.setdefault("finished_at", time.time())
        return self._update(job_id, source, state=target, **columns)

    def note(self, job_id: str, **columns: Any) -> bool:
        """Set columns of a running job; False: it does not run."""
        if "state" in columns:
            raise ValueError("a state changes through transition() alone")
        return self._update(job_id, JobState.RUNNING, **columns)

    def ask_to_cancel(self, job_id: str, reason: str) -> bool:
        """Note that a running job shall end; the first reason stays. False: it does not run."""
        asked = {"cancel_at": func.coalesce(_JOBS.c.cancel_at, time.time())}
        return self._update(
            job_id, JobState.RUNNING, **asked, cancel_reason=func.coalesce(_JOBS.c.cancel_reason, reason)
        )

    def _update(self, job_id: str, source: JobState, **columns: Any) -> bool:
        change = update(_JOBS).where(_JOBS.c.id == job_id, _JOBS.c.state == source).values(**columns)
        with self._engine.begin() as connection:
            return connection.execute(change).rowcount == 1


def _configure(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    # Readers never wait for the writer; a writer waits for another one instead of failing.
    cursor.execute("PRAGMA busy_timeout = 10000")
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.close()


def _job(row: Row[Any]) -> Job:
    values = dict(row._mapping)  # noqa: SLF001  public, despite its name
    return Job(**{**values, "state": JobState(values["state"])})
