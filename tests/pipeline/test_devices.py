"""Which device a run gets, and what it is told where it gets none."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any

import pytest

from dlrm.config import RunConfig, parse_run_config
from dlrm.device import HostDevice
from dlrm.errors import ConfigError, CrosslaneError, DeviceError
from embedding.comm import SingleComm
from embedding.topology import discover
from pipeline.devices import make_device

PACKAGES = ("cupy", "nvmath", "cuda.bindings")


def config(**fields: Any) -> RunConfig:
    return parse_run_config({"data": {"path": "nowhere"}, **fields})


class Gpu(HostDevice):
    """Stands for ``CudaDevice``: remembers which it was asked to be."""

    def __init__(self, index: int, *, threads: int, graphs: bool) -> None:
        super().__init__(threads)
        self.index, self.graphs = index, graphs


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a machine: so many GPUs, these packages missing, CuPy broken or not."""
    real_spec, real_import = importlib.util.find_spec, importlib.import_module

    def make(gpus: int, missing: tuple[str, ...] = (), broken: str = "") -> None:
        module = types.ModuleType("dlrm.cuda")
        module.count_gpus = lambda: gpus  # type: ignore[attr-defined]
        module.CudaDevice = Gpu  # type: ignore[attr-defined]
        # An entry of None makes an import fail.
        monkeypatch.setitem(sys.modules, "dlrm.cuda", None if broken else module)

        def find_spec(name: str, *rest: Any) -> Any:
            if name in PACKAGES:
                return None if name in missing else types.SimpleNamespace()
            return real_spec(name, *rest)

        def import_module(name: str, *rest: Any) -> Any:
            if name == "dlrm.cuda" and broken:
                raise ImportError(broken)
            return real_import(name, *rest)

        monkeypatch.setattr(importlib.util, "find_spec", find_spec)
        monkeypatch.setattr(importlib, "import_module", import_module)

    return make


def device_of(values: RunConfig) -> Any:
    return make_device(values, discover(SingleComm()), 1)


def test_auto_takes_a_gpu_where_there_is_one(machine: Any) -> None:
    machine(1)
    found = device_of(config(cuda={"graphs": False}))
    assert (type(found), found.index, found.graphs) == (Gpu, 0, False)
    assert type(device_of(config(device="cpu"))) is HostDevice
    assert type(device_of(config(precision="fp64"))) is HostDevice
    assert type(device_of(config(device="cuda", precision="fp16"))) is Gpu


@pytest.mark.parametrize(
    "lacks", [{"gpus": 0}, {"gpus": 1, "missing": ("cupy",)}, {"gpus": 1, "broken": "libcuda.so.1"}]
)
def test_auto_takes_the_cpu_where_there_is_none(machine: Any, lacks: dict[str, Any]) -> None:
    machine(**lacks)
    assert type(device_of(config())) is HostDevice
    with pytest.raises(ConfigError, match=r"precision: bf16 needs a GPU, and this process sees none"):
        device_of(config(precision="bf16"))
    with pytest.raises(ConfigError, match=r"fp16 needs a GPU"):
        device_of(config(embedding={"table_precision": "fp16"}))


@pytest.mark.parametrize("device", ["auto", "cuda"])
@pytest.mark.parametrize("missing", [("nvmath",), ("cuda.bindings",), ("nvmath", "cuda.bindings")])
def test_half_of_the_packages_are_an_error_with_a_remedy(machine: Any, device: str, missing: tuple[str, ...]) -> None:
    machine(1, missing)
    with pytest.raises(DeviceError, match=rf"device: {device}, but .*not installed; pip install 'crosslane\[cuda13\]'"):
        device_of(config(device=device))


@pytest.mark.parametrize(
    ("lacks", "words"),
    [
        ({"missing": PACKAGES}, "CuPy and nvmath-python and cuda-bindings are not installed"),
        ({"broken": "libcublas.so.13:\n cannot open"}, r"CuPy cannot be loaded \(libcublas.so.13: cannot open\)"),
    ],
)
def test_cuda_insists(machine: Any, lacks: dict[str, Any], words: str) -> None:
    machine(1, **lacks)
    with pytest.raises(CrosslaneError, match=words) as caught:
        device_of(config(device="cuda"))
    assert caught.value.exit_code == DeviceError.exit_code
    assert "\n" not in str(caught.value)
