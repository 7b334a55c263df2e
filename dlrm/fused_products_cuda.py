"""Launches of the products with a ReLU in their epilogue; Hopper alone has them. Reference in ``fused_products.py``.

A block multiplies tiles of 128 rows and 256 columns; the copy engine of the GPU brings the operands, by maps that the
host makes of every array.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import cupy
import numpy as np

from dlrm.errors import DeviceError
from dlrm.interaction_cuda import row_stride
from dlrm.nvrtc import Defines, branch_arch, c_type, load, native_arch

SOURCE = Path(__file__).with_name("fused_products.cu")
THREADS = 384
TILE_ROWS, TILE_COLUMNS, DEPTH, STAGES = 128, 256, 64, 4
"""As in the source."""
_ARCH = "90a"
_KEPT_MAPS = 4096
_ALIGNED = 16
"""Bytes at which the copy engine wants every row to start."""

_MAP = np.dtype([("words", np.uint64, 16)])
_WORK = np.dtype(
    [
        ("num_rows", np.int32), ("columns", np.int32), ("depth", np.int32), ("bits", np.uint64), ("bits_ld", np.int64),
        ("bias", np.uint64), ("sums", np.uint64), ("partials", np.uint64), ("tickets", np.uint64), ("lanes", np.int32),
    ],
    align=True,
)  # fmt: skip


def available() -> bool:
    """Whether the current GPU has the instructions."""
    arch = native_arch(cupy.cuda.Device().compute_capability)
    return arch == _ARCH and branch_arch(arch) == int(_ARCH[:2])


def supports(left: Any, weight: Any, out: Any, columns: int) -> bool:
    """Whether a product can be done: half precision, rows that start at 16 bytes, not more columns than blocks have.

    Args:
        left: [B, >= depth].
        weight: in either order.
        out: [B, >= columns].
        columns: that are written.
    """
    arrays = (left, weight, out)
    return (
        available()
        and len(left) > 0
        and all(array.dtype.name in ("float16", "uint16") and array.dtype == left.dtype for array in arrays)
        and all(row_stride(array) * array.itemsize % _ALIGNED == 0 for array in arrays)
        and all(array.data.ptr % _ALIGNED == 0 for array in arrays)
        and columns <= TILE_COLUMNS * _multiprocessors()
    )


def relu_product(x: Any, weight: Any, bias: Any, out: Any, bits: Any | None) -> None:
    """See ``fused_products.relu_product``; all of one dtype, float16 or bfloat16, rows of bits at multiples of 16."""
    outputs, inputs = weight.shape
    right = _Map(weight, outputs, inputs, 128, DEPTH)
    form = (("FORWARD", 1), ("MASKED", int(bits is not None)), ("SUMMED", 0))
    _launch(x, right, out, outputs, inputs, form, bits=bits, bias=bias)


def data_product(grad: Any, weight: Any, bits: Any, grad_below: Any, sums: Any | None) -> None:
    """See ``fused_products.data_product``; float16 or bfloat16, sums in float32, rows of bits at multiples of 16."""
    outputs, inputs = weight.shape
    right = _Map(weight, outputs, inputs, DEPTH, 64)
    form = (("FORWARD", 0), ("MASKED", 0), ("SUMMED", int(sums is not None)))
    _launch(grad, right, grad_below, inputs, outputs, form, bits=bits, sums=sums)


@dataclass(frozen=True, slots=True)
class _Map:
    """An array as the copy engine is told of it: rows x columns, moved in boxes of ``box_rows`` x ``box_columns``."""

    array: Any
    rows: int
    columns: int
    box_rows: int
    box_columns: int

    def words(self) -> np.ndarray:
        array = self.array
        return _encoded(array.dtype.name, array.data.ptr, row_stride(array) * array.itemsize, self.rows, self.columns,
                        self.box_rows, self.box_columns)  # fmt: skip


@lru_cache(_KEPT_MAPS)
def _encoded(
    dtype: str, address: int, stride: int, rows: int, columns: int, box_rows: int, box_columns: int
) -> np.ndarray:
    from cuda.bindings import driver

    kind = driver.CUtensorMapDataType
    failed, made = driver.cuTensorMapEncodeTiled(
        kind.CU_TENSOR_MAP_DATA_TYPE_FLOAT16 if dtype == "float16" else kind.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        2,
        address,
        [driver.cuuint64_t(columns), driver.cuuint64_t(rows)],
        [driver.cuuint64_t(stride)],
        [driver.cuuint32_t(box_columns), driver.cuuint32_t(box_rows)],
        [driver.cuuint32_t(1), driver.cuuint32_t(1)],
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if failed != driver.CUresult.CUDA_SUCCESS:
        raise DeviceError(f"device: the driver makes no map of an array [{rows}, {columns}]: {failed.name}")
    return np.frombuffer(ctypes.string_at(int(made.getPtr()), _MAP.itemsize), _MAP)


def _launch(
    left: Any,
    right: _Map,
    out: Any,
    columns: int,
    depth: int,
    form: Defines,
    *,
    bits: Any | None = None,
    bias: Any | None = None,
    sums: Any | None = None,
) -> None:
    rows = len(left)
    kernel = load(SOURCE, "fused_product", (("NUMBER", c_type(left)), *form))
    across, down = -(-columns // TILE_COLUMNS), -(-rows // TILE_ROWS)
    lanes = min(kernel.multiprocessors // across, down)
    lanes = -(-down // -(-down // lanes))  # as few as take as long
    work = np.zeros(1, _WORK)
    work["num_rows"], work["columns"], work["depth"], work["lanes"] = rows, columns, depth, lanes
    if bits is not None:
        work["bits"], work["bits_ld"] = bits.data.ptr, row_stride(bits)
    if bias is not None:
        work["bias"] = bias.data.ptr
    if sums is not None:
        partials, tickets = _scratch(cupy.cuda.get_current_stream().ptr)
        work["sums"], work["partials"], work["tickets"] = sums.data.ptr, partials.data.ptr, tickets.data.ptr
    maps = (
        _Map(left, rows, depth, TILE_ROWS, DEPTH).words(), right.words(), _Map(out, rows, columns, 16, 64).words()
    )  # fmt: skip
    kernel(lanes * across, THREADS, *maps, work, shared_bytes=_shared_bytes())


def _shared_bytes() -> int:
    """Shared memory of a block: ring, rows on their way out, a number for each column, barriers, room to align."""
    ring = STAGES * (TILE_ROWS + TILE_COLUMNS) * DEPTH * 2
    return ring + 8 * 2 * 16 * 64 * 2 + TILE_COLUMNS * 4 + 16 * STAGES + 1024


@cache
def _multiprocessors() -> int:
    return int(cupy.cuda.Device().attributes["MultiProcessorCount"])


@cache
def _scratch(stream: int) -> tuple[Any, Any]:  # noqa: ARG001  streams run beside each other
    """Sums of every block's columns, and a ticket for every tile of the columns."""
    blocks = _multiprocessors()
    return cupy.empty(blocks * TILE_COLUMNS, np.float32), cupy.zeros(blocks, np.uint32)
