"""Launches of the logit layer's CUDA kernels; references in ``logit.py``.

Activations and weights are float32, float16 or bfloat16, rows of activations may be farther apart than they are long;
gradients of weights are float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dlrm.gemm import num_chunks
from dlrm.interaction_cuda import row_stride
from dlrm.nvrtc import c_type, load

SOURCE = Path(__file__).with_name("logit.cu")
THREADS = 256
"""Of a block; the source has the same."""
BLOCKS = 2
"""Blocks of a multiprocessor that share the rows of a backward pass, each of which has at least 64."""


def logit_forward(x: Any, weight: Any, bias: Any, out: Any) -> None:
    """See ``logit.logit_forward``; ``out`` is float32."""
    rows, inputs = len(x), weight.shape[1]
    if rows:
        kernel = load(SOURCE, "logit_forward", _defines(relu=False, matrices=(x, weight)))
        shape = (np.int64(row_stride(x)), np.int64(rows), np.int32(inputs))
        kernel(-(-rows * 32 // THREADS), THREADS, x, weight, bias, *shape, out)


def logit_backward(
    grad: Any, x: Any, weight: Any, grad_weight: Any, grad_bias: Any, grad_x: Any, partials: Any, relu: bool
) -> None:
    """See ``logit.logit_backward``; ``grad`` is of the dtype of ``x``, ``partials`` is float32."""
    rows, inputs = len(x), weight.shape[1]
    defines = _defines(relu=relu, matrices=(x, weight, grad_x))
    kernel = load(SOURCE, "logit_backward", defines)
    blocks = max(1, min(num_chunks(rows), kernel.multiprocessors * BLOCKS))
    strides = (np.int64(row_stride(x)), np.int64(row_stride(grad_x)))
    kernel(blocks, THREADS, grad, x, weight, *strides, np.int64(rows), np.int32(inputs), grad_x, partials)
    load(SOURCE, "logit_sum", defines)(
        -(-(inputs + 1) // 32), THREADS, partials, np.int32(blocks), np.int32(inputs), grad_weight, grad_bias
    )


def _defines(*, relu: bool, matrices: tuple[Any, ...]) -> tuple[tuple[str, str | int], ...]:
    """With the numbers that a thread moves at a time: 16 bytes where every row of the matrices allows it."""
    each = 16 // matrices[0].dtype.itemsize
    fits = all(matrix.shape[1] % each == 0 and row_stride(matrix) % each == 0 for matrix in matrices)
    return (("NUMBER", c_type(matrices[0])), ("EACH", each if fits else 1), ("RELU", int(relu)))
