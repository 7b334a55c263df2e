"""The dense part on a GPU against itself in float64 on the CPU: cublasLt's products and the small passes beside them.

Products do not run emulated, so that these tests need a GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dlrm.config import ModelConfig
from dlrm.device import HostDevice
from dlrm.model import DenseModel, DenseWorkspace

SHAPES = {
    "mlperf": (13, 26, ModelConfig(embedding_dim=128, bottom_mlp=(512, 256, 128), top_mlp=(1024, 1024, 512, 256, 1))),
    "odd": (5, 3, ModelConfig(embedding_dim=16, bottom_mlp=(27, 16), top_mlp=(41, 9, 1))),
    "no dense columns": (0, 4, ModelConfig(embedding_dim=8, bottom_mlp=(8,), top_mlp=(1,))),
}
TOLERANCE = {"float32": 2e-5, "float16": 1e-2, "uint16": 8e-2}
"""Of a gradient's or an output's norm of differences, relative to its norm; the sums are long and numbers short."""


def values(array: Any) -> np.ndarray:
    """The numbers in float64; uint16 are the bits of bfloat16."""
    if array.dtype == np.uint16:
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return np.asarray(array, np.float64)


def distance(found: Any, expected: np.ndarray) -> float:
    size = np.linalg.norm(expected)
    return float(np.linalg.norm(values(found) - expected) / (size or 1.0))


def took_over(device: Any, work: DenseWorkspace, expected: DenseWorkspace) -> None:
    """Copy the activations of a pass on the GPU."""
    pairs = [*zip(work.top, expected.top, strict=True), *zip(work.bottom, expected.bottom, strict=True)]
    for mine, theirs in [*pairs, (work.interaction, expected.interaction), (work.vectors, expected.vectors)]:
        theirs[...] = values(device.to_host(mine))[:, : theirs.shape[1]]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [333, 1024])
def test_forward_and_backward(machine: Any, shape: str, rows: int, dtype: str, rng: np.random.Generator) -> None:
    if machine.emulated:
        pytest.skip("cublasLt needs a GPU")
    from dlrm.cuda import CudaDevice

    num_dense, num_tables, config = SHAPES[shape]
    sizes: dict[str, Any] = {"model": config, "num_dense": num_dense, "num_tables": num_tables, "seed": 3}
    host, device = HostDevice(), CudaDevice()
    reference = DenseModel(**sizes, dtype=np.float64, device=host)
    model = DenseModel(**sizes, dtype=dtype, device=device)
    for name, weight in reference.parameters.items():
        device.assign(weight.astype(np.float32), model.parameters[name])
        weight[...] = device.to_host(model.parameters[name])
    model.refresh_weights()

    dense = rng.standard_normal((rows, num_dense))
    vectors = rng.standard_normal((rows, reference.num_vectors, config.embedding_dim)) * 0.2
    grad_logits = rng.standard_normal(rows)  # as times a loss scale, which keeps float16 out of its subnormals
    work, expected = model.workspace(rows), reference.workspace(rows)
    wide = device.zeros((rows, model.dense_columns), dtype)
    device.assign(dense, wide[:, :num_dense])
    for _ in range(2):  # the first pass measures, the second one does what was chosen
        for array in (work.grad_vectors, model.flat_gradients):
            array.fill(7)
        device.assign(vectors, work.vectors)
        model.bottom_forward(wide, work)
        model.top_forward(work, rows)
        device.assign(grad_logits, work.grad_logits)
        model.top_data_backward(work, rows)
        model.top_weight_backward(work, rows)
        model.bottom_backward(wide, work, rows)
    expected.vectors[...] = vectors
    reference.bottom_forward(dense, expected)
    reference.top_forward(expected, rows)
    assert distance(device.to_host(work.logits), expected.logits) < TOLERANCE[dtype]

    # Rounding switches a ReLU here and there, and with it a whole gradient: the backward pass starts from the same.
    took_over(device, work, expected)
    expected.grad_logits[...] = grad_logits
    reference.top_data_backward(expected, rows)
    reference.top_weight_backward(expected, rows)
    reference.bottom_backward(dense, expected, rows)
    first = reference.first
    tables = device.to_host(work.grad_vectors)[:, first:]
    assert distance(tables, expected.grad_vectors[:, first:]) < TOLERANCE[dtype]
    for name, gradient in reference.gradients.items():
        assert distance(device.to_host(model.gradients[name]), gradient) < TOLERANCE[dtype], name
