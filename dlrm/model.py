"""The dense part of DLRM: bottom MLP, dot interaction, top MLP.

Shapes: B rows, N dense columns, T tables, D embedding dim, F = first + T vectors a row, P = F (F - 1) / 2 pairs.

Source: Naumov et al., "Deep Learning Recommendation Model for Personalization and Recommendation Systems" (2019).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from dlrm.config import ModelConfig
from dlrm.device import Array, Device
from dlrm.errors import ConfigError
from dlrm.gemm import logit_backward, logit_forward
from dlrm.initial import initialize_linear
from dlrm.interaction import interaction_backward, interaction_forward, interaction_width
from dlrm.mlp import Linear, Scratch, mlp_backward, mlp_forward


@dataclass(slots=True)
class DenseWorkspace:
    """The activations and gradients of one batch, allocated once; smaller batches use their first rows.

    Attributes:
        capacity: rows it can hold.
        vectors: [capacity, F, D], place 0 the bottom output (if there is one), then the tables' pooled vectors.
        logits: [capacity].
        bottom: hidden activations of the bottom MLP, without its output.
        interaction: [capacity, first * D + P].
        top: hidden activations of the top MLP.
        grad_vectors: [capacity, F, D]; ``None`` without training, like all below.
        grad_logits: [capacity].
        scratch: gradients of hidden activations.
    """

    capacity: int
    vectors: Array
    logits: Array
    bottom: tuple[Array, ...]
    interaction: Array
    top: tuple[Array, ...]
    grad_vectors: Array | None = None
    grad_logits: Array | None = None
    scratch: Scratch | None = None


class DenseModel:
    """Weights, gradients and passes of the dense part.

    Args:
        model: layers and embedding dim.
        num_dense: N; 0: no bottom MLP, the top MLP gets the dots alone.
        num_tables: T.
        dtype: float32 or float64, throughout.
        device: holds the arrays, runs the passes.
        seed: of the initial weights.

    Attributes:
        first: 1 with dense columns, else 0.
        flat_parameters: all weights in one array.
        flat_gradients: all gradients in one array of the same order, so that one all-reduce sums them.
        parameters: views by name, such as ``bottom.0.weight`` [out, in].
        gradients: the same views of the gradients.

    Raises:
        ConfigError: the top MLP would get no input.
    """

    def __init__(
        self, *, model: ModelConfig, num_dense: int, num_tables: int, dtype: Any, device: Device, seed: int
    ) -> None:
        self.config = model
        self.device = device
        self.dtype = dtype
        self.num_dense = num_dense
        self.num_tables = num_tables
        self.first = 1 if num_dense else 0
        self.num_vectors = self.first + num_tables
        self.interaction_width = interaction_width(self.num_vectors, model.embedding_dim, self.first)
        if not self.interaction_width:
            raise ConfigError(
                f"data: {num_tables} tables and no dense columns leave the top MLP without input; "
                "give it two tables or a dense column"
            )
        bottom = _layer_shapes("bottom", num_dense, model.bottom_mlp if num_dense else ())
        top = _layer_shapes("top", self.interaction_width, model.top_mlp)
        shapes = bottom | top
        size = sum(math.prod(shape) for shape in shapes.values())
        self.flat_parameters: Array = device.zeros(size, dtype)
        self.flat_gradients: Array = device.zeros(size, dtype)
        self.parameters: dict[str, Array] = _views(self.flat_parameters, shapes)
        self.gradients: dict[str, Array] = _views(self.flat_gradients, shapes)
        self._bottom = self._layers("bottom", len(bottom) // 2, seed)
        *hidden, self._logit = self._layers("top", len(top) // 2, seed)
        self._top = tuple(hidden)

    def _layers(self, part: str, count: int, seed: int) -> tuple[Linear, ...]:
        layers = []
        for i in range(count):
            names = (f"{part}.{i}.weight", f"{part}.{i}.bias")
            weight, bias = (self.parameters[name] for name in names)
            initialize_linear(seed, f"{part}.{i}", weight, bias, self.device)
            layers.append(Linear(weight, bias, *(self.gradients[name] for name in names)))
        return tuple(layers)

    def workspace(self, capacity: int, *, training: bool = True) -> DenseWorkspace:
        """Arrays for batches of up to ``capacity`` rows; with ``training``, for the backward pass too."""
        device, dtype = self.device, self.dtype

        def empty(*shape: int) -> Array:
            return device.empty((capacity, *shape), dtype)

        vectors_shape = (self.num_vectors, self.config.embedding_dim)
        workspace = DenseWorkspace(
            capacity=capacity,
            vectors=empty(*vectors_shape),
            logits=empty(),
            bottom=tuple(empty(len(layer.bias)) for layer in self._bottom[:-1]),
            interaction=empty(self.interaction_width),
            top=tuple(empty(len(layer.bias)) for layer in self._top),
        )
        if training:
            widest = max(max(layer.weight.shape) for layer in (*self._bottom, *self._top, self._logit))
            workspace.grad_vectors = empty(*vectors_shape)
            workspace.grad_logits = empty()
            workspace.scratch = Scratch.allocate(capacity, widest, dtype, device)
        return workspace

    def bottom_forward(self, dense: Array, workspace: DenseWorkspace) -> None:
        """Write the bottom output into place 0 of ``workspace.vectors``.

        Args:
            dense: [B, N]; B may be 0.
            workspace: of at least B rows.
        """
        if self._bottom:
            mlp_forward(dense, self._bottom, self._bottom_activations(workspace, len(dense)), self.device)

    def top_forward(self, workspace: DenseWorkspace, rows: int) -> Array:
        """Interaction and top MLP.

        Args:
            workspace: its ``vectors[:rows]`` are read.
            rows: B; may be 0.

        Returns:
            ``workspace.logits[:rows]``.
        """
        device = self.device
        crossed = interaction_forward(
            workspace.vectors[:rows], workspace.interaction[:rows], first=self.first, device=device
        )
        hidden = [out[:rows] for out in workspace.top]
        mlp_forward(crossed, self._top, hidden, device)
        logits = workspace.logits[:rows]
        logit_forward(hidden[-1] if hidden else crossed, self._logit.weight, self._logit.bias, logits, device)
        return logits

    def top_backward(self, workspace: DenseWorkspace, rows: int) -> None:
        """Gradients of the top MLP and of all vectors, from ``workspace.grad_logits[:rows]``.

        Overwrites the top's gradients and ``workspace.grad_vectors[:rows]``.

        Args:
            workspace: as ``top_forward`` left it.
            rows: B; may be 0: the gradients become zero.
        """
        device, last = self.device, self._logit
        grad_logits, grad_vectors, scratch = _training_arrays(workspace)
        crossed = workspace.interaction[:rows]
        hidden = [out[:rows] for out in workspace.top]
        below = hidden[-1] if hidden else crossed
        # The gradient of activation k - 1 lies in scratch k % 2, as mlp_backward counts.
        grad = scratch.grad(len(hidden), rows, below.shape[1])
        logit_backward(grad_logits[:rows], below, last.weight, last.grad_weight, last.grad_bias, grad, device)
        grad_crossed = scratch.grad(0, rows, self.interaction_width)
        mlp_backward(crossed, self._top, hidden, grad, scratch, device, grad_x=grad_crossed)
        interaction_backward(
            workspace.vectors[:rows], grad_crossed, grad_vectors[:rows], first=self.first, device=device
        )

    def bottom_backward(self, dense: Array, workspace: DenseWorkspace, rows: int) -> None:
        """Gradients of the bottom MLP, from place 0 of ``workspace.grad_vectors[:rows]``.

        Overwrites the bottom's gradients and, where the ReLU was off, place 0 of ``grad_vectors``.

        Args:
            dense: [B, N], the same as in ``bottom_forward``.
            workspace: as ``top_backward`` left it.
            rows: B; may be 0: the gradients become zero.
        """
        if not self._bottom:
            return
        _, grad_vectors, scratch = _training_arrays(workspace)
        outs = self._bottom_activations(workspace, rows)
        mlp_backward(dense[:rows], self._bottom, outs, _flat_rows(grad_vectors[:rows]), scratch, self.device)

    @staticmethod
    def _bottom_activations(workspace: DenseWorkspace, rows: int) -> list[Array]:
        return [*(out[:rows] for out in workspace.bottom), _flat_rows(workspace.vectors[:rows])]


def _flat_rows(vectors: Array) -> Array:
    """[B, F, D] as [B, F * D], a view: its first D columns are place 0."""
    rows, num_vectors, dim = vectors.shape
    return vectors.reshape(rows, num_vectors * dim)


def _training_arrays(workspace: DenseWorkspace) -> tuple[Array, Array, Scratch]:
    assert workspace.scratch is not None, "a backward pass needs a workspace made with training=True"
    return workspace.grad_logits, workspace.grad_vectors, workspace.scratch


def _layer_shapes(part: str, inputs: int, outputs: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a chain's weights and biases, in order."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i, width in enumerate(outputs):
        shapes[f"{part}.{i}.weight"] = (width, inputs)
        shapes[f"{part}.{i}.bias"] = (width,)
        inputs = width
    return shapes


def _views(flat: Array, shapes: dict[str, tuple[int, ...]]) -> dict[str, Array]:
    views = {}
    begin = 0
    for name, shape in shapes.items():
        end = begin + math.prod(shape)
        views[name] = flat[begin:end].reshape(shape)
        begin = end
    return views
