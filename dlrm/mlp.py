"""Chains of fully connected ReLU layers. Activations are the caller's: written where it says, never hidden.

Shapes: B rows; layer k has I_k inputs and O_k = I_(k+1) outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dlrm.device import Array, Device
from dlrm.gemm import (
    linear_data_backward,
    linear_input_backward,
    linear_relu_forward,
    linear_weight_backward,
    relu_backward,
)


@dataclass(frozen=True, slots=True)
class Linear:
    """One layer's arrays, views into the model's flat ones.

    Attributes:
        weight: [O, I].
        bias: [O].
        grad_weight: [O, I].
        grad_bias: [O].
    """

    weight: Array
    bias: Array
    grad_weight: Array
    grad_bias: Array


def mlp_forward(
    x: Array, layers: Sequence[Linear], outs: Sequence[Array], masks: Sequence[Array | None], device: Device
) -> None:
    """Write every layer's activation.

    Args:
        x: [B, I_0].
        layers: the chain.
        outs: one [B, >= O_k] a layer; only the last may be wider than O_k.
        masks: beside each of ``outs``, as ``device.relu_mask`` gave them.
        device: runs it.
    """
    for layer, out, mask in zip(layers, outs, masks, strict=True):
        linear_relu_forward(x, layer.weight, layer.bias, out, mask, device)
        x = out


def mlp_data_backward(
    layers: Sequence[Linear],
    outs: Sequence[Array],
    masks: Sequence[Array | None],
    grads: Sequence[Array],
    partials: Array | None,
    device: Device,
    *,
    grad_x: Array | None = None,
    masked: bool = False,
) -> None:
    """Turn the gradient of the last activation into those of all of them, each before its ReLU.

    Where the device sums biases beside the masks, their gradients are written too.

    Args:
        layers: the chain.
        outs: the activations that ``mlp_forward`` wrote.
        masks: what it wrote beside them.
        grads: one [B, >= O_k] a layer; the last holds the gradient of the last activation, all are written.
        partials: scratch, at least [num_chunks(B) * widest].
        device: runs it.
        grad_x: [B, I_0], written: gradient of the chain's input; ``None``: not wanted.
        masked: the gradient of the last activation is already 0 where its ReLU was off, and the device leaves the sum
            over the rows to ``mlp_weight_backward``.
    """
    if layers and not masked:
        relu_backward(grads[-1], outs[-1], layers[-1].grad_bias, partials, device)
    for k in range(len(layers) - 1, 0, -1):
        below = layers[k - 1]
        linear_data_backward(
            grads[k], layers[k].weight, outs[k - 1], masks[k - 1], grads[k - 1], below.grad_bias, partials, device
        )
    if layers and grad_x is not None:
        linear_input_backward(grads[0], layers[0].weight, grad_x, device)


def mlp_weight_backward(
    x: Array, layers: Sequence[Linear], outs: Sequence[Array], grads: Sequence[Array], device: Device
) -> None:
    """Write the gradients of every layer's weight and, where the device left them to this, bias.

    Args:
        x: [B, I_0], the chain's input.
        layers: the chain.
        outs: the activations that ``mlp_forward`` wrote.
        grads: what ``mlp_data_backward`` wrote.
        device: runs it.
    """
    for k in range(len(layers) - 1, -1, -1):
        below = outs[k - 1] if k else x
        linear_weight_backward(grads[k], below, layers[k].grad_weight, layers[k].grad_bias, device)
