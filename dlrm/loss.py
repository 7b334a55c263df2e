"""Binary cross-entropy on logits. Shapes: B rows of this rank."""

from __future__ import annotations

import numpy as np

from dlrm.device import Array, Device


def bce_with_logits(logits: Array, labels: Array, global_rows: int, grad_out: Array, device: Device) -> float:
    """This rank's part of the mean loss, and its gradient.

    ``loss = sum(max(x, 0) - x y + log(1 + exp(-|x|))) / G``, ``grad = (sigmoid(x) - y) / G``.

    Args:
        logits: [B], x; B may be 0.
        labels: [B], y: 0 or 1, any numeric dtype.
        global_rows: G, real rows of the global batch, so that summing over ranks gives the mean.
        grad_out: [B], written.
        device: runs it.

    Returns:
        The sum over the rows divided by G, accumulated in float64; NaN if a logit is NaN.
    """
    kernel = device.kernel(__name__, "bce_with_logits")
    if kernel is not None:
        return float(kernel(logits, labels, global_rows, grad_out))
    x = logits.astype(np.float64)
    y = labels.astype(np.float64)
    # exp of what is never positive: no overflow on either side.
    decay = np.exp(-np.abs(x))
    losses = np.maximum(x, 0.0) - x * y + np.log1p(decay)
    grad_out[...] = (np.where(x >= 0, 1.0, decay) / (1.0 + decay) - y) / global_rows
    return float(losses.sum() / global_rows)
