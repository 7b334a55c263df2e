"""Matrix products through cublasLt: one descriptor a shape, the fastest of its algorithms, kept on disk.

cublasLt stores by columns; a row-major array [M, N] is its column-major [N, M], and that is how ``Product`` counts:
``D[m, n] = op(A)[m, k] op(B)[k, n]``, all by columns.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import cupy
import numpy as np
from nvmath.bindings import cublasLt as lt  # noqa: N813  a module

from dlrm.device import Array
from dlrm.nvrtc import cache_folder

WORKSPACE_BYTES = 64 * 1024 * 1024
_CANDIDATES = 32
_TIMED, _ROUNDS = 8, 2
_ALGORITHMS = "graphs"
"""Subject of a file on disk: algorithms, timed inside graphs."""

_CUDA_TYPES = {"float16": 2, "uint16": 14, "float32": 0, "float64": 1}  # uint16: the bits of bfloat16
_COMPUTE_32F, _COMPUTE_64F = 68, 70


@dataclass(frozen=True, slots=True)
class Product:
    """Shape, layout and epilogue of a product; equal ones share their descriptor and algorithm.

    Attributes:
        m: rows of D.
        n: columns of D.
        k: summed over.
        transposed_a: A is stored [k, m].
        transposed_b: B is stored [n, k].
        lda: elements from one column of A to the next, as of the others.
        ldb: of B.
        ldd: of D.
        dtype: of A and B.
        out_dtype: of D.
        epilogue: name in ``cublasLt.Epilogue``.
        aux_ld: bits from one column of a ReLU mask to the next; 0: none.
    """

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


class Plan:
    """A product that is ready to run."""

    def __init__(self, product: Product) -> None:
        """Make the descriptors; ``find`` has to come before ``run``."""
        self.product = product
        double = product.dtype == "float64"
        scale = _CUDA_TYPES["float64" if double else "float32"]
        self._alpha, self._beta = (np.array([x], np.float64 if double else np.float32) for x in (1, 0))
        self._description = lt.matmul_desc_create(_COMPUTE_64F if double else _COMPUTE_32F, scale)
        kind = _CUDA_TYPES[product.dtype]
        shape_a = (product.k, product.m) if product.transposed_a else (product.m, product.k)
        shape_b = (product.n, product.k) if product.transposed_b else (product.k, product.n)
        self._a = lt.matrix_layout_create(kind, *shape_a, product.lda)
        self._b = lt.matrix_layout_create(kind, *shape_b, product.ldb)
        self._d = lt.matrix_layout_create(_CUDA_TYPES[product.out_dtype], product.m, product.n, product.ldd)
        self._set("TRANSA", int(product.transposed_a))
        self._set("TRANSB", int(product.transposed_b))
        self._set("EPILOGUE", int(lt.Epilogue[product.epilogue]))
        if product.aux_ld:
            self._set("EPILOGUE_AUX_LD", product.aux_ld)
        if "BIAS" in product.epilogue or "BGRAD" in product.epilogue:
            self._set("BIAS_DATA_TYPE", _CUDA_TYPES[product.out_dtype])
        self._algorithm: Any = None
        self.milliseconds: float | None = None

    def _set(self, attribute: str, value: int) -> None:
        number = lt.MatmulDescAttribute[attribute]
        word = np.array([value], lt.get_matmul_desc_attribute_dtype(int(number)))
        lt.matmul_desc_set_attribute(self._description, int(number), word.ctypes.data, word.nbytes)

    def run(self, a: Array, b: Array, d: Array, *, bias: Array | None = None, mask: Array | None = None) -> None:
        """Issue the product on the current stream.

        Args:
            a: A.
            b: B.
            d: D, overwritten.
            bias: [m] to add, or gradient of a bias to write; as the epilogue says.
            mask: bits of a ReLU to write or to read; as the epilogue says.
        """
        if bias is not None:
            self._set("BIAS_POINTER", bias.data.ptr)
        if mask is not None:
            self._set("EPILOGUE_AUX_POINTER", mask.data.ptr)
        stream = cupy.cuda.get_current_stream().ptr
        workspace = _workspace(stream)
        lt.matmul(
            _handle(), self._description, self._alpha.ctypes.data, a.data.ptr, self._a, b.data.ptr, self._b,
            self._beta.ctypes.data, d.data.ptr, self._d, d.data.ptr, self._d, self._algorithm.ctypes.data,
            workspace.data.ptr, WORKSPACE_BYTES, stream,
        )  # fmt: skip

    def find(self, measure: Callable[[], None] | None) -> bool:
        """Choose the algorithm: the one kept on disk, else the fastest by ``measure``, else cublasLt's first.

        Args:
            measure: issues the product once with real arrays; ``None``: do not time (inside a capture, say).

        Returns:
            Whether cublasLt has any.
        """
        kept = _kept(_ALGORITHMS).get(_key(self.product))
        if kept is not None:
            algorithm = np.frombuffer(bytes.fromhex(kept["algorithm"]), lt.matmul_algo_dtype).copy()
            self._algorithm, self.milliseconds = algorithm, kept["ms"]
            return True
        candidates = self._candidates()
        if not len(candidates):
            return False
        self._algorithm = candidates[:1].copy()
        if measure is None:
            return True
        best = None
        for place in range(len(candidates)):
            self._algorithm = candidates[place : place + 1].copy()
            try:
                taken = milliseconds(measure)
            except lt.cuBLASLtError:
                continue
            if best is None or taken < best[1]:
                best = self._algorithm, taken
        if best is None:
            return False
        self._algorithm, self.milliseconds = best
        _kept(_ALGORITHMS).put(_key(self.product), {"algorithm": best[0].tobytes().hex(), "ms": round(best[1], 5)})
        return True

    def _candidates(self) -> Any:
        """What cublasLt proposes: a structured array of algorithms, best guess first."""
        preference = lt.matmul_preference_create()
        size = np.array([WORKSPACE_BYTES], np.uint64)
        attribute = int(lt.MatmulPreferenceAttribute.MAX_WORKSPACE_BYTES)
        lt.matmul_preference_set_attribute(preference, attribute, size.ctypes.data, size.nbytes)
        results, count = np.zeros(_CANDIDATES, lt.matmul_heuristic_result_dtype), np.zeros(1, np.int32)
        if "AUX" in self.product.epilogue or "DRELU" in self.product.epilogue:
            self._set("EPILOGUE_AUX_POINTER", 1 << 20)  # some pointer has to be there for the question to be valid
        if "BIAS" in self.product.epilogue or "BGRAD" in self.product.epilogue:
            self._set("BIAS_POINTER", 1 << 20)
        try:
            lt.matmul_algo_get_heuristic(
                _handle(), self._description, self._a, self._b, self._d, self._d, preference, _CANDIDATES,
                results.ctypes.data, count.ctypes.data,
            )  # fmt: skip
        except lt.cuBLASLtError:
            count[0] = 0
        finally:
            lt.matmul_preference_destroy(preference)
        found = results[: int(count[0])]
        return found[found["state"] == 0]["algo"]


def milliseconds(issue: Callable[[], None]) -> float:
    """Time of work on the current stream with the GPU to itself: the better mean of two rounds; waits for it.

    A round is a CUDA graph, as in a captured step: the host needs longer to issue a small product than the GPU to do
    it.
    """
    stream = cupy.cuda.get_current_stream()
    issue()
    cupy.cuda.Device().synchronize()
    launch = _repeated(issue, stream)
    begin, end = cupy.cuda.Event(), cupy.cuda.Event()
    taken = []
    for _ in range(_ROUNDS):
        begin.record(stream)
        launch()
        end.record(stream)
        end.synchronize()
        taken.append(float(cupy.cuda.get_elapsed_time(begin, end)) / _TIMED)
    return min(taken)


def _repeated(issue: Callable[[], None], stream: Any) -> Callable[[], None]:
    """``_TIMED`` times the work, as one graph where the stream can be captured."""

    def repeat() -> None:
        for _ in range(_TIMED):
            issue()

    if not stream.ptr:
        return repeat
    stream.begin_capture()
    try:
        repeat()
    except BaseException:
        # A broken capture has to be ended before the stream can be used again.
        with suppress(cupy.cuda.runtime.CUDARuntimeError):
            stream.end_capture()
        raise
    graph = stream.end_capture()
    return lambda: graph.launch(stream)


@cache
def _handle() -> int:
    return int(lt.create())


@cache
def _workspace(stream: int) -> Array:  # noqa: ARG001  one for each stream: two that share one hang
    return cupy.empty(WORKSPACE_BYTES, np.uint8)


class _Kept:
    """What was measured, by key, in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._entries: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._entries = {}

    def get(self, key: str) -> Any | None:
        return self._entries.get(key)

    def put(self, key: str, entry: Any) -> None:
        self._entries[key] = entry
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._path.parent, delete=False) as temporary:
                json.dump(self._entries, temporary)
            Path(temporary.name).replace(self._path)
        except OSError:
            return  # without the file the next process measures again


def _kept(subject: str) -> _Kept:
    """What is kept about a subject on this GPU, with this version of cublasLt."""
    return _kept_for(subject, int(cupy.cuda.runtime.getDevice()))


@cache
def _kept_for(subject: str, device: int) -> _Kept:
    name = cupy.cuda.runtime.getDeviceProperties(device)["name"].decode().replace(" ", "-")
    return _Kept(cache_folder() / f"cublaslt-{subject}-{lt.get_version()}-{name}.json")


def kept_milliseconds(subject: str, form: str, product: Product, issue: Callable[[], None]) -> float:
    """``milliseconds`` of a form of a product; the file of a subject knows those that were measured before."""
    kept, key = _kept(subject), f"{form} {_key(product)}"
    taken: float | None = kept.get(key)
    if taken is None:
        taken = milliseconds(issue)
        kept.put(key, round(taken, 5))
    return taken


def _key(product: Product) -> str:
    return json.dumps(asdict(product), sort_keys=True)


_plans: dict[Product, Plan | None] = {}


def plan(product: Product, measure: Callable[[Plan], None] | None) -> Plan | None:
    """The plan of a product; made, and its algorithm timed, at the first call.

    Args:
        product: what to do.
        measure: issues the given plan once with real arrays; ``None``: take cublasLt's first algorithm.

    Returns:
        ``None`` where cublasLt cannot do it.
    """
    if product not in _plans:
        made = Plan(product)
        found = made.find(None if measure is None else lambda: measure(made))
        _plans[product] = made if found else None
    return _plans[product]


def without_epilogue(product: Product) -> Product:
    """The plain product."""
    return replace(product, epilogue="DEFAULT", aux_ld=0)
