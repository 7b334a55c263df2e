"""The control service: its parts put together, and served."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from http import HTTPStatus
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from dlrm.errors import ConfigError, DataError, ServiceError
from service.launchers.base import Launcher
from service.launchers.local import Grace, LocalLauncher
from service.routes import health, jobs
from service.run_files import ProgressSummaries
from service.security import Guard
from service.settings import Settings, service_url
from service.state import Service, version
from service.store import JobStore
from service.supervisor import Supervisor

_LOG = logging.getLogger(__name__)


def create_app(settings: Settings, launcher: Launcher | None = None) -> FastAPI:
    """The application; its supervisor runs for as long as the application is served.

    Args:
        settings: of this service.
        launcher: starts the jobs; ``None``: mpirun on this machine.

    Raises:
        ServiceError: the folder or the data base cannot be used.
    """
    _make_folders(settings)
    store = JobStore(settings.home / "service.db")
    if launcher is None:
        grace = Grace(checkpoint=settings.stop_seconds, terminate=settings.kill_seconds)
        launcher = LocalLauncher(grace=grace, engine=settings.engine)
    supervisor = Supervisor(store, launcher, settings)

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        supervisor.start()
        try:
            yield
        finally:
            # Nothing else runs on the event loop by now, so that waiting here holds up nobody.
            supervisor.stop(stop_jobs=settings.stop_jobs)
            store.close()

    # The interactive documentation would load its scripts from elsewhere.
    app = FastAPI(title="Crosslane", version=version(), lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = Service(settings, store, supervisor, ProgressSummaries())
    app.include_router(health.router)
    app.include_router(jobs.router)
    app.add_middleware(Guard, settings=settings)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _answer)
    app.add_exception_handler(Exception, _fault)
    for error, status in ((ConfigError, 422), (DataError, 422), (ServiceError, 409)):
        app.add_exception_handler(error, _refuse(status))
    return app


def serve(settings: Settings, *, ready: Callable[[str], None] | None = None) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        settings: of this service.
        ready: called with the address once requests are accepted by the system.

    Raises:
        ServiceError: the port is taken, the address is not this machine's, or another service uses the folder.
    """
    with contextlib.closing(bind(settings.host, settings.port)) as listener, _sole_user(settings):
        url = service_url(settings.host, listener.getsockname()[1])
        app = create_app(settings)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=5
        )
        listener.listen(128)
        address = settings.home / "service.json"
        address.write_text(json.dumps({"pid": os.getpid(), "url": url}) + "\n", encoding="utf-8")
        try:
            if ready is not None:
                ready(url)
            with _ended_by_signals():
                uvicorn.Server(config).run(sockets=[listener])
        finally:
            address.unlink(missing_ok=True)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGINT end the service in order, with exit code 0.

    uvicorn shuts down on them, then raises them once more for whoever was there before it: by default that would
    end the process on the spot.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda _number, _frame: None) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket's address, taken before anything else is started.

    Raises:
        ServiceError: it cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ServiceError(f"host {host}: not an address ({error.strerror or error}); use 127.0.0.1") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ServiceError(
                f"port {port} on {host}: taken by another process; stop that one, or choose another with --port"
            ) from None
        raise ServiceError(f"port {port} on {host}: cannot be bound ({error.strerror}); choose another") from None
    return listener


@contextlib.contextmanager
def _sole_user(settings: Settings) -> Iterator[None]:
    """Hold the folder: two services on one queue would start its jobs twice."""
    _make_folders(settings)
    path = settings.home / "service.lock"
    with path.open("a", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ServiceError(
                f"folder {settings.home}: another service uses it; stop that one, or choose another with --data-dir"
            ) from None
        yield


def _make_folders(settings: Settings) -> None:
    try:
        # Configs name paths and logs show data: neither is for other users of the machine.
        settings.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in (settings.jobs, settings.data):
            folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ServiceError(
            f"folder {Path(error.filename or settings.home)}: cannot be made ({error.strerror}); "
            "choose another with --data-dir"
        ) from None


def _refuse(status: int) -> Callable[[Request, Exception], JSONResponse]:
    def answer(_request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, status_code=status)

    return answer


def _answer(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    detail = error.detail
    if detail == HTTPStatus(error.status_code).phrase:  # the framework's own, such as "Not Found"
        detail = f"{request.method} {request.url.path}: {detail.lower()}; GET /openapi.json lists the requests"
    return JSONResponse({"detail": detail}, status_code=error.status_code, headers=error.headers)


def _fault(_request: Request, error: Exception) -> JSONResponse:
    """What no one foresaw; the traceback goes to the service's log."""
    detail = f"internal error ({type(error).__name__}); the service's log tells more"
    return JSONResponse({"detail": detail}, status_code=500)


def _invalid(_request: Request, error: Exception) -> JSONResponse:
    clauses = []
    for fault in error.errors() if isinstance(error, RequestValidationError) else ():
        if fault["type"] == "json_invalid":
            clauses.append("body: not JSON")
            continue
        # The first part says body, query or path, which the fields' names tell as well.
        field = ".".join(str(part) for part in fault["loc"][1:]) or "body"
        clauses.append(f"{field}: {fault['msg'][:1].lower()}{fault['msg'][1:]}")
    return JSONResponse({"detail": "; ".join(clauses) or str(error)}, status_code=422)
