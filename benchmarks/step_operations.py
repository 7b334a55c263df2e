"""Every operation of one training step on a GPU, one by one: what gpu_kernels.py times for its table of the whole step.

The dense model runs on a device that writes down which kernels it hands out and with what; each is then a case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cupy
import numpy as np

from dlrm import loss_cuda, optim_cuda
from dlrm.config import ModelConfig
from dlrm.cuda import CudaDevice
from dlrm.model import DenseModel


@dataclass(frozen=True, slots=True)
class Operation:
    """One call of a kernel's launch.

    Attributes:
        name: what it does, and the shapes it does it with.
        run: issues it again.
        bytes: of all its arrays, each once.
        flop: of its product.
    """

    name: str
    run: Callable[[], Any]
    bytes: float
    flop: float = 0.0


class Recorder(CudaDevice):
    """A GPU that notes which operations were asked of it, while ``operations`` is a list."""

    operations: list[Operation] | None = None
    part = ""

    def kernel(self, module: str, name: str) -> Callable[..., Any] | None:
        """See ``CudaDevice.kernel``."""
        found = super().kernel(module, name)
        if found is None:
            return None

        def noted(*arguments: Any) -> Any:
            if self.operations is not None:
                self.operations.append(_operation(self.part, name, found, arguments))
            return found(*arguments)

        return noted


def _operation(part: str, name: str, run: Callable[..., Any], arguments: tuple[Any, ...]) -> Operation:
    arrays = {item.data.ptr: item for item in arguments if isinstance(item, cupy.ndarray)}
    size = float(sum(item.size * item.dtype.itemsize for item in arrays.values()))
    flop, shapes = 0.0, ""
    first, second, third = arguments[:3]
    rows, width = len(first), first.dtype.itemsize
    # Activations may be the first columns of wider arrays.
    if name.startswith("linear_"):
        weight = third if name == "linear_weight_backward" else second
        flop, shapes = 2.0 * rows * weight.size, f" {weight.shape[1]} x {weight.shape[0]}"
        masks = sum(item.nbytes for item in arrays.values() if item.dtype == np.uint8)
        size = rows * sum(weight.shape) * width + weight.size * weight.dtype.itemsize + masks
    elif name.startswith("interaction_"):
        flop = 2.0 * first.size * first.shape[1] * (2 if "backward" in name else 1)
    return Operation(f"{part}: {name}{shapes}", lambda: run(*arguments), size, flop)


class DenseStep:
    """The dense part of one training step at MLPerf's shape, half precision, SGD.

    Args:
        batch: B.
        num_tables: T.
        model: layers and embedding dim.
        num_dense: dense columns.
        scalars: the host's block for one step.
        guard: the device's block.
    """

    def __init__(
        self, batch: int, num_tables: int, model: ModelConfig, num_dense: int, scalars: Any, guard: Any
    ) -> None:
        self.device = Recorder(0)
        self.batch, self._scalars, self._guard = batch, scalars, guard
        self._model = DenseModel(
            model=model, num_dense=num_dense, num_tables=num_tables, dtype=np.float16, device=self.device, seed=1
        )
        self.work = self._model.workspace(batch)
        self.work.vectors.fill(0.01)
        self._dense = cupy.zeros((batch, self._model.dense_columns), np.float16)
        self._labels, self._loss = cupy.zeros(batch, np.float32), cupy.zeros(1)
        self._partials = cupy.empty(loss_cuda.partials_of(batch))

    def forward(self) -> None:
        """Both MLPs and the interaction."""
        self.device.part = "bottom"
        self._model.bottom_forward(self._dense, self.work)
        self.device.part = "top"
        self._model.top_forward(self.work, self.batch)

    def loss(self) -> None:
        """Loss and its gradient."""
        work = self.work
        loss_cuda.loss_and_gradient(
            work.logits, self._labels, work.grad_logits, self._loss, self._scalars, self._guard, self._partials
        )

    def backward(self) -> None:
        """All gradients."""
        self.device.part = "top"
        self._model.top_data_backward(self.work, self.batch)
        self._model.top_weight_backward(self.work, self.batch)
        self.device.part = "bottom"
        self._model.bottom_backward(self._dense, self.work, self.batch)

    def check(self) -> None:
        """Whether the gradients are finite."""
        optim_cuda.check_finite(self._model.flat_gradients, self._guard)

    def update(self) -> None:
        """SGD of the dense part."""
        model = self._model
        optim_cuda.sgd(model.flat_parameters, model.flat_gradients, model.flat_weights, self._scalars, self._guard)

    def operations(self, look_up: Sequence[Operation], update: Sequence[Operation]) -> Iterator[Operation]:
        """Everything a step does, in order, then the whole step.

        Args:
            look_up: of the embeddings; ``work.vectors`` is where they go.
            update: of the embeddings; ``work.grad_vectors`` is where their gradients are.
        """
        work, model = self.work, self._model
        for _ in range(3):  # forms of the backward products are chosen at their first uses
            self.forward()
            self.loss()
            self.backward()
        noted: list[Operation] = []
        self.device.operations = noted
        self.forward()
        yield from (*look_up, *noted)
        yield Operation("loss", self.loss, float(work.logits.nbytes + self._labels.nbytes + work.grad_logits.nbytes))
        noted.clear()
        self.backward()
        self.device.operations = None
        yield from noted
        gradients = float(model.flat_gradients.nbytes)
        yield Operation("gradients finite?", self.check, gradients)
        yield Operation(
            "dense sgd", self.update, gradients + 2.0 * model.flat_parameters.nbytes + model.flat_weights.nbytes
        )
        yield from update

        def whole() -> None:
            for item in look_up:
                item.run()
            for part in (self.forward, self.loss, self.backward, self.check, self.update):
                part()
            for item in update:
                item.run()

        yield Operation("the whole step, one after the other", whole, 0.0)
