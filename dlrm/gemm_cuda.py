"""The operations of ``gemm.py`` on a GPU: products by cublasLt with fused epilogues, small passes by own kernels.

Of a layer's backward pass several forms are timed at its first two uses, and the fastest pair stays:

- data: the product with the mask in its epilogue (``DRELU``), with mask and bias sum (``DRELU_BGRAD``), or plain
  with a pass of ``relu_cuda`` behind it (the mask alone, or mask and bias sum); on Hopper also both by a kernel of
  ``fused_products_cuda`` (``own``, ``own_and_sum``);
- weights: the plain product, or where the data product left the bias sum out with it in the epilogue (``BGRADB``), or
  the plain one and the sum apart.

The forward product is cublasLt's or, on Hopper, that of ``fused_products_cuda``, whichever is faster at its first use.

Shapes as in ``gemm.py``; bias gradients are float32 beside half-precision activations.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path

import cupy
import numpy as np

from dlrm.cublaslt import Plan, Product, kept_milliseconds, plan
from dlrm.device import Array
from dlrm.errors import DeviceError
from dlrm.fused_products_cuda import SOURCE as FUSED_SOURCE
from dlrm.fused_products_cuda import data_product, relu_product, supports
from dlrm.nvrtc import HEADER, c_type, load
from dlrm.relu_cuda import BLOCKS, relu_and_sum
from dlrm.relu_cuda import SOURCE as RELU_SOURCE

_SOURCE = Path(__file__).with_name("gemm.cu")
_THREADS = 256
_BITS_OF_A_BYTE = 8


@dataclass(slots=True)
class _Choice:
    """How one layer's backward pass goes; keyed by its bias gradient.

    Attributes:
        data_ms: time of each form of the data product, by its name.
        data: the form in use.
        bias_done: whether the data product also sums the bias gradient.
        apart: whether the sum is a pass of its own where the weight product could take it.
        settled: whether the weight product has been timed too.
    """

    data_ms: dict[str, float] = field(default_factory=dict)
    data: str = "DRELU"
    bias_done: bool = False
    apart: bool = False
    settled: bool = False


_choices: dict[int, _Choice] = {}
_masked: set[int] = set()
"""Masks that ``linear_relu_forward`` writes, by address; others have to be made from the activation."""


def linear_relu_forward(x: Array, weight: Array, bias: Array, out: Array, mask: Array | None) -> None:
    """See ``gemm.linear_relu_forward``."""
    if not len(x):
        return
    if mask is not None:
        _masked.discard(mask.data.ptr)  # until it is written: addresses come again, and so do batches of other sizes
    if len(weight) % _BITS_OF_A_BYTE:  # some byte of the mask would be written in part
        mask = None
    forms = forward_forms(x, weight, bias, out, mask)
    if forms:
        _fastest(_forward(x, weight, out, "RELU_BIAS" if mask is None else "RELU_AUX_BIAS", 0), forms)()
        if mask is not None:
            _masked.add(mask.data.ptr)
        return
    linear_forward(x, weight, out)
    bias_relu(out, bias)


def linear_forward(x: Array, weight: Array, out: Array) -> None:
    """``out[:, :O] = x W^T``."""
    plain = _required(_forward(x, weight, out, "DEFAULT", 0), lambda chosen: chosen.run(weight, x, out))
    plain.run(weight, x, out)


def forward_forms(
    x: Array, weight: Array, bias: Array, out: Array, mask: Array | None
) -> dict[str, Callable[[], None]]:
    """What does the product, the bias and the ReLU of ``linear_relu_forward`` at once, by name."""
    forms: dict[str, Callable[[], None]] = {}
    epilogue, aux_ld = ("RELU_AUX_BIAS", mask.shape[1] * 8) if mask is not None else ("RELU_BIAS", 0)

    def run(chosen: Plan) -> None:
        chosen.run(weight, x, out, bias=bias, mask=mask)

    fused = plan(_forward(x, weight, out, epilogue, aux_ld), _timer(run))
    if fused is not None:
        forms["cublasLt"] = partial(run, fused)
    if supports(x, weight, out, len(weight)):
        forms["own"] = partial(relu_product, x, weight, bias, out, mask)
    return forms


_fastest_forms: dict[Product, str] = {}


def _fastest(product: Product, forms: dict[str, Callable[[], None]]) -> Callable[[], None]:
    """The fastest of the forms of a product, timed at its first use."""
    if product not in _fastest_forms and len(forms) > 1 and not _capturing():
        taken = _taken(product, forms)
        _fastest_forms[product] = min(taken, key=taken.__getitem__)
    return forms.get(_fastest_forms.get(product, ""), next(iter(forms.values())))


def _taken(product: Product, forms: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Milliseconds of every form of a product, as an earlier process found them or measured now."""
    return {name: kept_milliseconds(_forms_subject(), name, product, form) for name, form in forms.items()}


@cache
def _forms_subject() -> str:
    """Other kernels are measured anew."""
    sources = b"".join(path.read_bytes() for path in (_SOURCE, RELU_SOURCE, FUSED_SOURCE, HEADER))
    return f"forms-{hashlib.sha256(sources).hexdigest()[:16]}"


def linear_data_backward(
    grad: Array,
    weight: Array,
    below: Array,
    mask: Array | None,
    grad_below: Array,
    grad_bias: Array,
    partials: Array | None,  # noqa: ARG001  this module has its own
) -> None:
    """See ``gemm.linear_data_backward``."""
    if not len(grad):
        grad_bias.fill(0)
        return
    forms = data_forms(grad, weight, below, mask, grad_below, grad_bias)
    choice = _choices.get(grad_bias.data.ptr)
    if choice is None:
        choice = _Choice()
        if not _capturing():
            product = _data(grad, weight, grad_below, "DRELU", 0 if mask is None else mask.shape[1] * 8)
            choice.data_ms = _taken(product, forms)
            choice.data = min(WITHOUT_BIAS & set(forms), key=choice.data_ms.__getitem__)
            _choices[grad_bias.data.ptr] = choice
    form = choice.data
    if form not in forms:  # a batch of another size, for which cublasLt has no such epilogue
        form = "mask_and_sum" if choice.bias_done else "mask"
    forms[form]()


def relu_input_backward(grad: Array, weight: Array, grad_x: Array) -> None:
    """``grad_x = grad W``."""
    product = _data(grad, weight, grad_x, "DEFAULT", 0)
    _required(product, lambda chosen: chosen.run(weight, grad, grad_x)).run(weight, grad, grad_x)


def linear_input_backward(grad: Array, weight: Array, grad_x: Array) -> None:
    """See ``gemm.linear_input_backward``."""
    if len(grad):
        relu_input_backward(grad, weight, grad_x)


def linear_weight_backward(grad: Array, x: Array, grad_weight: Array, grad_bias: Array) -> None:
    """See ``gemm.linear_weight_backward``."""
    if not len(grad):
        grad_weight.fill(0)
        grad_bias.fill(0)
        return
    choice = _choices.setdefault(grad_bias.data.ptr, _Choice())
    forms = _weight_forms(grad, x, grad_weight, grad_bias)
    if not choice.settled and not _capturing():
        weight_ms = _taken(_weight(grad, x, grad_weight), forms)
        with_bias = min(forms.keys() - {"plain"}, key=weight_ms.__getitem__)
        choice.apart, choice.settled = with_bias == "apart", True
        extra = weight_ms[with_bias] - weight_ms["plain"]
        times = {name: ms + (0 if name in WITH_BIAS else extra) for name, ms in choice.data_ms.items()}
        forms[with_bias]()  # this step's data product left the sum out
        if times:
            choice.data = min(times, key=times.__getitem__)
            choice.bias_done = choice.data in WITH_BIAS
        return
    fused = "BGRADB" in forms and not choice.apart
    forms["plain" if choice.bias_done else "BGRADB" if fused else "apart"]()


WITHOUT_BIAS = {"DRELU", "mask", "own"}
WITH_BIAS = {"DRELU_BGRAD", "mask_and_sum", "own_and_sum"}


def data_forms(
    grad: Array,
    weight: Array,
    below: Array,
    mask: Array | None,
    grad_below: Array,
    grad_bias: Array,
) -> dict[str, Callable[[], None]]:
    """What can do the data product of ``linear_data_backward`` here, by name."""
    forms: dict[str, Callable[[], None]] = {}
    activation, bits = below, None
    if mask is not None and mask.data.ptr in _masked:
        if _are_bits(mask, below, len(grad_bias)):
            activation, bits = None, mask
        forms = _library_data_forms(grad, weight, mask, grad_below, grad_bias)
    columns = weight.shape[1]
    if bits is not None and len(grad_bias) == columns and supports(grad, weight, grad_below, columns):
        forms["own"] = partial(data_product, grad, weight, bits, grad_below, None)
        forms["own_and_sum"] = partial(data_product, grad, weight, bits, grad_below, grad_bias)

    def masked() -> None:
        relu_input_backward(grad, weight, grad_below)
        relu_and_sum(grad_below, activation, bits, None, None, len(grad_bias))

    def masked_and_summed() -> None:
        relu_input_backward(grad, weight, grad_below)
        relu_and_sum(grad_below, activation, bits, grad_bias, _partials(len(grad_bias)), len(grad_bias))

    forms["mask"], forms["mask_and_sum"] = masked, masked_and_summed
    return forms


def _library_data_forms(
    grad: Array, weight: Array, mask: Array, grad_below: Array, grad_bias: Array
) -> dict[str, Callable[[], None]]:
    """What cublasLt can do in one go, by name."""
    forms: dict[str, Callable[[], None]] = {}
    # Sums of bfloat16 (uint16) would have its 8 bits.
    for epilogue in ("DRELU",) if grad_below.dtype == np.uint16 else ("DRELU", "DRELU_BGRAD"):
        product = _data(grad, weight, grad_below, epilogue, mask.shape[1] * 8)
        bias = _bias_like(grad_bias, grad_below) if epilogue == "DRELU_BGRAD" else None

        def fused(chosen: Plan, bias: Array | None = bias) -> None:
            chosen.run(weight, grad, grad_below, bias=bias, mask=mask)

        found = plan(product, _timer(fused))
        if found is not None:

            def run(found: Plan = found, bias: Array | None = bias) -> None:
                found.run(weight, grad, grad_below, bias=bias, mask=mask)
                if bias is not None and bias is not grad_bias:
                    grad_bias[...] = bias

            forms[epilogue] = run
    return forms


_bits_seen: bool | None = None


def _are_bits(mask: Array, activation: Array, columns: int) -> bool:
    """Whether cublasLt's masks are what ``relu_and_sum`` takes for bits; looked at once, they are alike everywhere."""
    global _bits_seen
    if _bits_seen is None and not _capturing():
        rows, column = slice(0, 64), cupy.arange(columns)
        found = mask[rows, column // 8] >> (column % 8).astype(np.uint8) & 1
        numbers = activation[rows, :columns]
        _bits_seen = bool((found.astype(np.bool_) == (numbers > 0)).all())
    return bool(_bits_seen)


def _weight_forms(grad: Array, x: Array, grad_weight: Array, grad_bias: Array) -> dict[str, Callable[[], None]]:
    """What can be done here, by name: without the bias sum, with it inside the product, with it behind the product."""
    outputs, product = len(grad_weight), _weight(grad, x, grad_weight)

    def issue(chosen: Plan, bias: Array | None = None) -> None:
        chosen.run(x, grad, grad_weight, bias=bias)

    plain = _required(product, issue)

    def apart() -> None:
        issue(plain)
        relu_and_sum(grad, None, None, grad_bias, _partials(outputs), outputs)

    forms: dict[str, Callable[[], None]] = {"plain": partial(issue, plain), "apart": apart}
    fused = plan(replace(product, epilogue="BGRADB"), _timer(lambda chosen: issue(chosen, grad_bias)))
    if fused is not None:
        forms["BGRADB"] = partial(issue, fused, grad_bias)
    return forms


def _partials(columns: int) -> Array:
    """Room for the sums of ``relu_and_sum`` on the current stream."""
    return _partials_of(cupy.cuda.get_current_stream().ptr, -(-columns // 128) * 128)


@cache
def _partials_of(stream: int, columns: int) -> Array:  # noqa: ARG001  streams run beside each other
    device = cupy.cuda.Device()
    return cupy.empty(device.attributes["MultiProcessorCount"] * BLOCKS * columns, np.float32)


def bias_relu(wide: Array, bias: Array) -> None:
    """See ``gemm.bias_relu``."""
    kernel = load(_SOURCE, "bias_relu", (("NUMBER", c_type(wide)),))
    total = len(wide) * len(bias)
    shape = (np.int64(len(wide)), np.int32(len(bias)))
    kernel(_blocks(total, _THREADS), _THREADS, wide, np.int64(_ld(wide)), bias, *shape)


def _forward(x: Array, weight: Array, out: Array, epilogue: str, aux_ld: int) -> Product:
    outputs, inputs = weight.shape
    return Product(
        m=outputs, n=len(x), k=inputs, transposed_a=True, transposed_b=False, lda=_ld(weight), ldb=_ld(x),
        ldd=_ld(out), dtype=x.dtype.name, out_dtype=out.dtype.name, epilogue=epilogue, aux_ld=aux_ld,
    )  # fmt: skip


def _data(grad: Array, weight: Array, grad_below: Array, epilogue: str, aux_ld: int) -> Product:
    outputs, inputs = weight.shape
    return Product(
        m=inputs, n=len(grad), k=outputs, transposed_a=False, transposed_b=False, lda=_ld(weight), ldb=_ld(grad),
        ldd=_ld(grad_below), dtype=grad.dtype.name, out_dtype=grad_below.dtype.name, epilogue=epilogue, aux_ld=aux_ld,
    )  # fmt: skip


def _weight(grad: Array, x: Array, grad_weight: Array) -> Product:
    outputs, inputs = grad_weight.shape
    return Product(
        m=inputs, n=outputs, k=len(grad), transposed_a=False, transposed_b=True, lda=_ld(x), ldb=_ld(grad),
        ldd=_ld(grad_weight), dtype=x.dtype.name, out_dtype=grad_weight.dtype.name,
    )  # fmt: skip


_biases: dict[tuple[int, str], Array] = {}


def _bias_like(grad_bias: Array, grad_below: Array) -> Array:
    """Where ``DRELU_BGRAD`` writes: its sums have the dtype of its output."""
    if grad_bias.dtype == grad_below.dtype:
        return grad_bias
    key = (grad_bias.data.ptr, grad_below.dtype.name)
    if key not in _biases:
        _biases[key] = cupy.empty(grad_below.shape[1], grad_below.dtype)
    return _biases[key][: len(grad_bias)]


def _required(product: Product, measure: Callable[[Plan], None]) -> Plan:
    found = plan(product, _timer(measure))
    if found is None:
        raise _impossible(product)
    return found


def _impossible(product: Product) -> Exception:
    return DeviceError(
        f"cublasLt: there is no algorithm for {product}; install a newer nvidia-cublas or set device: cpu"
    )


def _timer(measure: Callable[[Plan], None]) -> Callable[[Plan], None] | None:
    """What may be timed now: nothing inside a capture."""
    return None if _capturing() else measure


def _capturing() -> bool:
    return bool(cupy.cuda.get_current_stream().is_capturing())


def _ld(array: Array) -> int:
    """Elements from one row to the next."""
    return int(array.strides[0] // array.itemsize)


def _blocks(work: int, each: int) -> int:
    return -(-work // each)
