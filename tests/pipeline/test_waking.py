"""A rank's GPU is woken while Python loads: which one, and never to a run's harm."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from dlrm.config import RunConfig, parse_run_config
from pipeline.waking import wake_gpu


class Driver:
    """What libcuda does, written down."""

    def __init__(self, gpus: int, status: int = 0) -> None:
        self.gpus, self.status, self.calls = gpus, status, []  # type: ignore[var-annotated]

    def cuInit(self, flags: int) -> int:  # noqa: N802  CUDA's names
        self.calls.append(("init", flags))
        return self.status

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = self.gpus
        return 0

    def cuDeviceGet(self, gpu: Any, index: int) -> int:  # noqa: N802
        gpu._obj.value = 100 + index
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, gpu: ctypes.c_int) -> int:  # noqa: N802
        self.calls.append(("context", gpu.value))
        context._obj.value = 1
        return 0


def config_of(device: str, precision: str = "fp32") -> RunConfig:
    model = {"embedding_dim": 8, "bottom_mlp": [8], "top_mlp": [1]}
    return parse_run_config({"data": {"path": "set"}, "model": model, "device": device, "precision": precision})


def wake(monkeypatch: pytest.MonkeyPatch, driver: Driver | OSError, local_rank: int) -> None:
    def load(name: str) -> Driver:
        assert name == "libcuda.so.1"
        if isinstance(driver, OSError):
            raise driver
        return driver

    monkeypatch.setattr("pipeline.waking.ctypes.CDLL", load)
    thread = wake_gpu(config_of("auto"), local_rank)
    assert thread is not None
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize(("local_rank", "gpu"), [(0, 100), (1, 101), (2, 100), (5, 101)])
def test_ranks_share_gpus_as_make_device_has_them(monkeypatch: pytest.MonkeyPatch, local_rank: int, gpu: int) -> None:
    driver = Driver(2)
    wake(monkeypatch, driver, local_rank)
    assert driver.calls == [("init", 0), ("context", gpu)]


@pytest.mark.parametrize("driver", [Driver(0), Driver(2, status=100)])
def test_without_a_gpu_nothing_is_held(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> None:
    wake(monkeypatch, driver, 0)
    assert driver.calls == [("init", 0)]


def test_without_a_driver_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    wake(monkeypatch, OSError("libcuda.so.1: cannot open shared object file"), 0)


@pytest.mark.parametrize("form", [("cpu", "fp32"), ("auto", "fp64")])
def test_a_run_on_cpus_wakes_none(monkeypatch: pytest.MonkeyPatch, form: tuple[str, str]) -> None:
    monkeypatch.setattr("pipeline.waking.ctypes.CDLL", None)
    assert wake_gpu(config_of(*form), 0) is None
