"""Where a kernel's test runs: on the GPU if there is one, otherwise emulated on the CPU, thread by thread."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

# Modules beside the tests can be imported: they are programs of ranks, too.
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "ranks")]

CUDA_MODULES = (
    "embedding.bag_lists_cuda",
    "dlrm.interaction_cuda",
    "dlrm.logit_cuda",
    "dlrm.loss_cuda",
    "dlrm.optim_cuda",
    "dlrm.philox_cuda",
    "dlrm.relu_cuda",
    "embedding.frequent_rows_cuda",
    "embedding.lookup_cuda",
    "embedding.pair_lists_cuda",
    "embedding.row_moves_cuda",
    "embedding.row_sort_cuda",
    "embedding.runs_cuda",
    "embedding.sorted_update_cuda",
    "embedding.sparse_optim_cuda",
    "embedding.touched_rows_cuda",
    "pipeline.score_groups_cuda",
    "pipeline.score_sums_cuda",
    "pipeline.split_records_cuda",
)
"""Launches that run emulated too."""


def _sibling(name: str) -> ModuleType:
    # Test folders are no packages.
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def _has_gpu() -> bool:
    try:
        import cupy

        return int(cupy.cuda.runtime.getDeviceCount()) > 0
    except (ImportError, RuntimeError):  # no CuPy, or no driver
        return False


class Gpu:
    """Arrays go to the GPU and come back."""

    emulated = False

    @staticmethod
    def array(values: Any) -> Any:
        """A copy on the GPU."""
        import cupy

        return cupy.asarray(values)

    @staticmethod
    def host(array: Any) -> np.ndarray:
        """A copy on the host."""
        return np.asarray(array.get())


class Emulated:
    """Arrays stay where they are."""

    emulated = True

    @staticmethod
    def array(values: Any) -> np.ndarray:
        """A C-contiguous copy that starts at 64 bytes."""
        values = np.asarray(values)
        raw = np.empty(values.nbytes + 64, np.uint8)
        start = -raw.ctypes.data % 64
        copy = raw[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
        copy[...] = values
        return copy

    @staticmethod
    def host(array: Any) -> np.ndarray:
        """A copy."""
        return np.array(array)


EMULATED_SAMPLES = 4
"""Of the many shapes and types of test_kernels.py, so many of each test run without a GPU."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU, take few and small ones of the tests that go through many shapes: each compiles a source."""
    if _has_gpu():
        return
    by_test: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.path == Path(__file__).with_name("test_kernels.py"):
            by_test.setdefault(item.name.partition("[")[0], []).append(item)
    left_out: set[pytest.Item] = set()
    for own in by_test.values():
        small = [item for item in own if not re.search(r"\b\d*000\b", item.name)] or own
        kept = {small[at * len(small) // EMULATED_SAMPLES] for at in range(EMULATED_SAMPLES)}
        left_out |= set(own) - kept
    if left_out:
        config.hook.pytest_deselected(items=sorted(left_out, key=items.index))
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def _emulator(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return _sibling("emulator").Emulator(tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``Gpu`` or ``Emulated``, with the launches set up for it."""
    if _has_gpu():
        return Gpu
    if not (sys.platform == "linux" and _sibling("emulator").compiler()):
        pytest.skip("no GPU is visible, and no C++ compiler on Linux to run the CUDA sources with")
    emulator = request.getfixturevalue("_emulator")
    for name in CUDA_MODULES:
        monkeypatch.setattr(importlib.import_module(name), "load", emulator.load)
    limits = (3, 64 * 1024)
    monkeypatch.setattr("embedding.sparse_optim_cuda.device_limits", lambda: limits)
    return Emulated
