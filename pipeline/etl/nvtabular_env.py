"""The environment of its own that NVTabular needs: made once, remembered, found again.

NVTabular 23.8 is its last release. On a CPU it works only with the versions pinned here, which no environment can share
with Crosslane (NumPy 1, pandas 1.5), and which have wheels for Python 3.10 and 3.11.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from dlrm.errors import ConfigError

PINS = (
    "nvtabular==23.8.0",
    "merlin-core==23.8.0",
    "numpy==1.26.4",
    "pandas==1.5.3",
    "dask[dataframe]==2023.9.2",
    "distributed==2023.9.2",
    "dask-cuda==23.10.0",
    "pyarrow==14.0.2",
    "numba==0.60.0",
)
VARIABLE = "CROSSLANE_NVTABULAR"
"""Names the folder of the environment, in place of the one that is remembered."""
_PYTHONS = ((3, 10), (3, 11))
_PROBE = "import importlib.metadata as m, json, nvtabular; print(json.dumps(m.version('nvtabular')))"
_REMEDY = "make it with `crosslane env nvtabular`"
_TIMEOUT_S = 1800


def default_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """``$XDG_DATA_HOME/crosslane/environments/nvtabular``, or below ``~/.local/share``."""
    base = environ.get("XDG_DATA_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".local" / "share") / (
        "crosslane/environments/nvtabular"
    )


def _note(environ: Mapping[str, str]) -> Path:
    """Where the folder is remembered."""
    return default_folder(environ).with_suffix(".json")


def find_environment(environ: Mapping[str, str] = os.environ) -> Path:
    """The interpreter of the environment: that of ``CROSSLANE_NVTABULAR``, or the remembered one.

    Raises:
        ConfigError: there is none, or its folder is gone.
    """
    if named := environ.get(VARIABLE):
        folder, whence = Path(named), VARIABLE
    else:
        note = _note(environ)
        try:
            folder, whence = Path(json.loads(note.read_bytes())["folder"]), str(note)
        except FileNotFoundError:
            raise ConfigError(f"--engine nvtabular: its environment is not there; {_REMEDY}") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{note}: not readable ({error}); {_REMEDY}") from None
    python = _python_of(folder)
    if not python.is_file():
        raise ConfigError(f"{folder}: no environment there, though {whence} names it; {_REMEDY}")
    return python


def make_environment(
    folder: Path | None = None, python: str | None = None, environ: Mapping[str, str] = os.environ
) -> Path:
    """Make the environment, or take the one that is there, and remember where.

    Args:
        folder: of the environment; ``None``: ``default_folder()``.
        python: interpreter to make it with; ``None``: this one or the first one that fits.
        environ: of this process.

    Returns:
        The folder.

    Raises:
        ConfigError: no interpreter fits, or the packages cannot be installed.
    """
    folder = (folder or default_folder(environ)).absolute()
    if not works(_python_of(folder)):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(
                f"{folder}: holds something else, or an unfinished environment; remove it or name another"
            )
        base = _fitting_python(python)
        inside = str(_python_of(folder))
        try:
            _run([base, "-m", "venv", str(folder)], "make the environment")
            _run([inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PINS], "install NVTabular")
            _run([inside, "-I", "-c", _PROBE], "load NVTabular")
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    note = _note(environ)
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps({"folder": str(folder)}) + "\n", encoding="utf-8")
    return folder


def works(python: Path) -> bool:
    """Whether an interpreter has the pinned NVTabular, and loads it."""
    if not python.is_file():
        return False
    done = subprocess.run([str(python), "-I", "-c", _PROBE], capture_output=True, text=True, check=False)
    return done.returncode == 0 and f"nvtabular=={json.loads(done.stdout)}" == PINS[0]


def _python_of(folder: Path) -> Path:
    return folder / "bin" / "python"


def _fitting_python(named: str | None) -> str:
    """An interpreter of a version that the pinned packages have wheels for."""
    versions = " or ".join(f"{major}.{minor}" for major, minor in _PYTHONS)
    candidates = [named] if named else [sys.executable, *(f"python{a}.{b}" for a, b in reversed(_PYTHONS))]
    found = []
    for candidate in candidates:
        path = shutil.which(candidate)
        version = _version(path) if path else None
        if path and version in _PYTHONS:
            return path
        found.append(f"{candidate} is {'.'.join(map(str, version)) if version else 'not there'}")
    raise ConfigError(
        f"NVTabular 23.8 needs Python {versions}, but {', '.join(found)}; install one and name it with --python"
    )


def _version(python: str) -> tuple[int, int] | None:
    probe = "import sys, ensurepip, venv; print(*sys.version_info[:2])"
    done = subprocess.run([python, "-I", "-c", probe], capture_output=True, text=True, check=False)
    if done.returncode:
        return None
    major, minor = done.stdout.split()
    return int(major), int(minor)


def _run(command: list[str], what: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{command[0]}: could not {what} within {_TIMEOUT_S} s; try again") from None
    if done.returncode:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        reason = lines[-1].removeprefix("ERROR: ") if lines else f"exit code {done.returncode}"
        raise ConfigError(f"{command[0]}: could not {what} ({reason}); check the network and try again")
