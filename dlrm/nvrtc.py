"""CUDA sources to loaded kernels: NVRTC, a cache on disk, and nothing else.

``compile_cubin`` needs neither a GPU nor CuPy; ``load`` adds CuPy's module loader. The sources include no header but
``dlrm/kernels.cuh``, so that no CUDA toolkit has to be installed.

``CROSSLANE_FORCE_ARCH=80`` makes every kernel take the branch that it has for that architecture, on whatever GPU
runs it: the way to test the fallbacks of instructions that are newer.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dlrm.errors import DeviceError

HEADER = Path(__file__).with_name("kernels.cuh")
MINIMUM_ARCH = 80
"""bf16 and the matrix instruction m16n8k16 begin here."""

DEFAULT_SHARED_BYTES = 48 * 1024
"""Shared memory that a block gets without asking for more."""

Defines = tuple[tuple[str, str | int], ...]
"""Macros of one compilation: names and values."""

C_TYPES = {
    "float32": "float",
    "float64": "double",
    "float16": "half_t",
    "bfloat16": "bfloat_t",
    "uint16": "bfloat_t",  # NumPy has no bfloat16: its bits travel as uint16
    "int8": "signed char",
    "uint8": "unsigned char",
    "bool": "unsigned char",
    "int32": "int",
    "int64": "int64",
}
"""Element types in the sources, by an array's dtype."""


def c_type(array: Any) -> str:
    """The element type of an array in the sources.

    Raises:
        DeviceError: the kernels have no such type.
    """
    name = array.dtype.name
    if name not in C_TYPES:
        raise DeviceError(f"kernels: an array has dtype {name}; give one of {', '.join(C_TYPES)}")
    return C_TYPES[name]


def native_arch(compute_capability: str) -> str:
    """The name of a GPU's own instruction set, such as ``90a``.

    Args:
        compute_capability: as CuPy gives it, such as ``"90"``.

    Raises:
        DeviceError: the GPU is too old.
    """
    number = int(compute_capability)
    if number < MINIMUM_ARCH:
        raise DeviceError(
            f"GPU: compute capability {number / 10} is below {MINIMUM_ARCH / 10}; set device: cpu, "
            "or use an Ampere GPU or newer"
        )
    return "90a" if number == 90 else compute_capability


def branch_arch(arch: str) -> int:
    """The architecture whose branch the sources take: that of ``arch``, or of ``CROSSLANE_FORCE_ARCH`` if lower.

    Raises:
        DeviceError: the variable holds no architecture.
    """
    own = int(arch.rstrip("af"))
    forced = os.environ.get("CROSSLANE_FORCE_ARCH", "")
    if not forced:
        return own
    if not re.fullmatch(r"\d{2,3}", forced) or int(forced) < MINIMUM_ARCH:
        raise DeviceError(f"CROSSLANE_FORCE_ARCH: {forced!r} is no architecture from {MINIMUM_ARCH} on; set it to 80")
    return min(own, int(forced))


def compile_cubin(source: Path, arch: str, defines: Defines = ()) -> bytes:
    """Machine code of a CUDA source, from the cache where it has been compiled before.

    Args:
        source: a ``.cu`` file; its kernels are ``extern "C"``.
        arch: such as ``80``, ``90a`` or ``120``.
        defines: macros.

    Raises:
        DeviceError: NVRTC is missing, or the source does not compile.
    """
    text = source.read_text(encoding="utf-8")
    header = HEADER.read_text(encoding="utf-8")
    options = _options(arch, defines)
    key = hashlib.sha256("\0".join((text, header, *options, repr(_nvrtc_version()))).encode()).hexdigest()
    place = cache_folder() / f"{source.stem}-{arch}-{key[:32]}.cubin"
    if place.exists():
        return place.read_bytes()
    cubin = _compile(text, source.name, header, options)
    _write_whole(place, cubin)
    return cubin


def cache_folder() -> Path:
    """Where compiled kernels are kept: ``crosslane/kernels`` in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "crosslane" / "kernels"


def _options(arch: str, defines: Defines) -> list[str]:
    macros = [f"-D{name}={value}" for name, value in (("CROSSLANE_ARCH", branch_arch(arch)), *defines)]
    return [f"-arch=sm_{arch}", "-std=c++17", *macros]


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise DeviceError(
            f"NVRTC: {error}; install Crosslane with its extra for CUDA: pip install 'crosslane[cuda13]'"
        ) from error
    return nvrtc


@cache
def _nvrtc_version() -> tuple[int, int]:
    nvrtc = _nvrtc()
    _, major, minor = nvrtc.nvrtcVersion()
    return int(major), int(minor)


def _compile(text: str, name: str, header: str, options: list[str]) -> bytes:
    nvrtc = _nvrtc()
    _, program = nvrtc.nvrtcCreateProgram(text.encode(), name.encode(), 1, [header.encode()], [b"dlrm/kernels.cuh"])
    encoded = [option.encode() for option in options]
    (failed,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
    if failed != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        log = bytearray(size)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise DeviceError(f"{name}: NVRTC says {failed.name} with {' '.join(options)}:\n{log.decode().strip()}")
    _, size = nvrtc.nvrtcGetCUBINSize(program)
    cubin = bytearray(size)
    nvrtc.nvrtcGetCUBIN(program, cubin)
    nvrtc.nvrtcDestroyProgram(program)
    return bytes(cubin)


def _write_whole(place: Path, content: bytes) -> None:
    """Write so that another process sees the whole file or none; a cache that cannot be written is no error."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=place.parent, delete=False) as temporary:
            temporary.write(content)
        Path(temporary.name).replace(place)
    except OSError:
        return


@dataclass(frozen=True, slots=True)
class Launchable:
    """One kernel of one GPU.

    Attributes:
        function: CuPy's function.
        multiprocessors: of the GPU.
        shared_limit: bytes of shared memory that a block can have.
        limit: raises the function's shared memory to this many bytes.
    """

    function: Callable[..., None]
    multiprocessors: int
    shared_limit: int
    limit: Callable[[int], None]

    def __call__(self, blocks: int, threads: int, *arguments: Any, shared_bytes: int = 0) -> None:
        """Launch on the current stream; nothing is allocated and nothing waits.

        Args:
            blocks: of the grid; 0: nothing is launched.
            threads: of a block.
            *arguments: arrays, or NumPy scalars of the width that the kernel takes.
            shared_bytes: dynamic shared memory of a block.
        """
        if blocks == 0:
            return
        if shared_bytes > DEFAULT_SHARED_BYTES:
            self.limit(shared_bytes)
        self.function((blocks,), (threads,), arguments, shared_mem=shared_bytes)


def device_limits() -> tuple[int, int]:
    """Multiprocessors of the current GPU, and the bytes of shared memory that a block can have."""
    import cupy

    return _limits(int(cupy.cuda.runtime.getDevice()))


@cache
def _limits(device_id: int) -> tuple[int, int]:
    import cupy

    attributes = cupy.cuda.Device(device_id).attributes
    return int(attributes["MultiProcessorCount"]), int(attributes["MaxSharedMemoryPerBlockOptin"])


def load(source: Path, name: str, defines: Defines = ()) -> Launchable:
    """Kernel ``name`` of a source, for CuPy's current device; compiled and loaded once.

    Args:
        source: a ``.cu`` file.
        name: of the kernel.
        defines: macros.

    Raises:
        DeviceError: see ``compile_cubin`` and ``native_arch``.
    """
    import cupy

    return _load(source, name, defines, int(cupy.cuda.runtime.getDevice()))


@cache
def _load(source: Path, name: str, defines: Defines, device_id: int) -> Launchable:
    import cupy
    from cupy.cuda.function import Module
    from cupy_backends.cuda.api import driver

    device = cupy.cuda.Device(device_id)
    module = Module()
    module.load(compile_cubin(source, native_arch(device.compute_capability), defines))
    function = module.get_function(name)
    allowed = {"bytes": DEFAULT_SHARED_BYTES}

    def limit(shared_bytes: int) -> None:
        if shared_bytes > allowed["bytes"]:
            attribute = driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            driver.funcSetAttribute(function.ptr, attribute, shared_bytes)
            allowed["bytes"] = shared_bytes

    return Launchable(function, *_limits(device_id), limit)
