"""A client of the control service: every refusal is one clear error."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import urlsplit

import httpx

from dlrm.errors import ServiceError
from service.settings import client_address, is_loopback, read_token

TERMINAL = frozenset({"succeeded", "failed", "cancelled", "lost"})


class ServiceClient:
    """Calls one service; a context manager."""

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        *,
        timeout: float = 30.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Remember where the service is.

        Args:
            url: its address; ``None``: what the environment says.
            token: bearer token; ``None``: the environment's, if any.
            timeout: seconds to wait for an answer.
            transport: carries the requests, for tests.

        Raises:
            ServiceError: the address is malformed.
        """
        self.url = (url or client_address()).rstrip("/")
        parts = urlsplit(self.url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ServiceError(f"address {self.url!r}: must look like http://127.0.0.1:8470")
        token = token or read_token()
        self._http = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=timeout,
            transport=transport,
            trust_env=not is_loopback(parts.hostname),  # a proxy cannot reach our loopback
        )

    def __enter__(self) -> Self:
        """Use it."""
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """Close the connections."""
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def health(self) -> dict[str, Any]:
        """Version, queue and free slots."""
        return self._json("GET", "/healthz")

    def wait_until_ready(self, seconds: float = 20.0) -> dict[str, Any]:
        """Wait for the service to answer.

        Raises:
            ServiceError: it does not within ``seconds``.
        """
        deadline = time.monotonic() + seconds
        while True:
            try:
                return self.health()
            except ServiceError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def submit(
        self,
        config: dict[str, Any],
        *,
        dataset: str | None = None,
        ranks: int = 1,
        threads_per_rank: int = 1,
        gpus: int = 0,
        name: str | None = None,
    ) -> dict[str, Any]:
        """Queue a run; returns the job."""
        body = {
            "config": config,
            "dataset": dataset,
            "ranks": ranks,
            "threads_per_rank": threads_per_rank,
            "gpus": gpus,
            "name": name,
        }
        return self._json("POST", "/v1/jobs", json={key: value for key, value in body.items() if value is not None})

    def jobs(self, *, state: str | None = None, limit: int = 50, offset: int = 0) -> dict[str, Any]:
        """A page of jobs, newest first."""
        parameters: dict[str, str | int] = {"limit": limit, "offset": offset}
        if state is not None:
            parameters["state"] = state
        return self._json("GET", "/v1/jobs", params=parameters)

    def job(self, job_id: str) -> dict[str, Any]:
        """One job."""
        return self._json("GET", f"{_path(job_id)}")

    def logs(self, job_id: str, *, tail: int | None = None, offset: int = 0) -> tuple[str, int, str]:
        """What a run printed, the offset behind it, and the job's state before that was read."""
        parameters = {"offset": offset} if tail is None else {"tail": tail}
        response = self._request("GET", f"{_path(job_id)}/logs", params=parameters)
        text = response.content.decode("utf-8", "replace")
        return text, int(response.headers["X-Next-Offset"]), response.headers["X-Job-State"]

    def progress(self, job_id: str, offset: int | None = None) -> dict[str, Any]:
        """A page of progress records."""
        return self._json("GET", f"{_path(job_id)}/progress", params={} if offset is None else {"offset": offset})

    def follow(self, job_id: str, *, every: float = 0.5) -> Iterator[dict[str, Any]]:
        """Progress records as they come, until the job has ended."""
        offset: int | None = None
        while True:
            page = self.progress(job_id, offset)
            yield from page["records"]
            if page["complete"]:
                return
            if page["offset"] == offset or not page["records"]:
                time.sleep(every)
            offset = page["offset"]

    def wait(self, job_id: str, *, every: float = 0.5) -> dict[str, Any]:
        """Wait until a job has ended; returns it."""
        while (job := self.job(job_id))["state"] not in TERMINAL:
            time.sleep(every)
        return job

    def cancel(self, job_id: str) -> dict[str, Any]:
        """Ask a job to end; returns it."""
        return self._json("POST", f"{_path(job_id)}/cancel", json={})

    def report(self, job_id: str, kind: Literal["html", "json"] = "html") -> str:
        """The evaluation report, as text."""
        return self._request("GET", f"{_path(job_id)}/report", params={"format": kind}).text

    def report_url(self, job_id: str) -> str:
        """Where a browser finds the report."""
        return f"{self.url}{_path(job_id)}/report"

    def _json(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        response = self._request(method, path, **options)
        try:
            values = response.json()
        except ValueError:
            values = None
        if not isinstance(values, dict):
            raise ServiceError(f"service at {self.url}: {path} is not answered as Crosslane does; check the address")
        return values

    def _request(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **options)
        except httpx.ConnectError:
            raise ServiceError(
                f"service at {self.url}: not reachable; start it with `crosslane serve`, or name it with --url"
            ) from None
        except httpx.TimeoutException:
            raise ServiceError(f"service at {self.url}: no answer in time; look at its log") from None
        except httpx.HTTPError as error:
            raise ServiceError(f"service at {self.url}: {error or type(error).__name__}; check the address") from None
        if response.is_success:
            return response
        if response.status_code == 401:
            raise ServiceError(f"service at {self.url}: refused the token; set CROSSLANE_TOKEN or --token-file")
        raise ServiceError(_detail(response))


def local_path(text: str) -> str:
    """A path of this machine made absolute where it exists, since the service stands in another folder."""
    path = Path(text).expanduser()
    return str(path.absolute()) if path.exists() else text


def _path(job_id: str) -> str:
    if not job_id.isalnum():
        raise ServiceError(f"job {job_id!r}: not a job's id; `crosslane jobs` lists them")
    return f"/v1/jobs/{job_id}"


def _detail(response: httpx.Response) -> str:
    try:
        detail = response.json()["detail"]
    except (ValueError, KeyError, TypeError):
        detail = None
    return detail if isinstance(detail, str) else f"service: answered {response.status_code} to {response.request.url}"
