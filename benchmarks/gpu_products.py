"""Every form of a layer's products on one GPU: checked, then timed beside the plain product.

    python benchmarks/gpu_products.py --batches 65536 6912

The layers are MLPerf DLRM's, half precision. A form is what gemm_cuda.py can choose from: cublasLt's epilogues, own
kernels with the ReLU in the product, the plain product with a pass behind it. Each is compared with a float32 product,
outputs poisoned before; then it is captured and launched alone, the second-level cache overwritten between launches.
Medians. How to read it: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cupy
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]

from gpu_clock import FLOAT, HALF, Clock  # noqa: E402

from dlrm import gemm_cuda  # noqa: E402
from dlrm.cuda import CudaDevice  # noqa: E402

BOTTOM, TOP = (16, 512, 256, 128), (480, 1024, 1024, 512, 256)
"""Widths as they are stored."""
TOLERANCE = 2e-3
"""Of an output's norm of differences from the float32 product, relative to its norm; sums of 65,536 rows too."""


@dataclass(frozen=True, slots=True)
class Layer:
    """Arrays of one layer: B rows, I inputs, O outputs."""

    x: Any
    weight: Any
    bias: Any
    out: Any
    mask: Any
    mask_below: Any
    grad: Any
    grad_below: Any
    grad_bias: Any


def normal(*shape: int) -> Any:
    """Random numbers of half precision."""
    return cupy.random.standard_normal(shape, FLOAT).astype(HALF)


def make_layer(rows: int, inputs: int, outputs: int, device: CudaDevice) -> Layer:
    """A layer whose input is the output of another one's ReLU."""
    below = Layer(
        normal(rows, 64), normal(inputs, 64), normal(inputs), cupy.empty((rows, inputs), HALF),
        device.relu_mask(rows, inputs, True), None, None, None, None,
    )  # fmt: skip
    gemm_cuda.linear_relu_forward(below.x, below.weight, below.bias, below.out, below.mask)
    return Layer(
        below.out * HALF(1 / 16), normal(outputs, inputs), normal(outputs), cupy.empty((rows, outputs), HALF),
        device.relu_mask(rows, outputs, True), below.mask, normal(rows, outputs), cupy.empty((rows, inputs), HALF),
        cupy.empty(inputs, FLOAT),
    )  # fmt: skip


def distance(found: Any, expected: Any) -> float:
    """Norm of the differences, relative; NaN stays one."""
    return float(cupy.linalg.norm((found.astype(FLOAT) - expected).ravel()) / cupy.linalg.norm(expected.ravel()))


def errors(form: Callable[[], None], pairs: dict[str, tuple[Any, Any]]) -> str:
    """What is wrong with a form's results, or nothing.

    Args:
        form: issues it.
        pairs: written arrays, poisoned before, and what they have to hold.
    """
    for written, _ in pairs.values():
        written.fill(np.nan)
    form()
    away = {what: distance(written, expected) for what, (written, expected) in pairs.items()}
    return "".join(f"  WRONG: {what} by {error:.1e}" for what, error in away.items() if not error < TOLERANCE)


Cases = Iterator[tuple[str, Callable[[], None], str]]
"""Name, what issues it, what is wrong with it."""


def forward_cases(layer: Layer) -> Cases:
    """The plain product, then every form."""
    yield "plain", lambda: gemm_cuda.linear_forward(layer.x, layer.weight, layer.out), ""
    expected = cupy.maximum(layer.x.astype(FLOAT) @ layer.weight.astype(FLOAT).T + layer.bias.astype(FLOAT), 0)
    for mask, note in ((layer.mask, ", bits written"), (None, "")):
        forms = gemm_cuda.forward_forms(layer.x, layer.weight, layer.bias, layer.out, mask)
        for name, form in forms.items():
            yield f"{name}{note}", form, errors(form, {"output": (layer.out, expected)})


def data_cases(layer: Layer) -> Cases:
    """The plain product, then every form."""
    yield "plain", lambda: gemm_cuda.relu_input_backward(layer.grad, layer.weight, layer.grad_below), ""
    expected = layer.grad.astype(FLOAT) @ layer.weight.astype(FLOAT)
    expected[layer.x <= 0] = 0
    total = expected.sum(0, dtype=np.float64).astype(FLOAT)
    forms = gemm_cuda.data_forms(layer.grad, layer.weight, layer.x, layer.mask_below, layer.grad_below, layer.grad_bias)
    for name, form in forms.items():
        pairs = {"gradient": (layer.grad_below, expected)}
        if name in gemm_cuda.WITH_BIAS:
            pairs["bias sum"] = (layer.grad_bias, total)
        note = ", bias summed" if name in gemm_cuda.WITH_BIAS else ""
        yield f"{name}{note}", form, errors(form, pairs)


def run(batch: int, clock: Clock) -> bool:
    """Print the table of one batch size; returns whether all forms did what they should."""
    right = True
    print(f"\nbatch {batch:,}\n{'':56}{'us':>9}{'TFLOP/s':>9}{'of plain':>10}", flush=True)
    for widths, part in ((BOTTOM, "bottom"), (TOP, "top")):
        for place, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            layer = make_layer(batch, inputs, outputs, clock.device)
            passes = {f"forward {inputs} -> {outputs}": forward_cases(layer)}
            if place:  # below the first layer there is no ReLU
                passes[f"data backward {outputs} -> {inputs}"] = data_cases(layer)
            for title, cases in passes.items():
                plain = None
                for name, form, wrong in cases:
                    us = clock.median_us(form)
                    plain, right = plain or us, right and not wrong
                    rate = 2e-6 * batch * inputs * outputs / us
                    print(f"{f'{part}, {title}: {name}':56}{us:9.1f}{rate:9.0f}{plain / us:10.0%}{wrong}", flush=True)
    return right


def main() -> None:
    """Time all forms."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[65536, 6912])
    parser.add_argument("--repetitions", type=int, default=20, help="launches of which the median is taken")
    options = parser.parse_args()
    device = CudaDevice(0)
    print(f"{device.name}, CuPy {cupy.__version__}, CUDA {cupy.cuda.runtime.runtimeGetVersion()}", flush=True)
    clock = Clock(device, options.repetitions)
    failed = [batch for batch in options.batches if not run(batch, clock)]
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
