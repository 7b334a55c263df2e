"""Which device a rank computes on."""

from __future__ import annotations

import importlib.util

import numpy as np

from dlrm.config import RunConfig
from dlrm.device import Device, HostDevice
from dlrm.errors import ConfigError, DeviceError
from embedding.topology import Topology

DTYPES = {"fp32": np.float32, "fp64": np.float64, "fp16": np.float16, "bf16": np.uint16}
"""NumPy has no bfloat16: its bits travel as uint16."""


def make_device(config: RunConfig, topology: Topology, threads: int) -> Device:
    """The CPU, or the GPU that is this rank's among those of its machine.

    Raises:
        ConfigError: a precision that the CPU does not have.
        DeviceError: a GPU is asked for, and there is none for this rank.
    """
    if config.device == "cpu" or (config.device == "auto" and not _sees_gpu(config)):
        half = {config.precision, config.table_precision} & {"fp16", "bf16"}
        if half:
            raise ConfigError(
                f"precision: {half.pop()} needs a GPU, and this process sees none; set precision and "
                "embedding.table_precision to fp32"
            )
        return HostDevice(threads)
    if not _has_cupy():
        raise DeviceError(
            "device: cuda, but CuPy is not installed; pip install 'crosslane[cuda13]' (or cuda12), or set device: cpu"
        )
    from dlrm.cuda import CudaDevice

    return CudaDevice(topology.local_rank, threads=threads, graphs=config.cuda.graphs)


def _sees_gpu(config: RunConfig) -> bool:
    if config.precision == "fp64" or not _has_cupy():
        return False
    from dlrm.cuda import count_gpus

    return count_gpus() > 0


def _has_cupy() -> bool:
    try:
        return importlib.util.find_spec("cupy") is not None
    except ModuleNotFoundError:  # an import hook's way to say no
        return False
