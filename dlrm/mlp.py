"""Chains of fully connected ReLU layers. Activations are the caller's: written where it says, never hidden.

Shapes: B rows; layer k has I_k inputs and O_k = I_(k+1) outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dlrm.device import Array, Device
from dlrm.gemm import linear_backward, linear_relu_forward, num_chunks, relu_backward


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


@dataclass(frozen=True, slots=True)
class Scratch:
    """What a backward pass needs besides activations; holds nothing between two calls.

    Attributes:
        grads: two flat arrays for the gradients of neighbouring activations, each at least [B * widest].
        partials: flat, for sums over rows, at least [num_chunks(B) * widest].
    """

    grads: tuple[Array, Array]
    partials: Array

    @classmethod
    def allocate(cls, capacity: int, widest: int, dtype: object, device: Device) -> Scratch:
        """Arrays for ``capacity`` rows and layers of up to ``widest`` inputs or outputs."""
        size = capacity * widest
        grads = (device.empty(size, dtype), device.empty(size, dtype))
        return cls(grads, device.empty(num_chunks(capacity) * widest, dtype))

    def grad(self, which: int, rows: int, width: int) -> Array:
        """[rows, width] of the array ``which % 2``."""
        return self.grads[which % 2][: rows * width].reshape(rows, width)


def mlp_forward(x: Array, layers: Sequence[Linear], outs: Sequence[Array], device: Device) -> None:
    """Write every layer's activation.

    Args:
        x: [B, I_0].
        layers: the chain.
        outs: one [B, >= O_k] a layer; only the last may be wider than O_k.
        device: runs it.
    """
    for layer, out in zip(layers, outs, strict=True):
        linear_relu_forward(x, layer.weight, layer.bias, out, device)
        x = out


def mlp_backward(
    x: Array,
    layers: Sequence[Linear],
    outs: Sequence[Array],
    grad_out: Array,
    scratch: Scratch,
    device: Device,
    *,
    grad_x: Array | None = None,
) -> None:
    """Write the gradients of every layer's weight and bias.

    Args:
        x: [B, I_0].
        layers: the chain.
        outs: the activations that ``mlp_forward`` wrote.
        grad_out: [B, >= O_last]: gradient of the last activation; changed in place. It may lie in
            ``scratch.grads[len(layers) % 2]``.
        scratch: for the gradients between the layers.
        device: runs it.
        grad_x: [B, I_0], written: gradient of ``x``; ``None``: not wanted.
    """
    grad = grad_out
    for k in range(len(layers) - 1, -1, -1):
        layer = layers[k]
        relu_backward(grad, outs[k], layer.grad_bias, scratch.partials, device)
        if k:
            below, grad_below = outs[k - 1], scratch.grad(k, len(x), layer.weight.shape[1])
        else:
            below, grad_below = x, grad_x
        linear_backward(grad, below, layer.weight, layer.grad_weight, grad_below, device)
        grad = grad_below
