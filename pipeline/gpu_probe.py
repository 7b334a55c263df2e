"""What this interpreter's GPU packages say, as JSON: ``python -m pipeline.gpu_probe``, run by ``crosslane doctor``.

A process of its own: a broken driver or library may end it, and the doctor goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable


def _cupy() -> str:
    import cupy

    count = cupy.cuda.runtime.getDeviceCount()
    return f"{cupy.__version__}, sees {count} GPUs, CUDA runtime {cupy.cuda.runtime.runtimeGetVersion()}"


def _nvrtc() -> str:
    from cuda.bindings import nvrtc

    from dlrm.nvrtc import compile_cubin
    from pipeline.generator_cuda import SOURCE, constants

    _, major, minor = nvrtc.nvrtcVersion()
    return f"{major}.{minor}, compiles {SOURCE.name} for sm_80: {len(compile_cubin(SOURCE, '80', constants())):,} bytes"


def _cublaslt() -> str:
    from nvmath.bindings import cublasLt

    return str(cublasLt.get_version())


def _nccl() -> str:
    from embedding.comm_nccl import library_version

    return str(library_version())


PROBES: dict[str, Callable[[], str]] = {"cupy": _cupy, "nvrtc": _nvrtc, "cublaslt": _cublaslt, "nccl": _nccl}


def probe() -> dict[str, dict[str, str]]:
    """Each package's ``found``, or its ``error`` in one line."""
    results: dict[str, dict[str, str]] = {}
    for name, look in PROBES.items():
        try:
            results[name] = {"found": look()}
        except Exception as error:  # noqa: BLE001  whatever is wrong with it is the answer
            lines = str(error).strip().splitlines()
            results[name] = {"error": f"{type(error).__name__}: {lines[0] if lines else 'no message'}"}
    return results


if __name__ == "__main__":
    print(json.dumps(probe()))
