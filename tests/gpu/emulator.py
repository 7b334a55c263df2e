"""CUDA sources compiled by a C++ compiler and run on the CPU, for machines without a GPU (tests/kernels/*.h)."""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import numpy as np

from dlrm.nvrtc import Defines, branch_arch

ROOT = Path(__file__).parents[2]
HEADERS = ROOT / "tests" / "kernels"
TYPES = {
    np.uint64: ctypes.c_uint64,
    np.int64: ctypes.c_int64,
    np.uint32: ctypes.c_uint32,
    np.int32: ctypes.c_int32,
    np.float32: ctypes.c_float,
    np.float64: ctypes.c_double,
}


def compiler() -> str | None:
    """A C++ compiler for this machine, or ``None``; ``_Float16`` and coroutines ask for x86-64 Linux."""
    return shutil.which("g++") or shutil.which("clang++")


def _without_branches(text: str, defines: Defines) -> str:
    """A source without what stands behind an ``#ifdef`` or ``#ifndef`` that does not hold."""
    given = {name for name, _ in defines}

    def chosen(found: re.Match[str]) -> str:
        first, _, second = found[3].partition("\n#else")
        return _without_branches(first if (found[1] == "ifdef") == (found[2] in given) else second, defines)

    return re.sub(r"^#(ifdef|ifndef) (\w+)$(.*?)^#endif  // \2$", chosen, text, flags=re.MULTILINE | re.DOTALL)


class EmulatedKernel:
    """One kernel of a compiled source: called like ``dlrm.nvrtc.Launchable``, with NumPy arrays."""

    multiprocessors = 3
    shared_limit = 64 * 1024

    _lock = threading.Lock()
    """One emulated GPU runs one kernel at a time: what the launches keep is shared, of all libraries."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def __call__(self, blocks: int, threads: int, *arguments: Any, shared_bytes: int = 0) -> None:
        if blocks == 0:
            return
        values = [
            ctypes.c_void_p(argument.ctypes.data)
            if isinstance(argument, np.ndarray)
            else TYPES[type(argument)](argument.item())
            for argument in arguments
        ]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        sizes = ctypes.c_uint(blocks), ctypes.c_uint(threads), ctypes.c_size_t(shared_bytes)
        with self._lock:
            stuck = self._function(*sizes, ctypes.byref(pointers))
        assert not stuck, "threads of the emulated kernel wait for each other for ever"


class Emulator:
    """Stands for ``dlrm.nvrtc.load``.

    Args:
        folder: for what is compiled.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._libraries: dict[tuple[Path, Defines], Any] = {}
        self._lock = threading.Lock()

    def load(self, source: Path, name: str, defines: Defines = ()) -> EmulatedKernel:
        """Kernel ``name`` of a source, which is compiled once with all its kernels."""
        macros = (("CROSSLANE_ARCH", branch_arch("90a")), *defines)
        key = (source, macros)
        with self._lock:
            if key not in self._libraries:
                self._libraries[key] = self._compile(source, macros)
            library = self._libraries[key]
        return EmulatedKernel(getattr(library, f"emulate_{name}"))

    def _compile(self, source: Path, defines: Defines) -> Any:
        text = source.read_text(encoding="utf-8")
        names = re.findall(
            r"^KERNEL void (?:__launch_bounds__\([^)]*\) )?(\w+)\(", _without_branches(text, defines), re.MULTILINE
        )
        entries = [
            f'extern "C" int emulate_{name}(unsigned blocks, unsigned threads, size_t bytes, void** arguments) {{\n'
            f"  return emulated::launch_blocks(blocks, threads, bytes, {name}, arguments);\n}}\n"
            for name in names
        ]
        stem = f"{source.stem}-{hashlib.sha256(repr(defines).encode()).hexdigest()[:16]}"
        place, library = self._folder / f"{stem}.cpp", self._folder / f"{stem}.so"
        place.write_text(f'#include "emulation_blocks.h"\n#include "{source}"\n' + "".join(entries), encoding="utf-8")
        macros = [f"-D{macro}={value}" for macro, value in defines]
        flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-w", f"-I{HEADERS}", f"-I{ROOT}"]
        command = [str(compiler()), *flags, *macros, str(place), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return ctypes.CDLL(str(library))
