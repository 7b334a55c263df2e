"""Binary cross-entropy on logits. Shapes: B rows of this rank."""

from __future__ import annotations

import numpy as np

from dlrm.device import Array, Device
from dlrm.scalars import INVERSE_ROWS, LOSS_SCALE, VALID_ROWS


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


def loss_and_gradient(
    logits: Array,
    labels: Array,
    grad_out: Array,
    loss: Array,
    scalars: Array,
    guard: Array,
    partials: Array,  # noqa: ARG001 room for the kernel
) -> None:
    """``bce_with_logits`` for captured steps: what changes between them is read from the two blocks of scalars.

    Args:
        logits: [B] float32, x.
        labels: [B], y: 0 or 1, any numeric dtype.
        grad_out: [B], written: ``(sigmoid(x) - y) / G`` times the loss scale; 0 behind the valid rows.
        loss: [1] float64, written: the sum over the valid rows divided by G, without the loss scale.
        scalars: see ``dlrm.scalars``.
        guard: see ``dlrm.scalars``.
        partials: float64, as many as ``loss_cuda.partials_of`` says.
    """
    valid = int(scalars.view(np.int32)[VALID_ROWS])
    x, y = logits.reshape(-1)[:valid].astype(np.float64), labels.reshape(-1)[:valid].astype(np.float64)
    decay = np.exp(-np.abs(x))
    losses = np.maximum(x, 0.0) - x * y + np.log1p(decay)
    loss[0] = losses.sum() * np.float64(scalars[INVERSE_ROWS])
    gradient = (np.where(x >= 0, 1.0, decay) / (1.0 + decay) - y) * np.float64(scalars[INVERSE_ROWS])
    rows = grad_out.reshape(-1)
    rows[:valid] = gradient * np.float64(guard[LOSS_SCALE])
    rows[valid:] = 0
