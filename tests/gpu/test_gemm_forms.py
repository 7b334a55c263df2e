"""Every form of a layer's products gives the same gradients; cublasLt and Hopper's kernels are played by NumPy."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dlrm import fused_products
from dlrm.device import HostDevice
from dlrm.mlp import Linear, mlp_data_backward, mlp_forward, mlp_weight_backward

WIDTHS = (24, 40, 136, 16)
ODD_WIDTHS = (24, 41, 136, 16)
"""One layer whose output is no whole number of bytes of bits: its ReLU is found in its output."""
ROWS = 150


class Array(np.ndarray):
    """NumPy's with CuPy's pointer."""

    @property
    def data(self) -> Any:
        return SimpleNamespace(ptr=self.ctypes.data)


@dataclass(frozen=True)
class FakeProduct:
    """The fields of ``dlrm.cublaslt.Product``, whose module needs a GPU's packages."""

    m: int
    n: int
    k: int
    transposed_a: bool
    transposed_b: bool
    lda: int
    ldb: int
    ldd: int
    dtype: str
    out_dtype: str
    epilogue: str = "DEFAULT"
    aux_ld: int = 0


class FakePlan:
    """A product by rows, with cublasLt's epilogues."""

    def __init__(self, product: Any) -> None:
        self.product = product

    def run(self, a: Array, b: Array, d: Array, *, bias: Array | None = None, mask: Array | None = None) -> None:
        """``d`` as ``dlrm.cublaslt.Plan.run`` leaves it."""
        p, exact = self.product, np.float64
        # By columns D[m, n] = op(A) op(B) is by rows [n, m].
        left = (b[:, : p.n].T if p.transposed_b else b[:, : p.k]).astype(exact)
        right = (a[:, : p.k].T if p.transposed_a else a[:, : p.m]).astype(exact)
        result = left @ right
        if p.epilogue in {"RELU_AUX_BIAS", "RELU_BIAS"}:
            result = np.maximum(result + bias, 0)
        if p.epilogue == "RELU_AUX_BIAS":
            packed = np.packbits(result > 0, axis=1, bitorder="little")
            mask[:, : packed.shape[1]] = packed
        if p.epilogue.startswith("DRELU"):
            assert p.m % 8 == 0
            result *= np.unpackbits(mask, axis=1, bitorder="little")[:, : p.m]
        if p.epilogue == "DRELU_BGRAD":
            bias[...] = result.sum(0)
        if p.epilogue == "BGRADB":
            bias[...] = left.sum(1)
        d[:, : p.m] = result


@pytest.fixture
def gemm_cuda(machine: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    if not machine.emulated:
        pytest.skip("with a GPU test_dense_model.py runs the real products")
    cupy = ModuleType("cupy")
    stream = SimpleNamespace(ptr=1, is_capturing=lambda: False)
    device = SimpleNamespace(attributes={"MultiProcessorCount": 3})
    cupy.cuda = SimpleNamespace(get_current_stream=lambda: stream, Device=lambda: device)  # type: ignore[attr-defined]
    cupy.empty, cupy.arange = np.empty, np.arange  # type: ignore[attr-defined]
    products = ModuleType("dlrm.cublaslt")
    products.Plan = FakePlan  # type: ignore[attr-defined]
    products.plan = lambda product, _measure: FakePlan(product)  # type: ignore[attr-defined]
    products.kept_milliseconds = lambda *_: 1.0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "dlrm.cublaslt", products)
    monkeypatch.delitem(sys.modules, "dlrm.gemm_cuda", raising=False)
    products.Product = FakeProduct  # type: ignore[attr-defined]
    own = ModuleType("dlrm.fused_products_cuda")
    own.SOURCE = Path(fused_products.__file__)  # type: ignore[attr-defined]
    own.supports = lambda *_: True  # type: ignore[attr-defined]
    own.data_product = fused_products.data_product  # type: ignore[attr-defined]
    own.relu_product = fused_products.relu_product  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dlrm.fused_products_cuda", own)
    module = importlib.import_module("dlrm.gemm_cuda")
    yield module
    sys.modules.pop("dlrm.gemm_cuda", None)


class ProductsOf(HostDevice):
    """Runs the operations of ``gemm_cuda``."""

    def __init__(self, module: ModuleType) -> None:
        super().__init__(compiled=False)
        self._module = module

    def kernel(self, module: str, name: str) -> Any:
        """That operation."""
        return getattr(self._module, name, None) if module == "dlrm.gemm" else None


def array(values: Any, dtype: Any = np.float32) -> Array:
    return np.array(values, dtype).view(Array)


def expected_gradients(
    x: Array, layers: list[Linear], outs: list[Array], top: Array
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Gradients of weights and biases in float64; ``top`` is that of the last of the activations ``outs``."""
    exact = [np.asarray(values, np.float64) for values in (x, *outs)]
    grad, weights, biases = np.asarray(top, np.float64), [], []
    for layer, out, below in zip(layers[::-1], exact[:0:-1], exact[-2::-1], strict=True):
        grad = grad * (out > 0)
        weights.append(grad.T @ below)
        biases.append(grad.sum(0))
        grad = grad @ np.asarray(layer.weight, np.float64)
    return weights[::-1], biases[::-1]


FORMS = [
    ("DRELU", False), ("mask", False), ("own", False),
    ("DRELU_BGRAD", True), ("mask_and_sum", True), ("own_and_sum", True),
]  # fmt: skip


@pytest.mark.parametrize("widths", [WIDTHS, ODD_WIDTHS])
@pytest.mark.parametrize("bits", [True, False])
@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize(("form", "bias_done"), FORMS)
@pytest.mark.parametrize("forward", ["cublasLt", "own"])
def test_a_form_gives_the_gradients(
    gemm_cuda: ModuleType,
    forward: str,
    form: str,
    bias_done: bool,
    apart: bool,
    bits: bool,
    widths: tuple[int, ...],
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gemm_cuda, "_fastest", lambda _, forms: forms[forward])
    device = ProductsOf(gemm_cuda)
    gemm_cuda._bits_seen = None if bits else False
    layers = [
        Linear(
            *(array(rng.standard_normal(shape) / 4) for shape in ((outputs, inputs), outputs)),
            *(array(np.full(shape, np.nan)) for shape in ((outputs, inputs), outputs)),
        )
        for inputs, outputs in pairwise(widths)
    ]
    x, top = array(rng.standard_normal((ROWS, widths[0]))), array(rng.standard_normal((ROWS, widths[-1])))
    outs = [array(np.full((ROWS, width), np.nan)) for width in widths[1:]]
    masks = [array(np.zeros((ROWS, -(-width // 128) * 16)), np.uint8) for width in widths[1:]]
    for step in range(3):  # the first one chooses, then every layer is told
        for layer in layers:
            layer.grad_weight.fill(np.nan)
            layer.grad_bias.fill(np.nan)
        mlp_forward(x, layers, outs, masks, device)
        weights, biases = expected_gradients(x, layers, outs, top)
        grads = [array(np.full((ROWS, width), np.nan)) for width in widths[1:-1]]
        grads.append(array(np.where(outs[-1] > 0, top, 0)))
        mlp_data_backward(layers, outs, masks, grads, None, device, masked=True)
        mlp_weight_backward(x, layers, outs, grads, device)
        for layer, weight, bias in zip(layers, weights, biases, strict=True):
            np.testing.assert_allclose(layer.grad_weight, weight, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(layer.grad_bias, bias, rtol=1e-4, atol=1e-4)
        assert len(gemm_cuda._choices) == len(layers)
        for choice in gemm_cuda._choices.values():
            assert choice.settled
            choice.apart = apart
            if choice.data_ms:
                choice.data, choice.bias_done = form, bias_done
        assert step or gemm_cuda._bits_seen is bits
