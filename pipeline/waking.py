"""Waking this rank's GPU while Python still loads what will use it (standard library only)."""

from __future__ import annotations

import ctypes
from threading import Thread
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dlrm.config import RunConfig


def wake_gpu(config: RunConfig, local_rank: int) -> Thread | None:
    """Begin to load the driver and to make the context of this rank's GPU, which take half a second and no Python.

    Nothing is reported: whoever then asks for the GPU waits for as much as is left, and finds out what is wrong.

    Args:
        config: of the run.
        local_rank: this rank's number on its machine.

    Returns:
        The thread that does it; ``None``: the config wants no GPU.
    """
    if config.device == "cpu" or (config.device == "auto" and config.precision == "fp64"):
        return None
    thread = Thread(target=_wake, args=(local_rank,), name="waking", daemon=True)
    thread.start()
    return thread


def _wake(local_rank: int) -> None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    count, gpu, context = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return
    # As ``make_device`` chooses. The context that CUDA's runtime uses, too; it is kept until the process ends.
    if not driver.cuDeviceGet(ctypes.byref(gpu), local_rank % count.value):
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), gpu)
