"""Initial values of the dense weights, the same whatever the ranks; tables have ``1 / sqrt(rows)`` beside them."""

from __future__ import annotations

import math

from dlrm.device import Array, Device
from dlrm.philox import normal_rows


def initialize_linear(seed: int, prefix: str, weight: Array, bias: Array, device: Device) -> None:
    """Fill a layer: weight normal sqrt(2 / (I + O)), bias normal sqrt(1 / O).

    Args:
        seed: of the run.
        prefix: the layer's name, such as ``bottom.0``.
        weight: [O, I], written.
        bias: [O], written.
        device: runs it.

    Source: Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural networks" (2010),
    in the form of facebookresearch/dlrm.
    """
    outputs, inputs = weight.shape
    scale = math.sqrt(2.0 / (inputs + outputs))
    normal_rows(seed, f"{prefix}.weight", outputs, inputs, weight.dtype, scale=scale, out=weight, device=device)
    row = bias[None, :]
    normal_rows(seed, f"{prefix}.bias", 1, outputs, bias.dtype, scale=math.sqrt(1.0 / outputs), out=row, device=device)
