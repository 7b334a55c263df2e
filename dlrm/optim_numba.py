"""Compiled dense optimisers: the functions of ``optim.py``, one pass over memory each.

Every element is independent and nothing is contracted, so that the results equal the references'.
"""

from __future__ import annotations

import math
from typing import Any

from numba import njit, prange


@njit(parallel=True, nogil=True, cache=True)
def sgd(parameters: Any, gradients: Any, lr: Any) -> None:
    """``w -= lr g``."""
    for i in prange(parameters.size):
        parameters[i] -= lr * gradients[i]


@njit(parallel=True, nogil=True, cache=True)
def momentum(parameters: Any, gradients: Any, velocity: Any, lr: Any, mu: Any) -> None:
    """``v = mu v + g; w -= lr v``."""
    for i in prange(parameters.size):
        speed = velocity[i] * mu + gradients[i]
        velocity[i] = speed
        parameters[i] -= lr * speed


@njit(parallel=True, nogil=True, cache=True, error_model="numpy")
def adagrad(parameters: Any, gradients: Any, accumulator: Any, lr: Any, eps: Any) -> None:
    """``a += g^2; w -= lr g / (sqrt(a) + eps)``."""
    for i in prange(parameters.size):
        gradient = gradients[i]
        total = accumulator[i] + gradient * gradient
        accumulator[i] = total
        parameters[i] -= lr * gradient / (math.sqrt(total) + eps)


@njit(parallel=True, nogil=True, cache=True, error_model="numpy")
def adam(
    parameters: Any,
    gradients: Any,
    m: Any,
    v: Any,
    lr: Any,
    beta1: Any,
    one_minus_beta1: Any,
    beta2: Any,
    one_minus_beta2: Any,
    eps: Any,
    correction1: Any,
    correction2: Any,
) -> None:
    """``m = b1 m + (1-b1) g; v = b2 v + (1-b2) g^2; w -= lr (m / c1) / (sqrt(v / c2) + eps)``, c = 1 - b^t."""
    for i in prange(parameters.size):
        gradient = gradients[i]
        first = m[i] * beta1 + one_minus_beta1 * gradient
        second = v[i] * beta2 + one_minus_beta2 * (gradient * gradient)
        m[i] = first
        v[i] = second
        parameters[i] -= lr * (first / correction1) / (math.sqrt(second / correction2) + eps)


@njit(parallel=True, nogil=True, cache=True, error_model="numpy")
def ftrl(parameters: Any, gradients: Any, n: Any, z: Any, lr: Any, beta: Any, l1: Any, l2: Any) -> None:
    """FTRL-proximal with power -0.5; formula at the reference."""
    for i in prange(parameters.size):
        gradient = gradients[i]
        total = n[i] + gradient * gradient
        root = math.sqrt(total)
        dual = z[i] + (gradient - (root - math.sqrt(n[i])) / lr * parameters[i])
        n[i] = total
        z[i] = dual
        if abs(dual) <= l1:
            parameters[i] = 0.0
        else:
            parameters[i] = -(dual - math.copysign(l1, dual)) / ((beta + root) / lr + (l2 + l2))
