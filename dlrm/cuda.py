"""One NVIDIA GPU: CuPy arrays, streams and events, pinned memory, CUDA graphs, and the fused kernels beside the
references (``<module>_cuda.py``).

Buffers that cross streams are allocated once and kept: CuPy's pool hands a freed block to the next allocation of the
freeing stream without waiting for other streams.
"""  # noqa: D205

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import cupy
import numpy as np

from dlrm.device import Array, Event, Kernel
from dlrm.errors import DeviceError

_COMPUTE_FIRST = (8, 0)
"""Oldest compute capability that the kernels are built for."""


@dataclass(frozen=True, slots=True)
class CudaEvent:
    """An event of a CUDA stream."""

    handle: Any

    def done(self) -> bool:
        """Whether everything issued before it has ended."""
        return bool(self.handle.done)

    def synchronize(self) -> None:
        """Block the calling thread until it has."""
        self.handle.synchronize()


@dataclass(frozen=True, slots=True)
class CudaGraph:
    """Captured work."""

    handle: Any

    def launch(self) -> None:
        """Issue it once more, on the current stream."""
        self.handle.launch(cupy.cuda.get_current_stream())


class CudaDevice:
    """One GPU of this process.

    Args:
        index: which of the visible GPUs.

    Raises:
        DeviceError: there is no such GPU, or it is too old.
    """

    xp: ModuleType = cupy
    threads = 1
    captures = True
    column_multiple = 8
    """Columns of matrices are padded to a multiple of this, so that every row starts at 16 bytes in half precision."""

    def __init__(self, index: int = 0) -> None:
        available = count_gpus()
        if index >= available:
            raise DeviceError(
                f"device: GPU {index} was asked for, but {available} are visible; start at most that many ranks a "
                "host, or set device: cpu"
            )
        self.index = index
        device = cupy.cuda.Device(index)
        device.use()
        major, minor = divmod(int(device.compute_capability), 10)
        if (major, minor) < _COMPUTE_FIRST:
            raise DeviceError(
                f"device: GPU {index} has compute capability {major}.{minor}, but the kernels need "
                f"{_COMPUTE_FIRST[0]}.{_COMPUTE_FIRST[1]}; set device: cpu"
            )
        self._streams: dict[str, Any] = {}
        self._kernels: dict[tuple[str, str], Kernel | None] = {}
        self.stream("main").use()

    @property
    def name(self) -> str:
        """The GPU's product name."""
        return str(cupy.cuda.runtime.getDeviceProperties(self.index)["name"].decode())

    def memory(self) -> tuple[int, int]:
        """Free and total bytes of the GPU's memory."""
        free, total = cupy.cuda.runtime.memGetInfo()
        return int(free), int(total)

    def stream(self, name: str) -> Any:
        """The CuPy stream of that name, made at its first use."""
        if name not in self._streams:
            self._streams[name] = cupy.cuda.Stream(non_blocking=True)
        return self._streams[name]

    def kernel(self, module: str, name: str) -> Kernel | None:
        """The function ``name`` of ``<module>_cuda``, or ``None`` where there is none: run the reference."""
        key = (module, name)
        if key not in self._kernels:
            beside = f"{module}_cuda"
            found = importlib.util.find_spec(beside) is not None
            self._kernels[key] = getattr(importlib.import_module(beside), name, None) if found else None
        return self._kernels[key]

    def empty(self, shape: int | tuple[int, ...], dtype: Any) -> Array:
        """An uninitialised C-contiguous array of the GPU.

        Raises:
            DeviceError: there is not enough memory left.
        """
        try:
            return cupy.empty(shape, dtype)
        except cupy.cuda.memory.OutOfMemoryError:
            sizes = (shape,) if isinstance(shape, int) else shape
            wanted = math.prod(sizes) * np.dtype(dtype).itemsize
            free, total = self.memory()
            raise DeviceError(
                f"device: {wanted / 2**30:.2f} GiB do not fit on GPU {self.index}, which has {free / 2**30:.2f} of "
                f"{total / 2**30:.2f} GiB free; use more ranks, fp16 tables or a smaller batch"
            ) from None

    def zeros(self, shape: int | tuple[int, ...], dtype: Any) -> Array:
        """An array of zeros of the GPU."""
        array = self.empty(shape, dtype)
        array.fill(0)
        return array

    def relu_mask(self, rows: int, columns: int, training: bool) -> Array | None:
        """Bits [rows, columns rounded up to 128] for cublasLt, which writes them beside the output."""
        return self.zeros((rows, -(-columns // 128) * 16), np.uint8) if training else None

    def pinned_empty(self, shape: int | tuple[int, ...], dtype: Any) -> Array:
        """An uninitialised page-locked host array, which copies to the GPU without another copy."""
        sizes = (shape,) if isinstance(shape, int) else shape
        count = math.prod(sizes)
        memory = cupy.cuda.alloc_pinned_memory(max(1, count * np.dtype(dtype).itemsize))
        return np.frombuffer(memory, dtype, count).reshape(sizes)

    def upload(self, host: Array, out: Array) -> Array:
        """Copy ``host`` into ``out`` of the same shape, in the order of the current stream; returns ``out``.

        ``host`` may be changed again once the stream has got there; a copy from pageable memory is staged at once.
        """
        if out.size:
            out.set(np.ascontiguousarray(host, out.dtype), stream=cupy.cuda.get_current_stream())
        return out

    def download(self, array: Array, out: Array) -> Array:
        """Copy ``array`` into the host array ``out`` of the same shape, and wait for it; returns ``out``."""
        if array.size:
            values = cupy.ascontiguousarray(array)
            if values.dtype == out.dtype and out.flags.c_contiguous:
                values.get(out=out, stream=cupy.cuda.get_current_stream())
            else:
                np.copyto(out, values.get(), casting="same_kind")
            cupy.cuda.get_current_stream().synchronize()
        return out

    @contextmanager
    def on(self, stream: str) -> Iterator[None]:
        """Issue what is called inside the ``with`` block on ``stream``."""
        with self.stream(stream):
            yield

    def record(self, stream: str) -> Event:
        """An event after everything that has been issued on ``stream``."""
        event = cupy.cuda.Event(disable_timing=True)
        event.record(self.stream(stream))
        return CudaEvent(event)

    def wait(self, event: Event) -> None:
        """Let the current stream go on only after ``event``."""
        assert isinstance(event, CudaEvent)
        cupy.cuda.get_current_stream().wait_event(event.handle)

    def synchronize(self) -> None:
        """Wait for everything that has been issued on any stream."""
        cupy.cuda.Device(self.index).synchronize()

    def capture(self, stream: str, issue: Callable[[], None]) -> CudaGraph:
        """Record what ``issue`` puts on ``stream``, and on streams that wait for it and are waited for, as a graph.

        Nothing runs. ``issue`` must not allocate, synchronise, or read results on the host.
        """
        origin = self.stream(stream)
        with origin:
            origin.begin_capture()
            try:
                issue()
            except BaseException:
                # A broken capture has to be ended before the stream can be used again.
                with suppress(cupy.cuda.runtime.CUDARuntimeError):
                    origin.end_capture()
                raise
            graph = origin.end_capture()
        return CudaGraph(graph)


def count_gpus() -> int:
    """GPUs that this process sees; 0 also where the driver is missing."""
    try:
        return int(cupy.cuda.runtime.getDeviceCount())
    except cupy.cuda.runtime.CUDARuntimeError:
        return 0
