"""Which device a rank computes on."""

from __future__ import annotations

import importlib
import importlib.util

import numpy as np

from dlrm.config import RunConfig
from dlrm.device import Device, HostDevice
from dlrm.errors import ConfigError, DeviceError
from embedding.topology import Topology

DTYPES = {"fp32": np.float32, "fp64": np.float64, "fp16": np.float16, "bf16": np.uint16}
"""NumPy has no bfloat16: its bits travel as uint16."""

_PACKAGES = {"cupy": "CuPy", "nvmath": "nvmath-python", "cuda.bindings": "cuda-bindings"}
"""Module and package of what a GPU needs."""


def make_device(config: RunConfig, topology: Topology, threads: int) -> Device:
    """The CPU, or the GPU that is this rank's among those of its machine; with more ranks than GPUs, ranks share.

    Raises:
        ConfigError: a precision that the CPU does not have.
        DeviceError: a GPU is asked for, and there is none for this rank.
    """
    if not uses_gpu(config):
        half = {config.precision, config.table_precision} & {"fp16", "bf16"}
        if half:
            raise ConfigError(
                f"precision: {half.pop()} needs a GPU, and this process sees none; set precision and "
                "embedding.table_precision to fp32"
            )
        return HostDevice(threads)
    _check_packages(config.device)
    from dlrm.cuda import CudaDevice, count_gpus

    return CudaDevice(topology.local_rank % max(1, count_gpus()), threads=threads, graphs=config.cuda.graphs)


def uses_gpu(config: RunConfig) -> bool:
    """Whether a run computes on GPUs: it insists, or has the choice and sees one."""
    return config.device == "cuda" or (config.device == "auto" and _sees_gpu(config))


def _sees_gpu(config: RunConfig) -> bool:
    if config.precision == "fp64" or not _is_there("cupy"):
        return False
    try:
        from dlrm.cuda import count_gpus
    except ImportError:  # CuPy without what it loads itself: of no use, and nobody insists on it
        return False
    return count_gpus() > 0


def _check_packages(wish: str) -> None:
    """See that what a GPU needs is installed.

    Raises:
        DeviceError: it is not, or cannot be loaded.
    """
    missing = [package for module, package in _PACKAGES.items() if not _is_there(module)]
    if missing:
        verb = "are" if len(missing) > 1 else "is"
        raise DeviceError(
            f"device: {wish}, but {' and '.join(missing)} {verb} not installed; pip install 'crosslane[cuda13]' "
            "(or cuda12), or set device: cpu"
        )
    try:
        importlib.import_module("dlrm.cuda")
    except ImportError as error:
        raise DeviceError(
            f"device: {wish}, but CuPy cannot be loaded ({' '.join(str(error).split())}); pip install "
            "'crosslane[cuda13]' (or cuda12), or set device: cpu"
        ) from None


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is missing; also an import hook's way to say no
        return False
