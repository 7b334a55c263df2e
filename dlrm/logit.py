"""The layer with one output, whose gradients are an outer product and a sum over the rows.

Shapes: B rows, I inputs.
"""

from __future__ import annotations

from dlrm.device import Array, Device


def logit_forward(x: Array, weight: Array, bias: Array, out: Array, device: Device) -> None:
    """``out = x w + bias``.

    Args:
        x: [B, I].
        weight: [1, I].
        bias: [1].
        out: [B], written.
        device: runs it.
    """
    if kernel := device.kernel(__name__, "logit_forward"):
        kernel(x, weight, bias, out)
        return
    device.xp.matmul(x, weight[0], out=out)
    out += bias


def logit_backward(
    grad: Array,
    x: Array,
    weight: Array,
    grad_weight: Array,
    grad_bias: Array,
    grad_x: Array,
    partials: Array | None,
    device: Device,
    *,
    relu: bool = False,
) -> None:
    """Gradients of ``logit_forward``.

    Args:
        grad: [B].
        x: [B, I].
        weight: [1, I].
        grad_weight: [1, I], written.
        grad_bias: [1], written.
        grad_x: [B, I], written; with ``relu`` 0 where x is not above 0.
        partials: scratch of the device, at least [num_chunks(B) or 1, I + 1].
        device: runs it.
        relu: x came out of a ReLU, and ``grad_x`` is to be the gradient of its input.
    """
    if kernel := device.kernel(__name__, "logit_backward"):
        kernel(grad, x, weight, grad_weight, grad_bias, grad_x, partials, relu)
        return
    device.xp.matmul(grad, x, out=grad_weight[0])
    grad_bias[0] = grad.sum()
    (device.kernel(__name__, "outer") or outer)(grad, weight[0], grad_x)
    if relu:
        grad_x[x <= 0] = 0


def outer(a: Array, b: Array, out: Array) -> None:
    """``out[i, j] = a[i] b[j]``; a [B], b [I], out [B, I]."""
    out[...] = a[:, None] * b
