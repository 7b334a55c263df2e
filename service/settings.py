"""What the service and its client run with: the only reader of the environment (standard library only).

=========================== ==========================================================================
``CROSSLANE_HOME``          folder of the service: data base, jobs, prepared data sets
``CROSSLANE_HOST``          address to bind, ``127.0.0.1`` unless set; another one needs a token
``CROSSLANE_PORT``          port to bind, 8470 unless set; 0 takes a free one
``CROSSLANE_TOKEN``         bearer token that every request but ``/healthz`` must then carry
``CROSSLANE_TOKEN_FILE``    file that holds the token
``CROSSLANE_ALLOWED_HOSTS`` further names, comma-separated, under which clients reach the service
``CROSSLANE_CORES``         cores to share out, those of the affinity mask unless set
``CROSSLANE_GPUS``          GPU numbers to share out, comma-separated, those found unless set
``CROSSLANE_STOP_SECONDS``  time that a stopped job has to write its checkpoint, 60 unless set
``CROSSLANE_URL``           where the client looks for the service
=========================== ==========================================================================
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dlrm.errors import ConfigError

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8470


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of one service.

    Raises:
        ConfigError: an address other than loopback without a token, or a value out of range.
    """

    home: Path
    """Holds ``service.db``, ``jobs/<id>/`` and ``data/<name>/``."""
    cores: int
    gpus: tuple[str, ...] = ()
    """Entries of ``CUDA_VISIBLE_DEVICES`` that jobs may be given."""
    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT
    token: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    stop_jobs: bool = False
    """Stop the running jobs when the service ends; otherwise they run on and are found again."""
    stop_seconds: float = 60.0
    """From the request to stop until SIGTERM: the time for a checkpoint."""
    kill_seconds: float = 10.0
    """From SIGTERM until SIGKILL."""
    poll_seconds: float = 0.25
    """Between two looks of the supervisor."""
    engine: tuple[str, ...] = ("-m", "pipeline.train")
    """The interpreter's arguments that start the engine; tests put a script here."""

    def __post_init__(self) -> None:
        """Check the values."""
        if not is_loopback(self.host) and not self.token:
            raise ConfigError(
                f"host {self.host}: reachable from other machines, and no token is set; "
                "set CROSSLANE_TOKEN or --token-file, or bind 127.0.0.1"
            )
        if not 0 <= self.port <= 65_535:
            raise ConfigError(f"port {self.port}: must lie between 0 and 65535")
        if self.cores < 1:
            raise ConfigError(f"cores {self.cores}: must be at least 1")
        if self.token is not None and not re.fullmatch(r"[!-~]+", self.token):
            raise ConfigError("token: empty or with blanks or non-ASCII characters; use printable ASCII alone")
        if self.stop_seconds < 0 or self.kill_seconds < 0:
            raise ConfigError(f"stop seconds {self.stop_seconds}: must not be negative")

    @property
    def jobs(self) -> Path:
        """Folder of the jobs' folders."""
        return self.home / "jobs"

    @property
    def data(self) -> Path:
        """Folder of the prepared data sets that jobs name."""
        return self.home / "data"


def load_settings(
    *,
    host: str | None = None,
    port: int | None = None,
    home: Path | None = None,
    token_file: Path | None = None,
    stop_jobs: bool = False,
    environ: Mapping[str, str] = os.environ,
) -> Settings:
    """Settings from the command line, then the environment, then the defaults.

    Raises:
        ConfigError: a value is malformed, out of range, or refused without a token.
    """
    gpus = environ.get("CROSSLANE_GPUS")
    return Settings(
        home=(home or default_home(environ)).expanduser().absolute(),
        host=host or environ.get("CROSSLANE_HOST") or DEFAULT_HOST,
        port=_integer(environ, "CROSSLANE_PORT", DEFAULT_PORT) if port is None else port,
        token=read_token(token_file, environ),
        allowed_hosts=_entries(environ.get("CROSSLANE_ALLOWED_HOSTS", "").lower()),
        cores=_integer(environ, "CROSSLANE_CORES", available_cores()),
        gpus=available_gpus(environ) if gpus is None else _entries(gpus),
        stop_seconds=float(_integer(environ, "CROSSLANE_STOP_SECONDS", 60)),
        stop_jobs=stop_jobs,
    )


def default_home(environ: Mapping[str, str] = os.environ) -> Path:
    """``CROSSLANE_HOME``, or ``crosslane`` in the user's folder for application data."""
    if home := environ.get("CROSSLANE_HOME"):
        return Path(home)
    data = environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share") / "crosslane"


def read_token(file: Path | None = None, environ: Mapping[str, str] = os.environ) -> str | None:
    """The token from a file or the environment; ``None`` if there is none.

    Raises:
        ConfigError: the file is unreadable or empty.
    """
    named = environ.get("CROSSLANE_TOKEN_FILE")
    path = file or (Path(named) if named else None)
    if path is None:
        return environ.get("CROSSLANE_TOKEN") or None
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise ConfigError(f"token file {path}: {reason}; name a readable file that holds the token") from None
    if not token:
        raise ConfigError(f"token file {path}: empty; write the token into it")
    return token


def client_address(environ: Mapping[str, str] = os.environ) -> str:
    """Where the client looks for the service: ``CROSSLANE_URL``, or what the service would bind."""
    if url := environ.get("CROSSLANE_URL"):
        return url.rstrip("/")
    host = environ.get("CROSSLANE_HOST") or DEFAULT_HOST
    # An address that means "every interface" cannot be connected to everywhere.
    host = {"0.0.0.0": DEFAULT_HOST, "::": "::1"}.get(host, host)  # noqa: S104  compared, not bound
    return service_url(host, _integer(environ, "CROSSLANE_PORT", DEFAULT_PORT))


def service_url(host: str, port: int) -> str:
    """The address of a service as clients write it."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def inherited_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What a job inherits: everything but the service's secrets."""
    secret = {"CROSSLANE_TOKEN", "CROSSLANE_TOKEN_FILE"}
    return {name: value for name, value in environ.items() if name not in secret}


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server bound to ``host``."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def available_cores() -> int:
    """Cores of this process's affinity mask."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_gpus(environ: Mapping[str, str] = os.environ, devices: Path = Path("/dev")) -> tuple[str, ...]:
    """Entries of ``CUDA_VISIBLE_DEVICES`` if it is set, else the numbers of the NVIDIA device files."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        # CUDA ignores what follows an invalid entry; -1 is the customary one.
        entries = _entries(visible)
        return entries[: entries.index("-1")] if "-1" in entries else entries
    numbers = (re.fullmatch(r"nvidia(\d+)", path.name) for path in devices.glob("nvidia*"))
    return tuple(sorted((match[1] for match in numbers if match), key=int))


def _entries(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _integer(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, "").strip()
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name}: must be an integer, not {text!r}") from None
