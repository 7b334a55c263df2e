"""NVTX ranges, which NVIDIA's Nsight draws beside kernels and copies."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager
from typing import Any

from dlrm.errors import ConfigError
from pipeline.trace import Ranges

_PACKAGES = ("nvtx", "cupy.cuda.nvtx")


def nvtx_ranges() -> Ranges:
    """What makes a range of a name, from whichever package is there.

    Raises:
        ConfigError: none is.
    """
    for name in _PACKAGES:
        try:
            package = importlib.import_module(name)
        except ImportError:
            continue
        return package.annotate if name == "nvtx" else _of_cupy(package)
    raise ConfigError("trace.nvtx: true, but neither nvtx nor cupy can be imported; install nvtx, or set it to false")


def _of_cupy(package: Any) -> Ranges:
    class Range(AbstractContextManager[None]):
        def __init__(self, name: str) -> None:
            self._name = name

        def __enter__(self) -> None:
            package.RangePush(self._name)

        def __exit__(self, *_: object) -> None:
            package.RangePop()

    return Range
