"""Where the ready configs lie (standard library only)."""

from __future__ import annotations

from pathlib import Path

from dlrm.errors import ConfigError

_IN_A_WHEEL = Path(__file__).resolve().parent / "examples"
_IN_A_CHECKOUT = Path(__file__).resolve().parents[1] / "examples"


def ready_configs() -> dict[str, Path]:
    """Files of the ready configs by name: ``examples/`` of a checkout, or the copy that a wheel carries (``setup.py``).

    Raises:
        ConfigError: there are none; the installation is not whole.
    """
    for folder in (_IN_A_WHEEL, _IN_A_CHECKOUT):
        if paths := sorted(folder.glob("*.yaml")):
            return {path.stem: path for path in paths}
    raise ConfigError(f"ready configs: none in {_IN_A_WHEEL}; install crosslane again")


def ready_config(name: str) -> Path:
    """File of one ready config.

    Raises:
        ConfigError: there is none of this name.
    """
    paths = ready_configs()
    if name not in paths:
        raise ConfigError(f"example {name!r}: unknown; name one of {', '.join(paths)}")
    return paths[name]
