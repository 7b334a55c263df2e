"""Dense optimisers over one flat array of parameters.

The update formulas are those of ``docs/design.md``; tables apply the same ones to the rows that a batch touched.

Sources: Duchi, Hazan, Singer, "Adaptive Subgradient Methods" (JMLR 2011); Kingma and Ba, "Adam" (ICLR 2015),
algorithm 1; McMahan et al., "Ad Click Prediction: a View from the Trenches" (KDD 2013), algorithm 1, in
TensorFlow's form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dlrm.config import OptimizerConfig
from dlrm.device import Array, Device
from dlrm.errors import ConfigError
from dlrm.scalars import GOOD_STEPS, LOSS_SCALE, NOT_FINITE, OVERFLOW, SKIPPED_STEPS, UNSCALE

STATE_NAMES: dict[str, tuple[str, ...]] = {
    "sgd": (),
    "momentum": ("velocity",),
    "adagrad": ("accumulator",),
    "adam": ("m", "v"),
    "ftrl": ("n", "z"),
}
"""The state arrays of each kind."""

LOSS_SCALE_LIMITS = (2.0**-14, 2.0**24)
"""Dynamic loss scaling stays between these."""


def constants(config: OptimizerConfig, step: int) -> tuple[float, ...]:
    """What the kernels of a captured step find at ``scalars[DENSE]``: up to eight numbers, the learning rate aside.

    Args:
        config: kind and constants.
        step: t, from 1.
    """
    match config.kind:
        case "momentum":
            return (config.momentum,)
        case "adagrad":
            return (config.eps,)
        case "adam":
            beta1, beta2 = config.beta1, config.beta2
            return (beta1, 1 - beta1, beta2, 1 - beta2, config.eps, 1 - beta1**step, 1 - beta2**step)
        case "ftrl":
            return (config.ftrl_beta, config.l1, config.l2)
        case _:
            return ()


def begin_step(guard: Array) -> None:
    """A new step: forget what was not finite; that an exchange ran over stays noted. See ``dlrm.scalars``."""
    guard.view(np.int32)[NOT_FINITE] = 0


def check_finite(gradients: Array, guard: Array) -> None:
    """Set NOT_FINITE in ``guard`` if a number of the flat ``gradients`` is infinite or none; never clear it."""
    if not np.isfinite(gradients).all():
        guard.view(np.int32)[NOT_FINITE] = 1


def end_step(guard: Array, growth_interval: int, dynamic: bool) -> None:
    """Count the step as good or skipped, and with dynamic loss scaling choose the next step's scale.

    A skipped step halves the scale, ``growth_interval`` good ones in a row double it, within
    ``LOSS_SCALE_LIMITS``. A step whose exchange ran over counts as neither: it is done again.

    Args:
        guard: see ``dlrm.scalars``; changed.
        growth_interval: good steps after which the scale is doubled.
        dynamic: whether the scale changes.
    """
    counts = guard.view(np.int32)
    if counts[OVERFLOW]:
        return
    factor = np.float32(1)
    if counts[NOT_FINITE]:
        counts[SKIPPED_STEPS] += 1
        counts[GOOD_STEPS] = 0
        factor = np.float32(0.5)
    else:
        counts[GOOD_STEPS] += 1
        if counts[GOOD_STEPS] >= growth_interval:
            counts[GOOD_STEPS] = 0
            factor = np.float32(2)
    scale = guard[LOSS_SCALE] * factor
    if dynamic and LOSS_SCALE_LIMITS[0] <= scale <= LOSS_SCALE_LIMITS[1]:
        guard[LOSS_SCALE], guard[UNSCALE] = scale, 1 / scale


class DenseOptimizer:
    """One optimiser and its state over a flat array of parameters.

    Args:
        config: kind and constants.
        num_parameters: length of the flat array.
        dtype: float32 or float64; all arithmetic is done in it.
        device: holds the state, runs the update.

    Attributes:
        state: flat arrays [num_parameters] by name, as ``STATE_NAMES`` lists them for the kind.

    Raises:
        ConfigError: the kind is for tables only.
    """

    def __init__(self, config: OptimizerConfig, num_parameters: int, dtype: Any, device: Device) -> None:
        if config.kind not in STATE_NAMES:
            raise ConfigError(
                f"optimizer.kind: {config.kind!r} is for embedding tables; give the dense part one of "
                f"{', '.join(STATE_NAMES)}"
            )
        self.config = config
        self.device = device
        self.state: dict[str, Array] = {name: device.zeros(num_parameters, dtype) for name in STATE_NAMES[config.kind]}
        for name in ("accumulator", "n"):
            if name in self.state:
                self.state[name].fill(config.accumulator_start)

    def step(self, parameters: Array, gradients: Array, lr: float, step: int) -> None:
        """Update ``parameters`` and the state in place.

        Args:
            parameters: [num_parameters].
            gradients: [num_parameters], of the mean loss over the global batch.
            lr: learning rate of this step.
            step: step of the run, from 1.
        """
        config, state = self.config, self.state
        scalar = parameters.dtype.type
        rate = scalar(lr)
        if config.kind == "sgd":
            self._run(sgd, parameters, gradients, rate)
        elif config.kind == "momentum":
            self._run(momentum, parameters, gradients, state["velocity"], rate, scalar(config.momentum))
        elif config.kind == "adagrad":
            self._run(adagrad, parameters, gradients, state["accumulator"], rate, scalar(config.eps))
        elif config.kind == "adam":
            constants = (config.beta1, 1 - config.beta1, config.beta2, 1 - config.beta2, config.eps)
            corrections = (1 - config.beta1**step, 1 - config.beta2**step)
            scalars = tuple(map(scalar, constants + corrections))
            self._run(adam, parameters, gradients, state["m"], state["v"], rate, *scalars)
        elif lr > 0:  # FTRL divides by the rate; at rate 0, the end of a decay, nothing moves.
            scalars = (scalar(config.ftrl_beta), scalar(config.l1), scalar(config.l2))
            self._run(ftrl, parameters, gradients, state["n"], state["z"], rate, *scalars)

    def _run(self, reference: Callable[..., None], *arguments: Any) -> None:
        kernel = self.device.kernel(__name__, reference.__name__) or reference
        kernel(*arguments)


# The references below take scalars of the arrays' own dtype, so that float32 stays float32.


def sgd(parameters: Array, gradients: Array, lr: Any) -> None:
    """``w -= lr g``."""
    parameters -= lr * gradients


def momentum(parameters: Array, gradients: Array, velocity: Array, lr: Any, mu: Any) -> None:
    """``v = mu v + g; w -= lr v``."""
    velocity *= mu
    velocity += gradients
    parameters -= lr * velocity


def adagrad(parameters: Array, gradients: Array, accumulator: Array, lr: Any, eps: Any) -> None:
    """``a += g^2; w -= lr g / (sqrt(a) + eps)``."""
    accumulator += gradients * gradients
    parameters -= lr * gradients / (accumulator**0.5 + eps)


def adam(
    parameters: Array,
    gradients: Array,
    m: Array,
    v: Array,
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
    m *= beta1
    m += one_minus_beta1 * gradients
    v *= beta2
    v += one_minus_beta2 * (gradients * gradients)
    parameters -= lr * (m / correction1) / ((v / correction2) ** 0.5 + eps)


def ftrl(parameters: Array, gradients: Array, n: Array, z: Array, lr: Any, beta: Any, l1: Any, l2: Any) -> None:
    """FTRL-proximal with power -0.5.

    ``n' = n + g^2; z += g - (sqrt(n') - sqrt(n)) / lr w``, and w is 0 where abs(z) <= l1, otherwise
    ``-(z - sign(z) l1) / ((beta + sqrt(n')) / lr + 2 l2)``.
    """
    root = n**0.5
    n += gradients * gradients
    new_root = n**0.5
    z += gradients - (new_root - root) / lr * parameters
    shrunk = abs(z) - l1
    # z * 0 keeps a NaN visible where a plain 0 would hide it.
    sign = (z > 0) * lr.dtype.type(1) - (z < 0) * lr.dtype.type(1) + z * 0
    parameters[...] = -(sign * shrunk) / ((beta + new_root) / lr + 2 * l2)
    parameters[shrunk <= 0] = 0
