"""Matrix products with a ReLU or its gradient in the same pass; what the kernels of ``fused_products_cuda.py`` do.

Shapes: B rows, I inputs and O outputs of a layer. Bits as ``relu.relu_and_sum`` takes them: [B, bytes], the lowest bit
of a byte first.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def relu_product(x: Any, weight: Any, bias: Any, out: Any, bits: Any | None) -> None:
    """``out[:, :O] = max(x W^T + bias, 0)``, and where that was on.

    Args:
        x: [B, >= I].
        weight: [O, I].
        bias: [O].
        out: [B, >= O]; its first O columns are written.
        bits: [B, at least O / 8 bytes], written: 1 where the sum is above 0 or a NaN; ``None``: not wanted.
    """
    outputs, inputs = weight.shape
    sums = x[:, :inputs] @ weight.T + bias
    on = ~(sums <= 0)
    out[:, :outputs] = np.where(on, sums, 0)
    if bits is not None:
        packed = np.packbits(on, axis=1, bitorder="little")
        bits[:, : packed.shape[1]] = packed


def data_product(grad: Any, weight: Any, bits: Any, grad_below: Any, sums: Any | None) -> None:
    """``grad_below = grad W`` where a bit is set, else 0; and its sums over the rows.

    Args:
        grad: [B, >= O].
        weight: [O, I].
        bits: [B, at least I / 8 bytes].
        grad_below: [B, I], written.
        sums: [I], written; ``None``: not wanted.
    """
    outputs, inputs = weight.shape
    on = np.unpackbits(bits, axis=1, bitorder="little")[:, :inputs].astype(np.bool_)
    grad_below[...] = np.where(on, grad[:, :outputs] @ weight, 0)
    if sums is not None:
        grad_below.sum(0, out=sums)
