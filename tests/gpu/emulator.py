"""CUDA sources compiled by a C++ compiler and run on the CPU, for machines without a GPU (tests/kernels/*.h)."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from replays import note_launch

from dlrm.nvrtc import Defines, branch_arch

ROOT = Path(__file__).parents[2]
HEADERS = ROOT / "tests" / "kernels"
_KEPT_SECONDS = 14 * 24 * 3600
"""How long a library that nobody asks for is kept."""
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

    def __init__(self, function: Any, name: str) -> None:
        self._function, self._name = function, name

    def __call__(self, blocks: int, threads: int, *arguments: Any, shared_bytes: int = 0) -> None:
        if blocks == 0:
            return
        values = [
            ctypes.c_void_p(argument.ctypes.data)
            if isinstance(argument, np.ndarray)
            else TYPES[type(argument)](argument.item())
            for argument in arguments
        ]
        note_launch(self._name, blocks, threads, shared_bytes, *(value.value for value in values))
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
        return EmulatedKernel(getattr(library, f"emulate_{name}"), name)

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
        place = self._folder / f"{stem}.cpp"
        place.write_text(f'#include "emulation_blocks.h"\n#include "{source}"\n' + "".join(entries), encoding="utf-8")
        macros = [f"-D{macro}={value}" for macro, value in defines]
        flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-w", f"-I{HEADERS}", f"-I{ROOT}"]
        return ctypes.CDLL(str(_built([str(compiler()), *flags, *macros, str(place)], stem, self._folder)))


def _built(command: list[str], stem: str, otherwise: Path) -> Path:
    """The library of a compiler's command, kept from run to run.

    It is known by the compiler's version, by the flags, and by every character that the compiler gets to see: the
    preprocessor's output, in which all headers stand. Whatever is changed there is compiled anew. Without
    a home that can be written, libraries lie in ``otherwise``.
    """
    version = _run([command[0], "--version"])
    text = _run([*command, "-E", "-P"])  # without the names of files, of which some are new in every run
    seen = "\0".join((version, *command[:-1], text))
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crosslane" / "emulated"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError):
        folder = otherwise
    library = folder / f"{stem}-{hashlib.sha256(seen.encode()).hexdigest()[:32]}.so"
    if library.exists():
        os.utime(library)
        return library
    unfinished = folder / f"{library.name}.{os.getpid()}.{threading.get_ident()}"
    _run([*command, "-o", str(unfinished)])
    unfinished.replace(library)
    for other in folder.iterdir():
        with suppress(OSError):  # another process may have removed it
            if time.time() - other.stat().st_mtime > _KEPT_SECONDS:
                other.unlink()
    return library


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout
