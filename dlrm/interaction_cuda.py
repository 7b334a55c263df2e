"""Launches of the interaction's CUDA kernels; references in ``interaction.py``.

Half-precision vectors go to the tensor cores (``interaction.cu``), float32 ones and odd shapes do not
(``interaction_plain.cu``). Rows of ``out`` and ``grad_out`` may be farther apart than they are long: a distance of
a multiple of 8 lets a kernel move 16 bytes at a time, and then the columns up to that multiple are written as zeros.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dlrm.errors import DeviceError
from dlrm.nvrtc import Defines, c_type, load

TENSOR_CORES = Path(__file__).with_name("interaction.cu")
PLAIN = Path(__file__).with_name("interaction_plain.cu")
MOST_VECTORS = 64
"""More vectors than this leave too few registers on the tensor cores' path."""
WARPS = 4
FUSED_FORWARD = {"BLOCKS": 4, "BATCHED": 2}
"""How the fused form walks the batch: blocks of a multiprocessor, and 32-column strips of float32 rows that a warp asks
for together."""
FUSED_BACKWARD = {"BLOCKS": 3, "BATCHED": 2}
"""The same of its backward pass."""


def interaction_forward(vectors: Any, out: Any, first: int) -> None:
    """See ``interaction.interaction_forward``."""
    rows, _, _ = vectors.shape
    if on_tensor_cores(vectors):
        defines = (*_defines(vectors, first), ("ALIGNED", aligned(out)), ("RELU", 0))
        kernel = load(TENSOR_CORES, "interaction_forward", defines)
        warps, shared = WARPS, WARPS * _padded_bytes(vectors, first)
    else:
        kernel = load(PLAIN, "interaction_forward", (*_defines(vectors, first), ("RELU", 0)))
        warps, shared = _plain_shared(vectors, with_gradients=False)
    arguments = (vectors, np.int64(rows), np.int64(row_stride(out)), out)
    kernel(-(-rows // warps), warps * 32, *arguments, shared_bytes=shared)


def interaction_backward(vectors: Any, grad_out: Any, grad_vectors: Any, first: int) -> None:
    """See ``interaction.interaction_backward``."""
    _backward(vectors, grad_out, grad_vectors, first, relu=0)


def interaction_backward_relu(vectors: Any, grad_out: Any, grad_vectors: Any, first: int) -> None:
    """See ``interaction.interaction_backward_relu``."""
    _backward(vectors, grad_out, grad_vectors, first, relu=1)


def _backward(vectors: Any, grad_out: Any, grad_vectors: Any, first: int, *, relu: int) -> None:
    rows, _, _ = vectors.shape
    if on_tensor_cores(vectors):
        defines = (*_defines(vectors, first), ("ALIGNED", aligned(grad_out)), ("RELU", relu))
        kernel = load(TENSOR_CORES, "interaction_backward", defines)
        warps, shared = WARPS, WARPS * _padded_bytes(vectors, first)
    else:
        kernel = load(PLAIN, "interaction_backward", (*_defines(vectors, first), ("RELU", relu)))
        warps, shared = _plain_shared(vectors, with_gradients=True)
    arguments = (vectors, grad_out, np.int64(rows), np.int64(row_stride(grad_out)), grad_vectors)
    kernel(-(-rows // warps), warps * 32, *arguments, shared_bytes=shared)


def gather_interaction(
    bottom: Any, weight: Any, row_start: Any, keys: Any, num_rows: int, out: Any, first: int
) -> None:
    """See ``interaction.gather_interaction``; ``out`` is float16 or bfloat16, D a multiple of 8, F at most 64.

    Raises:
        DeviceError: the shape or type is not for the tensor cores.
    """
    tables = (weight, row_start, keys)
    shape = (np.int64(num_rows), np.int64(row_stride(out)))
    _fused("gather_interaction", bottom, *tables, out, first, FUSED_FORWARD, 0, (*shape, out), num_rows)


def gather_interaction_backward(
    bottom: Any, weight: Any, row_start: Any, keys: Any, num_rows: int, grad_out: Any, grad_vectors: Any, first: int
) -> None:
    """See ``interaction.gather_interaction_backward``; shapes and types as for ``gather_interaction``.

    Raises:
        DeviceError: the shape or type is not for the tensor cores.
    """
    tables = (weight, row_start, keys)
    rest = (grad_out, np.int64(num_rows), np.int64(row_stride(grad_out)), grad_vectors)
    _fused("gather_interaction_backward", bottom, *tables, grad_out, first, FUSED_BACKWARD, 1, rest, num_rows)


def listed_interaction(bottom: Any, weight: Any, come: Any, sources: Any, num_rows: int, out: Any, first: int) -> None:
    """See ``interaction.listed_interaction``; shapes and types as for ``gather_interaction``.

    Raises:
        DeviceError: the shape or type is not for the tensor cores.
    """
    tables, num_vectors = (weight, come, sources), first + len(sources) // max(1, num_rows)
    rest = (np.int64(num_rows), np.int64(row_stride(out)), out)
    _launch("listed_interaction", bottom, tables, num_vectors, out, FUSED_FORWARD, 0, rest, num_rows, _listed(0))


def listed_interaction_backward(
    bottom: Any,
    weight: Any,
    come: Any,
    sources: Any,
    num_rows: int,
    grad_out: Any,
    grad_vectors: Any,
    slots: Any | None,
    own: Any,
    first: int,
) -> None:
    """See ``interaction.listed_interaction_backward``; shapes and types as for ``gather_interaction``.

    Raises:
        DeviceError: the shape or type is not for the tensor cores.
    """
    tables, num_vectors = (weight, come, sources), first + len(sources) // max(1, num_rows)
    rest = (
        grad_out, np.int64(num_rows), np.int64(row_stride(grad_out)), grad_vectors,
        sources if slots is None else slots, np.int32(len(come)), own,
    )  # fmt: skip
    sent = _listed(int(slots is not None))
    name = "listed_interaction_backward"
    _launch(name, bottom, tables, num_vectors, grad_out, FUSED_BACKWARD, 1, rest, num_rows, sent)


def _listed(sent: int) -> Defines:
    return (("LISTED", 1), ("SENT", sent))


def _fused(
    name: str,
    bottom: Any,
    weight: Any,
    row_start: Any,
    keys: Any,
    pairs: Any,
    first: int,
    how: dict[str, int],
    relu: int,
    rest: tuple[Any, ...],
    num_rows: int,
) -> None:
    """Launch a kernel over the rows of the tables."""
    tables = (weight, row_start, keys)
    _launch(name, bottom, tables, first + len(row_start), pairs, how, relu, rest, num_rows, ())


def _launch(
    name: str,
    bottom: Any,
    tables: tuple[Any, Any, Any],
    num_vectors: int,
    pairs: Any,
    how: dict[str, int],
    relu: int,
    rest: tuple[Any, ...],
    num_rows: int,
    listed: Defines,
) -> None:
    """Launch a fused kernel; ``pairs`` is the interaction's output or its gradient, [B, first * D + P]."""
    if num_rows == 0:
        return
    weight, dim = tables[0], tables[0].shape[1]
    first = int(pairs.shape[1] > num_vectors * (num_vectors - 1) // 2)
    if pairs.dtype.itemsize != 2 or dim % 8 or num_vectors > MOST_VECTORS:
        raise DeviceError(
            f"interaction: {num_vectors} vectors of {dim} columns into {pairs.dtype.name} cannot be fused with the "
            f"look-up; that takes half precision, a multiple of 8 columns and at most {MOST_VECTORS} vectors"
        )
    defines = (
        ("DIM", dim), ("VECTORS", num_vectors), ("FIRST", first), ("NUMBER", c_type(pairs)),
        ("ALIGNED", aligned(pairs)), ("RELU", relu), ("WEIGHT", c_type(weight)), ("KEY", c_type(tables[2])),
        *listed, *how.items(),
    )  # fmt: skip
    kernel = load(TENSOR_CORES, name, defines)
    width = first * dim + num_vectors * (num_vectors - 1) // 2
    blocks = min(-(-num_rows // WARPS), kernel.multiprocessors * how["BLOCKS"])
    stride = np.int64(row_stride(bottom) if first else 0)
    shared = WARPS * -(-width // 8) * 16
    kernel(blocks, WARPS * 32, bottom, stride, *tables, *rest, shared_bytes=shared)


def on_tensor_cores(vectors: Any) -> bool:
    """Whether vectors have a type and shape for ``interaction.cu``."""
    _, num_vectors, dim = vectors.shape
    return bool(vectors.dtype.itemsize == 2 and dim % 8 == 0 and num_vectors <= MOST_VECTORS)


def row_stride(matrix: Any) -> int:
    """Elements from one row of a matrix to the next."""
    return int(matrix.strides[0] // matrix.dtype.itemsize)


def aligned(matrix: Any) -> int:
    """1 if every row starts at 16 bytes and has room for a whole number of 16-byte pieces."""
    stride = row_stride(matrix)
    return int(stride % 8 == 0 and stride >= matrix.shape[1])


def _defines(vectors: Any, first: int) -> Defines:
    _, num_vectors, dim = vectors.shape
    return (("DIM", dim), ("VECTORS", num_vectors), ("FIRST", first), ("NUMBER", c_type(vectors)))


def _padded_bytes(vectors: Any, first: int) -> int:
    _, num_vectors, dim = vectors.shape
    return int(-(-(first * dim + num_vectors * (num_vectors - 1) // 2) // 8) * 16)


def _plain_shared(vectors: Any, *, with_gradients: bool) -> tuple[int, int]:
    """Warps of a block and their shared memory: as many as fit into what every GPU has."""
    _, num_vectors, dim = vectors.shape
    padded = -(-num_vectors // 4) * 4
    floats = padded * (dim + 4) + (num_vectors * padded if with_gradients else 0)
    most = 96 * 1024
    if dim % 4 or 4 * floats > most:
        raise DeviceError(
            f"interaction: {num_vectors} vectors of {dim} columns need {4 * floats} bytes of shared memory, of which "
            f"{most} are there, and a multiple of 4 columns; use fewer or shorter vectors, or device: cpu"
        )
    warps = max(1, min(WARPS, most // (4 * floats)))
    return warps, warps * 4 * floats
