"""Memory of NCCL's own allocator, which ranks of a host open to each other; CuPy has no binding for it.

NCCL keeps what it knows of a range of addresses longer than the graphs that made it look: memory that was given back
and came again at the same address would be taken for the old one. So nothing is given back while the communicator
lives; what is let go of is handed out again.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

from dlrm.errors import DeviceError


class OpenMemory:
    """Blocks of memory.

    Args:
        allocate: makes one of so many bytes; its address.
        free: gives one back.
    """

    def __init__(self, allocate: Callable[[int], int], free: Callable[[int], None]) -> None:
        self._allocate, self._free = allocate, free
        self._parked: list[tuple[int, int]] = []
        self._closed = False

    def take(self, size: int) -> tuple[Block, bool]:
        """A block of ``size`` bytes or more, and whether it was used before: work on it may be under way."""
        fitting = [block for block in self._parked if block[0] >= size]
        if not fitting:
            return Block(self, size, self._allocate(size)), False
        best = min(fitting)
        self._parked.remove(best)
        return Block(self, *best), True

    def park(self, size: int, address: int) -> None:
        """Have a block handed out again, or after ``close`` give it back."""
        if self._closed:
            self._free(address)
        else:
            self._parked.append((size, address))

    def close(self) -> None:
        """Give back what nobody holds, and the rest when it is let go of; once the communicator is gone."""
        self._closed = True
        while self._parked:
            self._free(self._parked.pop()[1])


class Block:
    """A piece of memory that goes back when nobody holds this object.

    Attributes:
        address: where it begins.
    """

    def __init__(self, memory: OpenMemory, size: int, address: int) -> None:
        self._memory, self._size, self.address = memory, size, address

    def __del__(self) -> None:
        self._memory.park(self._size, self.address)


def nccl_memory() -> OpenMemory | None:
    """Of the current GPU; ``None``: the NCCL that CuPy has loaded has no allocator."""
    import cupy

    library = loaded_library()
    if library is None:
        return None
    make, give_back, pointer, number = library.ncclMemAlloc, library.ncclMemFree, ctypes.c_void_p, ctypes.c_size_t

    def allocate(size: int) -> int:
        address = pointer()
        code = make(ctypes.byref(address), number(size))
        if code:
            cupy.get_default_memory_pool().free_all_blocks()  # which CuPy keeps for itself
            code = make(ctypes.byref(address), number(size))
        if code:
            free, total = cupy.cuda.runtime.memGetInfo()
            raise DeviceError(
                f"device: {size / 2**30:.2f} GiB for what GPUs exchange cannot be had of NCCL (its code is {code}), "
                f"{free / 2**30:.2f} of {total / 2**30:.2f} GiB are free; use more ranks, fp16 tables or a smaller "
                "batch"
            )
        return int(address.value or 0)

    return OpenMemory(allocate, lambda address: give_back(pointer(address)))


@cache
def loaded_library() -> ctypes.CDLL | None:
    """The NCCL that CuPy has loaded, if it has an allocator (2.19 and later)."""
    mapped = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    paths = [line.split(maxsplit=5)[-1] for line in mapped if "libnccl.so" in line]
    if not paths:
        return None
    library = ctypes.CDLL(paths[0])
    return library if hasattr(library, "ncclMemAlloc") and hasattr(library, "ncclMemFree") else None
