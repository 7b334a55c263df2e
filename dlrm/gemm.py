"""Fully connected layers: products through BLAS, bias, ReLU and their gradients fused into one pass each.

Shapes: B rows, I inputs, O outputs. An activation may be the first O columns of a wider array [B, >= O]: the
bottom MLP's output is place 0 of the interaction's input, and stays there.
"""

from __future__ import annotations

from dlrm.device import Array, Device

ROWS_PER_CHUNK = 64
"""Rows summed in one go; sums over rows add such chunks in order, whatever the threads."""


def num_chunks(rows: int) -> int:
    """Chunks of ``ROWS_PER_CHUNK`` that hold ``rows`` rows."""
    return -(-rows // ROWS_PER_CHUNK)


def linear_relu_forward(x: Array, weight: Array, bias: Array, out: Array, mask: Array | None, device: Device) -> None:
    """``out[:, :O] = max(x W^T + bias, 0)``.

    Args:
        x: [B, I].
        weight: [O, I].
        bias: [O].
        out: [B, >= O]; its first O columns are written.
        mask: what ``device.relu_mask`` gave for ``out``; written.
        device: runs it.
    """
    if kernel := device.kernel(__name__, "linear_relu_forward"):
        kernel(x, weight, bias, out, mask)
        return
    device.xp.matmul(x, weight.T, out=out[:, : len(weight)])
    (device.kernel(__name__, "bias_relu") or bias_relu)(out, bias)


def relu_backward(grad: Array, activation: Array, grad_bias: Array, partials: Array | None, device: Device) -> None:
    """Clear ``grad`` where the ReLU was off, and sum it over the rows.

    Args:
        grad: [B, >= O]: gradient of the ReLU's output, changed in place to that of its input.
        activation: [B, >= O]: the ReLU's output.
        grad_bias: [O], written: sum over the rows.
        partials: scratch, at least [num_chunks(B) * O].
        device: runs it.
    """
    (device.kernel(__name__, "mask_and_sum") or mask_and_sum)(grad, activation, grad_bias, partials)


def linear_data_backward(
    grad: Array,
    weight: Array,
    below: Array,
    mask: Array | None,
    grad_below: Array,
    grad_bias: Array,
    partials: Array | None,
    device: Device,
) -> None:
    """``grad_below = (grad W) where below > 0``: back through a layer and the ReLU that made its input.

    Args:
        grad: [B, >= O], its first O columns: gradient of ``below W^T + bias``.
        weight: [O, I].
        below: [B, >= I]: the layer's input, a ReLU's output.
        mask: what ``linear_relu_forward`` wrote beside ``below``.
        grad_below: [B, I], written: gradient of that ReLU's input.
        grad_bias: [I], written: its sum over the rows, as for ``relu_backward``.
        partials: scratch, as for ``relu_backward``.
        device: runs it.
    """
    if kernel := device.kernel(__name__, "linear_data_backward"):
        kernel(grad, weight, below, mask, grad_below, grad_bias, partials)
        return
    device.xp.matmul(grad[:, : len(weight)], weight, out=grad_below)
    relu_backward(grad_below, below, grad_bias, partials, device)


def linear_input_backward(grad: Array, weight: Array, grad_x: Array, device: Device) -> None:
    """``grad_x = grad W``, where no ReLU made x.

    Args:
        grad: [B, >= O], its first O columns: gradient of ``x W^T + bias``.
        weight: [O, I].
        grad_x: [B, I], written.
        device: runs it.
    """
    if kernel := device.kernel(__name__, "linear_input_backward"):
        kernel(grad, weight, grad_x)
        return
    device.xp.matmul(grad[:, : len(weight)], weight, out=grad_x)


def linear_weight_backward(grad: Array, x: Array, grad_weight: Array, grad_bias: Array, device: Device) -> None:
    """``grad_weight = grad^T x``.

    Args:
        grad: [B, >= O], its first O columns: gradient of ``x W^T + bias``.
        x: [B, >= I].
        grad_weight: [O, I], written.
        grad_bias: [O]; a GPU sums ``grad`` over the rows here, inside the product.
        device: runs it.
    """
    outputs, inputs = grad_weight.shape
    if kernel := device.kernel(__name__, "linear_weight_backward"):
        kernel(grad, x, grad_weight, grad_bias)
        return
    device.xp.matmul(grad[:, :outputs].T, x[:, :inputs], out=grad_weight)


def bias_relu(wide: Array, bias: Array) -> None:
    """``wide[:, :O] = max(wide[:, :O] + bias, 0)``, a NaN stays NaN; wide [B, >= O], bias [O]."""
    out = wide[:, : len(bias)]
    out += bias
    out[out <= 0] = 0


def mask_and_sum(grad: Array, activation: Array, grad_bias: Array, partials: Array) -> None:
    """``grad[activation <= 0] = 0`` in the first O columns, ``grad_bias = grad.sum(0)``."""
    width, rows = len(grad_bias), len(grad)
    live = grad[:, :width]
    live[activation[:, :width] <= 0] = 0
    sums = partials[: num_chunks(rows) * width].reshape(-1, width)
    for chunk, begin in enumerate(range(0, rows, ROWS_PER_CHUNK)):
        live[begin : begin + ROWS_PER_CHUNK].sum(0, out=sums[chunk])
    sums.sum(0, out=grad_bias)
