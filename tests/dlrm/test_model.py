"""The whole dense part: against a plain formulation differentiated by complex steps, and its edge cases."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from dlrm.config import ModelConfig
from dlrm.device import HostDevice
from dlrm.errors import ConfigError
from dlrm.loss import bce_with_logits
from dlrm.model import DenseModel
from dlrm.philox import normal_rows

DEVICES = {"compiled": HostDevice(), "reference": HostDevice(compiled=False)}
SMALL = ModelConfig(embedding_dim=4, bottom_mlp=(5, 4), top_mlp=(7, 6, 1))


@pytest.fixture(params=DEVICES)
def device(request):
    return DEVICES[request.param]


def make_model(config=SMALL, *, num_dense=3, num_tables=3, dtype=np.float64, device, seed=5):
    return DenseModel(model=config, num_dense=num_dense, num_tables=num_tables, dtype=dtype, device=device, seed=seed)


def run_step(model, workspace, dense, pooled, labels):
    """Forward, loss and backward of one batch; returns the loss."""
    rows = len(labels)
    workspace.vectors[:rows, model.first :] = pooled
    model.bottom_forward(dense, workspace)
    logits = model.top_forward(workspace, rows)
    loss = bce_with_logits(logits, labels, rows or 1, workspace.grad_logits[:rows], model.device)
    model.top_data_backward(workspace, rows)
    model.top_weight_backward(workspace, rows)
    model.bottom_backward(dense, workspace, rows)
    return loss


def plain_loss(parameters, dense, pooled, labels, num_bottom, num_top):
    """DLRM's mean loss, one sample at a time, in whatever numbers it is given (complex ones for slopes)."""
    total = 0
    for x, tables, label in zip(dense, pooled, labels, strict=True):
        vectors = [*tables]
        for i in range(num_bottom):
            x = parameters[f"bottom.{i}.weight"] @ x + parameters[f"bottom.{i}.bias"]
            x = np.where(x.real > 0, x, 0)
        if num_bottom:
            vectors.insert(0, x)
        dots = [sum(vectors[i] * vectors[j]) for i in range(len(vectors)) for j in range(i)]
        x = np.array([*(x if num_bottom else ()), *dots])
        for i in range(num_top):
            x = parameters[f"top.{i}.weight"] @ x + parameters[f"top.{i}.bias"]
            x = np.where(x.real > 0, x, 0) if i < num_top - 1 else x[0]
        total += np.log(1 + np.exp(x)) - label * x
    return total / len(labels)


def slopes(loss, array):
    """d loss / d array by complex steps: exact to rounding, since nothing is subtracted."""
    result = np.empty(array.shape)
    step = 1e-40
    for index in np.ndindex(array.shape):
        array[index] += 1j * step
        result[index] = loss().imag / step
        array[index] = array[index].real
    return result


@pytest.mark.parametrize(
    ("config", "num_dense", "num_tables"),
    [
        (SMALL, 3, 3),
        (SMALL, 0, 3),
        (SMALL, 1, 1),
        (SMALL, 2, 0),
        (ModelConfig(embedding_dim=4, bottom_mlp=(4,), top_mlp=(1,)), 3, 4),
        (ModelConfig(embedding_dim=2, bottom_mlp=(3, 2), top_mlp=(9, 1)), 0, 5),
    ],
    ids=["usual", "no dense", "one and one", "no tables", "no hidden layers", "no dense, one hidden"],
)
def test_loss_and_all_gradients_equal_the_plain_formulation(config, num_dense, num_tables, device, rng):
    rows = 5
    model = make_model(config, num_dense=num_dense, num_tables=num_tables, device=device)
    workspace = model.workspace(8)
    for array in (workspace.vectors, workspace.grad_vectors, workspace.logits, workspace.interaction):
        array.fill(np.nan)
    model.flat_gradients.fill(np.nan)
    dense, pooled = rng.normal(size=(rows, num_dense)), rng.normal(size=(rows, num_tables, config.embedding_dim))
    labels = rng.integers(0, 2, rows)
    loss = run_step(model, workspace, dense, pooled, labels)

    parameters = {name: array.astype(complex) for name, array in model.parameters.items()}
    complex_pooled = pooled.astype(complex)
    num_bottom = len(config.bottom_mlp) if num_dense else 0

    def plain():
        return plain_loss(parameters, dense.astype(complex), complex_pooled, labels, num_bottom, len(config.top_mlp))

    assert loss == pytest.approx(plain().real, rel=1e-12)
    for name, array in parameters.items():
        np.testing.assert_allclose(model.gradients[name], slopes(plain, array), rtol=1e-9, atol=1e-12, err_msg=name)
    grad_pooled = workspace.grad_vectors[:rows, model.first :]
    np.testing.assert_allclose(grad_pooled, slopes(plain, complex_pooled), rtol=1e-9, atol=1e-12)


def test_grad_of_the_bottom_output_lies_in_place_0(device, rng):
    """Before the bottom's own backward pass: the concatenated copy and the dots, both."""
    model = make_model(device=device)
    workspace = model.workspace(4)
    pooled = rng.normal(size=(4, 3, 4))
    workspace.vectors[:, 1:] = pooled
    bottom = rng.normal(size=(4, 4))

    def logits_sum(bottom_output):
        workspace.vectors[:, 0] = bottom_output
        return model.top_forward(workspace, 4).sum()

    logits_sum(bottom)
    workspace.grad_logits[:] = 1
    model.top_data_backward(workspace, 4)
    grad = workspace.grad_vectors[:, 0].copy()
    direction = 1e-6 * rng.normal(size=bottom.shape)
    rise = logits_sum(bottom + direction) - logits_sum(bottom - direction)
    assert (grad * direction).sum() == pytest.approx(rise / 2, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-11), (np.float32, 2e-4)])
def test_compiled_equals_reference_at_size(dtype, tolerance, rng):
    """Layers wide enough for every kernel's threaded branch; a batch that fills no chunk."""
    config = ModelConfig(embedding_dim=16, bottom_mlp=(130, 16), top_mlp=(150, 70, 1))
    rows = 333
    dense, pooled = rng.normal(size=(rows, 13)).astype(dtype), rng.normal(size=(rows, 9, 16)).astype(dtype)
    labels = rng.integers(0, 2, rows)
    results = []
    for device in DEVICES.values():
        model = make_model(config, num_dense=13, num_tables=9, dtype=dtype, device=device)
        workspace = model.workspace(400)
        loss = run_step(model, workspace, dense, pooled, labels)
        results.append((loss, model.flat_gradients, workspace.grad_vectors[:rows, 1:]))
    for compiled, reference in zip(*results, strict=True):
        scale = np.sqrt(np.mean(np.square(reference)))
        np.testing.assert_allclose(compiled, reference, rtol=tolerance, atol=tolerance * scale)


def test_step_is_bit_equal_when_repeated(rng):
    config = ModelConfig(embedding_dim=16, bottom_mlp=(128, 16), top_mlp=(256, 64, 1))
    dense, pooled = rng.normal(size=(500, 13)).astype(np.float32), rng.normal(size=(500, 6, 16)).astype(np.float32)
    labels = rng.integers(0, 2, 500)
    outcomes = set()
    for _ in range(4):
        model = make_model(config, num_dense=13, num_tables=6, dtype=np.float32, device=HostDevice())
        workspace = model.workspace(500)
        loss = run_step(model, workspace, dense, pooled, labels)
        outcomes.add((loss, model.flat_gradients.tobytes(), workspace.grad_vectors[:, 1:].tobytes()))
    assert len(outcomes) == 1


@pytest.mark.parametrize("num_dense", [0, 3])
@pytest.mark.parametrize("capacity", [0, 6])
def test_rank_without_rows_has_zero_gradients(device, num_dense, capacity):
    model = make_model(num_dense=num_dense, device=device)
    model.flat_gradients.fill(np.nan)
    workspace = model.workspace(capacity)
    loss = run_step(model, workspace, np.empty((0, num_dense)), np.empty((0, 3, 4)), np.empty(0, np.int32))
    assert loss == 0
    np.testing.assert_array_equal(model.flat_gradients, 0)


def test_workspace_without_training_runs_forward_only(device, rng):
    model = make_model(device=device)
    training, evaluation = model.workspace(6), model.workspace(6, training=False)
    assert evaluation.grad_vectors is None
    dense, pooled = rng.normal(size=(6, 3)), rng.normal(size=(6, 3, 4))
    logits = []
    for workspace in (training, evaluation):
        workspace.vectors[:, 1:] = pooled
        model.bottom_forward(dense, workspace)
        logits.append(model.top_forward(workspace, 6))
    np.testing.assert_array_equal(*logits)


def test_step_allocates_no_arrays(rng):
    config = ModelConfig(embedding_dim=16, bottom_mlp=(64, 16), top_mlp=(64, 1))
    rows = 2048
    model = make_model(config, num_dense=13, num_tables=6, dtype=np.float32, device=HostDevice())
    workspace = model.workspace(rows)
    batch = (
        rng.normal(size=(rows, 13)).astype(np.float32),
        rng.normal(size=(rows, 6, 16)).astype(np.float32),
        rng.integers(0, 2, rows),
    )
    run_step(model, workspace, *batch)
    tracemalloc.start()
    run_step(model, workspace, *batch)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # The smallest hidden activation would be 2048 * 16 * 4 = 128 KiB; a vector over the rows 8 KiB.
    assert peak < 24 * 1024


def test_names_shapes_and_views():
    model = make_model(device=HostDevice(), dtype=np.float32)
    shapes = {name: array.shape for name, array in model.parameters.items()}
    assert shapes == {
        "bottom.0.weight": (5, 3),
        "bottom.0.bias": (5,),
        "bottom.1.weight": (4, 5),
        "bottom.1.bias": (4,),
        "top.0.weight": (7, 10),
        "top.0.bias": (7,),
        "top.1.weight": (6, 7),
        "top.1.bias": (6,),
        "top.2.weight": (1, 6),
        "top.2.bias": (1,),
    }
    assert sum(array.size for array in model.parameters.values()) == model.flat_parameters.size
    for views, flat in ((model.parameters, model.flat_parameters), (model.gradients, model.flat_gradients)):
        assert list(views) == list(shapes)
        flat[:] = np.arange(flat.size)
        np.testing.assert_array_equal(np.concatenate([view.ravel() for view in views.values()]), flat)
    for part, gradients in (("bottom", model.bottom_gradients), ("top", model.top_gradients)):
        own = [view.ravel() for name, view in model.gradients.items() if name.startswith(part)]
        np.testing.assert_array_equal(np.concatenate(own), gradients)
    without_dense = make_model(num_dense=0, device=HostDevice())
    assert without_dense.first == 0
    assert (len(without_dense.bottom_gradients), len(without_dense.top_gradients)) == (0, 7 * 3 + 7 + 6 * 7 + 6 + 6 + 1)
    assert without_dense.parameters["top.0.weight"].shape == (7, 3)
    assert not any(name.startswith("bottom") for name in without_dense.parameters)


def test_initial_values_are_the_documented_ones(rng):
    seed = int(rng.integers(2**63))
    config = ModelConfig(embedding_dim=16, bottom_mlp=(16,), top_mlp=(400, 1))
    model = make_model(config, num_dense=7, num_tables=26, seed=seed, device=HostDevice())
    inputs = 16 + 27 * 26 // 2
    weight, bias = model.parameters["top.0.weight"], model.parameters["top.0.bias"]
    np.testing.assert_allclose(
        weight, np.sqrt(2 / (inputs + 400)) * normal_rows(seed, "top.0.weight", 400, inputs, np.float64), rtol=1e-14
    )
    np.testing.assert_allclose(
        bias, np.sqrt(1 / 400) * normal_rows(seed, "top.0.bias", 1, 400, np.float64)[0], rtol=1e-14
    )
    # Six standard errors of a sample's standard deviation.
    assert weight.std() == pytest.approx(np.sqrt(2 / (inputs + 400)), rel=6 / np.sqrt(2 * weight.size))
    assert bias.std() == pytest.approx(np.sqrt(1 / 400), rel=6 / np.sqrt(2 * 400))


@pytest.mark.parametrize("num_tables", [0, 1])
def test_model_without_any_input_is_refused(num_tables):
    with pytest.raises(ConfigError, match="leave the top MLP without input"):
        make_model(num_dense=0, num_tables=num_tables, device=HostDevice())
