"""The matrix products of a training step and nothing else, in one library: the ceiling of a shape.

What a trainer adds (lookups, interaction, updates) can only make it slower than its BLAS is at these products,
as long as it computes them one after the other.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shapes import SHAPES, Shape
from timing import repeat, report


def numpy_products(shape: Shape) -> Callable[[int], object]:
    """All products of a step with ``np.matmul(out=)``, operands laid out as a trainer has them."""
    import numpy as np

    random = np.random.default_rng(1)

    def filled(*size: int) -> Any:
        return random.random(size, dtype=np.float32)

    layers = [(filled(shape.batch, a), filled(b, a), filled(shape.batch, b), inner) for a, b, inner in shape.layers()]
    outs = [(np.empty_like(y), np.empty_like(w), np.empty_like(x)) for x, w, y, _ in layers]

    def step(_: int) -> None:
        for (x, weight, grad, inner), (y, grad_weight, grad_x) in zip(layers, outs, strict=True):
            np.matmul(x, weight.T, out=y)
            np.matmul(grad.T, x, out=grad_weight)
            if inner:
                np.matmul(grad, weight, out=grad_x)

    return step


def torch_products(shape: Shape, threads: int) -> Callable[[int], object]:
    """All products of a step with ``torch.mm(out=)``, operands laid out as a trainer has them."""
    import torch

    torch.set_num_threads(threads)
    layers = [
        (torch.rand(shape.batch, a), torch.rand(b, a), torch.rand(shape.batch, b), inner)
        for a, b, inner in shape.layers()
    ]
    outs = [(torch.empty_like(y), torch.empty_like(w), torch.empty_like(x)) for x, w, y, _ in layers]

    def step(_: int) -> None:
        for (x, weight, grad, inner), (y, grad_weight, grad_x) in zip(layers, outs, strict=True):
            torch.mm(x, weight.T, out=y)
            torch.mm(grad.T, x, out=grad_weight)
            if inner:
                torch.mm(grad, weight, out=grad_x)

    return step


def describe_numpy_blas() -> str:
    """Library, version and kernel (core type) of NumPy's BLAS, asked from the loaded library itself."""
    import numpy as np

    built = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    name = f"{built.get('name', 'unknown')} {built.get('version', '')}".strip()
    kernel = _openblas_kernel(Path(np.__file__).parents[1] / "numpy.libs")
    if kernel is None and importlib.util.find_spec("threadpoolctl"):
        import threadpoolctl

        found = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
        kernel = found[0].get("architecture") if found else None
    return f"numpy {np.__version__}, {name}, kernel {kernel or 'not named by the library'}"


def _openblas_kernel(folder: Path) -> str | None:
    for path in folder.glob("*openblas*"):
        library = ctypes.CDLL(str(path))
        for symbol in ("scipy_openblas_get_corename64_", "openblas_get_corename64_", "openblas_get_corename"):
            if hasattr(library, symbol):
                function: Any = getattr(library, symbol)
                function.restype = ctypes.c_char_p
                return str(function().decode())
    return None


def describe_torch_blas() -> str:
    """PyTorch's version, BLAS and instruction set, as it reports them."""
    import torch

    lines = [line.strip(" -") for line in torch.__config__.show().splitlines()]
    named = [line for line in lines if line.startswith(("Intel(R) oneAPI Math", "Intel(R) MKL-DNN", "OpenBLAS"))]
    capability = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, {'; '.join(named) or 'BLAS not named'}, {capability}"


def main() -> None:
    """One repetition."""
    parser = argparse.ArgumentParser()
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--library", choices=("numpy", "torch"), required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--warmup", type=float, default=1.0)
    parser.add_argument("--seconds", type=float, default=3.0)
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    if options.library == "numpy":
        step, blas = numpy_products(shape), describe_numpy_blas()
    else:
        step, blas = torch_products(shape, options.threads), describe_torch_blas()
    result = repeat(step, warmup_s=options.warmup, measure_s=options.seconds)
    report(**result, version=blas, flops_per_step=shape.flops())


if __name__ == "__main__":
    main()
