"""One NVIDIA GPU: CuPy arrays, streams and events, pinned memory, CUDA graphs, and the fused kernels beside the
references (``<module>_cuda.py``).

Buffers that cross streams are allocated once and kept: CuPy's pool hands a freed block to the next allocation of the
freeing stream without waiting for other streams.
"""  # noqa: D205

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import cupy
import numpy as np

from dlrm.device import Array, Event, HostDevice, Kernel, Recording
from dlrm.errors import DeviceError

_COMPUTE_FIRST = (8, 0)
"""Oldest compute capability that the kernels are built for."""
_FIRST = frozenset({"ahead"})
"""Streams whose blocks take what multiprocessors become free before those of other streams."""


@dataclass(frozen=True, slots=True)
class CudaEvent:
    """An event of a CUDA stream."""

    handle: Any
    captured: bool = False
    """Whether it exists inside a capture alone."""

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


@dataclass(frozen=True, slots=True)
class CudaReading:
    """Numbers on their way to the host."""

    host: Array
    event: Any

    def values(self) -> Array:
        """The host's copy; waits until it is there."""
        self.event.synchronize()
        return self.host


class CudaDevice:
    """One GPU of this process.

    Args:
        index: which of the visible GPUs.
        threads: of the host, for what is done there.
        graphs: capture what is issued again and again into CUDA graphs.

    Raises:
        DeviceError: there is no such GPU, or it is too old.
    """

    xp: ModuleType = cupy
    column_multiple = 8
    """Columns of matrices are padded to a multiple of this, so that every row starts at 16 bytes in half precision."""
    fuses_relu = True
    steps_behind = 2

    def __init__(self, index: int = 0, *, threads: int = 1, graphs: bool = True) -> None:
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
        self.threads, self.graphs = threads, graphs
        self._host = HostDevice(threads)
        self._streams: dict[str, Any] = {}
        self._kernels: dict[tuple[str, str], Kernel | None] = {}
        self.stream("main").use()

    @property
    def host(self) -> HostDevice:
        """The CPU beside it."""
        return self._host

    @property
    def name(self) -> str:
        """The GPU's product name."""
        return str(cupy.cuda.runtime.getDeviceProperties(self.index)["name"].decode())

    @property
    def bus_id(self) -> str:
        """Where the GPU sits in its machine: the same for every process that uses it."""
        return str(cupy.cuda.runtime.deviceGetPCIBusId(self.index))

    def memory(self) -> tuple[int, int]:
        """Free and total bytes of the GPU's memory."""
        free, total = cupy.cuda.runtime.memGetInfo()
        return int(free), int(total)

    def free_memory(self) -> int:
        """Bytes that can be allocated, those that CuPy keeps for reuse included."""
        return self.memory()[0] + int(cupy.get_default_memory_pool().free_bytes())

    def stream(self, name: str) -> Any:
        """The CuPy stream of that name, made at its first use."""
        if name not in self._streams:
            self._streams[name] = cupy.cuda.Stream(non_blocking=True, priority=-int(name in _FIRST))
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

    def assign(self, host: Array, target: Array) -> None:
        """Write a host array into a device array of the same shape and any strides; waits for it."""
        self.convert(cupy.asarray(host), target)
        cupy.cuda.get_current_stream().synchronize()

    def convert(self, source: Array, target: Array) -> None:
        """See ``Device.convert``."""
        if source.dtype == target.dtype or (source.dtype != np.uint16 and target.dtype != np.uint16):
            target[...] = source
        elif target.dtype == np.uint16:
            _TO_BFLOAT16(source.astype(np.float32, copy=False), target)
        else:
            target[...] = (source.astype(np.uint32) << 16).view(np.float32)

    def to_host(self, array: Array) -> Array:
        """A copy in host memory."""
        if isinstance(array, np.ndarray):
            return array
        return self.download(array, np.empty(array.shape, array.dtype))

    def read_later(self, array: Array) -> CudaReading:
        """Start to copy a small array to page-locked memory, behind what was issued on the current stream."""
        host = self.pinned_empty(array.shape, array.dtype)
        stream = cupy.cuda.get_current_stream()
        array.get(out=host, stream=stream, blocking=False)
        event = cupy.cuda.Event(disable_timing=True)
        event.record(stream)
        return CudaReading(host, event)

    def mark(self) -> Any:
        """An event on the current stream."""
        event = cupy.cuda.Event()
        event.record(cupy.cuda.get_current_stream())
        return event

    def elapsed(self, start: Any, end: Any) -> float:
        """Seconds between two events; waits for both."""
        start.synchronize()
        end.synchronize()
        return 1e-3 * float(cupy.cuda.get_elapsed_time(start, end))

    @contextmanager
    def streams(self, names: Sequence[str]) -> Iterator[CudaStreams]:
        """CUDA streams of these names; what the caller issues meanwhile goes on the main one."""
        with self.stream("main"):
            yield CudaStreams(self, names)
            self.synchronize()

    def record(self) -> CudaEvent:
        """See ``dlrm.device.Device.record``."""
        event = cupy.cuda.Event(disable_timing=True)
        event.record(cupy.cuda.get_current_stream())
        return CudaEvent(event)

    @contextmanager
    def on(self, stream: str, after: Sequence[Event] = ()) -> Iterator[None]:
        """See ``dlrm.device.Device.on``."""
        cupy.cuda.Device(self.index).use()  # a thread of its own begins on the first GPU
        target = self.stream(stream)
        for event in after:
            assert isinstance(event, CudaEvent)
            target.wait_event(event.handle)
        with target:
            try:
                yield
            finally:
                target.synchronize()

    def capture(self, stream: str, issue: Callable[[], None]) -> CudaGraph:
        """Record what ``issue`` puts on ``stream`` as a graph; nothing runs.

        ``issue`` must not allocate, synchronise, or read results on the host.
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

    def synchronize(self) -> None:
        """Wait for everything that has been issued on any stream."""
        cupy.cuda.Device(self.index).synchronize()


class CudaStreams:
    """The streams of a schedule, and work on them as CUDA graphs."""

    def __init__(self, device: CudaDevice, names: Sequence[str]) -> None:
        """Order all of them behind what was issued on the main stream."""
        self._device = device
        self._main = device.stream("main")
        self._streams = {name: device.stream(name) for name in names}
        self._capturing = False
        start = self._record(self._main)
        for stream in self._streams.values():
            stream.wait_event(start.handle)

    def issue(self, stream: str, work: Callable[[], None], after: Sequence[Event] = ()) -> CudaEvent:
        """See ``dlrm.device.Streams.issue``."""
        target = self._streams[stream]
        for event in after:
            assert isinstance(event, CudaEvent)
            if event.captured == self._capturing:  # ``repeat`` has waited for the others
                target.wait_event(event.handle)
        with target:
            work()
        return self._record(target)

    def repeat(self, issue: Callable[[], Sequence[Event]], after: Sequence[Event], recording: Recording | None) -> None:
        """See ``dlrm.device.Streams.repeat``: the first time as it is, the second time into a graph."""
        if recording is None or not self._device.graphs:
            self.join(issue())
            return
        recording.runs += 1
        if recording.runs == 1:  # algorithms are chosen and kernels compiled, which no capture allows
            self.join(issue())
            return
        if recording.graph is None:
            recording.graph = self._capture(issue)
        for event in after:
            assert isinstance(event, CudaEvent)
            self._main.wait_event(event.handle)
        recording.graph.launch(self._main)
        self.join([self._record(self._main)])

    def join(self, events: Sequence[Event]) -> None:
        """See ``dlrm.device.Streams.join``; the host waits for nothing."""
        for stream in (self._main, *self._streams.values()):
            for event in events:
                assert isinstance(event, CudaEvent)
                stream.wait_event(event.handle)

    def _capture(self, issue: Callable[[], Sequence[Event]]) -> Any:
        self._main.begin_capture()
        self._capturing = True
        try:
            fork = self._record(self._main)
            for stream in self._streams.values():
                if stream is not self._main:
                    stream.wait_event(fork.handle)
            issue()
            for stream in self._streams.values():
                if stream is not self._main:
                    self._main.wait_event(self._record(stream).handle)
        except BaseException:
            # A broken capture has to be ended before the stream can be used again.
            with suppress(cupy.cuda.runtime.CUDARuntimeError):
                self._main.end_capture()
            raise
        finally:
            self._capturing = False
        return self._main.end_capture()

    def _record(self, stream: Any) -> CudaEvent:
        event = cupy.cuda.Event(disable_timing=True)
        event.record(stream)
        return CudaEvent(event, self._capturing)


_TO_BFLOAT16 = cupy.ElementwiseKernel(
    "float32 x", "uint16 y",
    """
    unsigned int bits = __float_as_uint(x);
    y = x != x ? 0x7fffu : (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    """,
    "to_bfloat16",
)  # fmt: skip


def count_gpus() -> int:
    """GPUs that this process sees; 0 also where the driver is missing."""
    try:
        return int(cupy.cuda.runtime.getDeviceCount())
    except cupy.cuda.runtime.CUDARuntimeError:
        return 0
