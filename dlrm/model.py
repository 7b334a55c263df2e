"""The dense part of DLRM: bottom MLP, dot interaction, top MLP.

Shapes: B rows, N dense columns, T tables, D embedding dim, F = first + T vectors a row, P = F (F - 1) / 2 pairs.

Source: Naumov et al., "Deep Learning Recommendation Model for Personalization and Recommendation Systems" (2019).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dlrm.config import ModelConfig
from dlrm.device import Array, Device
from dlrm.errors import ConfigError
from dlrm.gemm import num_chunks
from dlrm.initial import initialize_linear
from dlrm.interaction import (
    interaction_backward,
    interaction_backward_relu,
    interaction_forward,
    interaction_width,
)
from dlrm.logit import logit_backward, logit_forward
from dlrm.mlp import Linear, mlp_data_backward, mlp_forward, mlp_weight_backward


@dataclass(slots=True)
class DenseWorkspace:
    """The activations and gradients of one batch, allocated once; smaller batches use their first rows.

    Hidden activations are as wide as their layer, rounded up to ``device.column_multiple``; what is beyond stays 0.

    Attributes:
        capacity: rows it can hold.
        vectors: [capacity, F, D], place 0 the bottom output (if there is one), then the tables' pooled vectors.
        logits: [capacity], in the parameters' dtype.
        bottom: hidden activations of the bottom MLP, without its output.
        interaction: [capacity, >= first * D + P].
        top: hidden activations of the top MLP.
        bottom_masks: where the bottom's ReLUs were on, output included, as ``device.relu_mask`` keeps it.
        top_masks: the same of the top.
        grad_vectors: [capacity, F, D]; ``None`` without training, like all below.
        grad_logits: [capacity].
        grad_bottom: gradients of ``bottom``, before the ReLU.
        grad_interaction: of ``interaction``.
        grad_top: of ``top``, before the ReLU.
        partials: scratch for sums over rows, at least [num_chunks(capacity) * (widest + 1)].
    """

    capacity: int
    vectors: Array
    logits: Array
    bottom: tuple[Array, ...]
    interaction: Array
    top: tuple[Array, ...]
    bottom_masks: tuple[Array | None, ...]
    top_masks: tuple[Array | None, ...]
    grad_vectors: Array | None = None
    grad_logits: Array | None = None
    grad_bottom: tuple[Array, ...] = ()
    grad_interaction: Array | None = None
    grad_top: tuple[Array, ...] = ()
    partials: Array | None = None


class DenseModel:
    """Weights, gradients and passes of the dense part.

    Args:
        model: layers and embedding dim.
        num_dense: N; 0: no bottom MLP, the top MLP gets the dots alone.
        num_tables: T; a table whose keys are features of their own counts as so many.
        dtype: of activations and products: float32 or float64, on a GPU also float16 or bfloat16 (uint16, its bits).
            Parameters and their gradients are float32 where it is narrower.
        device: holds the arrays, runs the passes.
        seed: of the initial weights.

    Attributes:
        first: 1 with dense columns, else 0.
        dense_columns: columns of the dense input: N rounded up to ``device.column_multiple``; what is beyond N is 0.
        flat_parameters: all weights in one array, each input width rounded up as ``dense_columns`` is.
        flat_gradients: all gradients in one array of the same order.
        bottom_gradients: its part of the bottom MLP, which one all-reduce sums.
        top_gradients: the rest, that of the top MLP.
        flat_weights: what the passes read: ``flat_parameters`` itself, or its copy in a narrower dtype.
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
        self.dtype = np.dtype(dtype)
        self.num_dense = num_dense
        self.num_tables = num_tables
        self.first = 1 if num_dense else 0
        self.num_vectors = self.first + num_tables
        self.dense_columns = self._padded(num_dense)
        self.interaction_width = interaction_width(self.num_vectors, model.embedding_dim, self.first)
        if not self.interaction_width:
            raise ConfigError(
                f"data: {num_tables} tables and no dense columns leave the top MLP without input; "
                "give it two tables or a dense column"
            )
        bottom = _layer_shapes("bottom", num_dense, model.bottom_mlp if num_dense else ())
        top = _layer_shapes("top", self.interaction_width, model.top_mlp)
        shapes = bottom | top
        stored = {name: (*shape[:-1], self._padded(shape[-1])) for name, shape in shapes.items()}
        self._shapes, self._stored = shapes, stored
        size = sum(math.prod(shape) for shape in stored.values())
        parameter_dtype = np.promote_types(self.dtype, np.float32)
        self.flat_parameters: Array = device.zeros(size, parameter_dtype)
        self.flat_gradients: Array = device.zeros(size, parameter_dtype)
        begin = sum(math.prod(stored[name]) for name in bottom)
        self.bottom_gradients, self.top_gradients = self.flat_gradients[:begin], self.flat_gradients[begin:]
        self.flat_weights: Array = self.flat_parameters
        if parameter_dtype != self.dtype:
            self.flat_weights = device.zeros(size, self.dtype)
        self.parameters: dict[str, Array] = _views(self.flat_parameters, stored, shapes)
        self.gradients: dict[str, Array] = _views(self.flat_gradients, stored, shapes)
        weights, gradients = _views(self.flat_weights, stored, stored), _views(self.flat_gradients, stored, stored)
        self._bottom = self._layers("bottom", len(bottom) // 2, weights, gradients, seed)
        *hidden, self._logit = self._layers("top", len(top) // 2, weights, gradients, seed)
        self._top = tuple(hidden)
        self.refresh_weights()

    def _padded(self, columns: int) -> int:
        multiple = self.device.column_multiple
        return -(-columns // multiple) * multiple

    def _layers(
        self, part: str, count: int, weights: dict[str, Array], gradients: dict[str, Array], seed: int
    ) -> tuple[Linear, ...]:
        layers = []
        for i in range(count):
            names = (f"{part}.{i}.weight", f"{part}.{i}.bias")
            weight, bias = (self.parameters[name] for name in names)
            initialize_linear(seed, f"{part}.{i}", weight, bias, self.device)
            outputs = len(bias)
            bias, grad_bias = weights[names[1]][:outputs], gradients[names[1]][:outputs]
            layers.append(Linear(weights[names[0]], bias, gradients[names[0]], grad_bias))
        return tuple(layers)

    def refresh_weights(self) -> None:
        """Make ``flat_weights`` what ``flat_parameters`` are, after these were set from elsewhere."""
        if self.flat_weights is not self.flat_parameters:
            self.device.convert(self.flat_parameters, self.flat_weights)

    def pack(self, flat: Array) -> Array:
        """A flat array of this layout, such as an optimiser's state, without the padding and on the host."""
        if not self._is_padded:
            return self.device.to_host(flat)
        parts = _views(flat, self._stored, self._shapes).values()
        return np.concatenate([self.device.to_host(part).reshape(-1) for part in parts])

    def unpack(self, packed: Array, flat: Array) -> None:
        """The inverse of ``pack``; what is padding stays."""
        at = 0
        for part in _views(flat, self._stored, self._shapes).values():
            self.device.assign(packed[at : at + part.size].reshape(part.shape), part)
            at += part.size

    @property
    def _is_padded(self) -> bool:
        return self._stored != self._shapes

    def workspace(self, capacity: int, *, training: bool = True) -> DenseWorkspace:
        """Arrays for batches of up to ``capacity`` rows; with ``training``, for the backward pass too."""
        device, dtype = self.device, self.dtype

        def wide(columns: int) -> Array:
            make = device.empty if columns == self._padded(columns) else device.zeros
            return make((capacity, self._padded(columns)), dtype)

        widths = [len(layer.bias) for layer in self._bottom[:-1]], [len(layer.bias) for layer in self._top]
        shape = (capacity, self.num_vectors, self.config.embedding_dim)
        workspace = DenseWorkspace(
            capacity=capacity,
            vectors=device.empty(shape, dtype),
            logits=device.empty(capacity, self.flat_parameters.dtype),
            bottom=tuple(map(wide, widths[0])),
            interaction=wide(self.interaction_width),
            top=tuple(map(wide, widths[1])),
            bottom_masks=tuple(device.relu_mask(capacity, len(layer.bias), training) for layer in self._bottom),
            top_masks=tuple(device.relu_mask(capacity, width, training) for width in widths[1]),
        )
        if training:
            widest = 1 + max(max(layer.weight.shape) for layer in (*self._bottom, *self._top, self._logit))
            workspace.grad_vectors = device.empty(shape, dtype)
            workspace.grad_logits = device.empty(capacity, dtype)
            workspace.grad_bottom = tuple(map(wide, widths[0]))
            workspace.grad_interaction = wide(self.interaction_width)
            workspace.grad_top = tuple(map(wide, widths[1]))
            workspace.partials = device.empty(max(1, num_chunks(capacity)) * widest, self.flat_parameters.dtype)
        return workspace

    def bottom_forward(self, dense: Array, workspace: DenseWorkspace) -> None:
        """Write the bottom output into place 0 of ``workspace.vectors``.

        Args:
            dense: [B, dense_columns]; B may be 0.
            workspace: of at least B rows.
        """
        if self._bottom:
            rows = len(dense)
            outs, masks = self._bottom_activations(workspace, rows), _first_rows(workspace.bottom_masks, rows)
            mlp_forward(dense, self._bottom, outs, masks, self.device)

    def top_forward(self, workspace: DenseWorkspace, rows: int) -> Array:
        """Interaction and top MLP.

        Args:
            workspace: its ``vectors[:rows]`` are read.
            rows: B; may be 0.

        Returns:
            ``workspace.logits[:rows]``.
        """
        interaction_forward(
            workspace.vectors[:rows], workspace.interaction[:rows], first=self.first, device=self.device
        )
        return self.top_mlp_forward(workspace, rows)

    def top_mlp_forward(self, workspace: DenseWorkspace, rows: int) -> Array:
        """The top MLP alone, over ``workspace.interaction[:rows]``; returns ``workspace.logits[:rows]``."""
        device, crossed = self.device, workspace.interaction[:rows]
        hidden = _first_rows(workspace.top, rows)
        mlp_forward(crossed, self._top, hidden, _first_rows(workspace.top_masks, rows), device)
        logits = workspace.logits[:rows]
        logit_forward(hidden[-1] if hidden else crossed, self._logit.weight, self._logit.bias, logits, device)
        return logits

    def top_data_backward(self, workspace: DenseWorkspace, rows: int) -> None:
        """Gradients of all vectors, from ``workspace.grad_logits[:rows]``; the logit layer's weights too.

        Overwrites ``workspace.grad_vectors[:rows]``.

        Args:
            workspace: as ``top_forward`` left it.
            rows: B; may be 0: the gradients become zero.
        """
        grad_crossed = self.top_mlp_data_backward(workspace, rows)
        vectors, grad_vectors = workspace.vectors[:rows], _given(workspace.grad_vectors)[:rows]
        backward = interaction_backward_relu if self.device.fuses_relu else interaction_backward
        backward(vectors, grad_crossed, grad_vectors, first=self.first, device=self.device)

    def top_mlp_data_backward(self, workspace: DenseWorkspace, rows: int) -> Array:
        """The top MLP's part of ``top_data_backward``: back to the interaction's output, whose gradient it returns."""
        device, last = self.device, self._logit
        crossed, hidden = workspace.interaction[:rows], _first_rows(workspace.top, rows)
        grad_crossed, grads = _given(workspace.grad_interaction)[:rows], _first_rows(workspace.grad_top, rows)
        below, grad = (hidden[-1], grads[-1]) if hidden else (crossed, grad_crossed)
        grad_logits = _given(workspace.grad_logits)[:rows]
        masked = bool(hidden) and device.fuses_relu
        logit_backward(
            grad_logits, below, last.weight, last.grad_weight, last.grad_bias, grad, workspace.partials, device,
            relu=masked,
        )  # fmt: skip
        masks = _first_rows(workspace.top_masks, rows)
        partials = workspace.partials
        mlp_data_backward(self._top, hidden, masks, grads, partials, device, grad_x=grad_crossed, masked=masked)
        return grad_crossed

    def top_weight_backward(self, workspace: DenseWorkspace, rows: int) -> None:
        """Gradients of the top MLP's weights.

        Args:
            workspace: as ``top_data_backward`` left it.
            rows: B; may be 0: the gradients become zero.
        """
        hidden, grads = _first_rows(workspace.top, rows), _first_rows(workspace.grad_top, rows)
        mlp_weight_backward(workspace.interaction[:rows], self._top, hidden, grads, self.device)

    def bottom_backward(self, dense: Array, workspace: DenseWorkspace, rows: int) -> None:
        """Gradients of the bottom MLP, from place 0 of ``workspace.grad_vectors[:rows]``.

        Overwrites the bottom's gradients and, where the ReLU was off, place 0 of ``grad_vectors``.

        Args:
            dense: [B, dense_columns], the same as in ``bottom_forward``.
            workspace: as ``top_data_backward`` left it.
            rows: B; may be 0: the gradients become zero.
        """
        if not self._bottom:
            return
        outs, masks = self._bottom_activations(workspace, rows), _first_rows(workspace.bottom_masks, rows)
        grads = [*_first_rows(workspace.grad_bottom, rows), _flat_rows(_given(workspace.grad_vectors)[:rows])]
        masked = self.device.fuses_relu
        mlp_data_backward(self._bottom, outs, masks, grads, workspace.partials, self.device, masked=masked)
        mlp_weight_backward(dense[:rows], self._bottom, outs, grads, self.device)

    @staticmethod
    def _bottom_activations(workspace: DenseWorkspace, rows: int) -> list[Array]:
        return [*_first_rows(workspace.bottom, rows), _flat_rows(workspace.vectors[:rows])]


def _flat_rows(vectors: Array) -> Array:
    """[B, F, D] as [B, F * D], a view: its first D columns are place 0."""
    rows, num_vectors, dim = vectors.shape
    return vectors.reshape(rows, num_vectors * dim)


def _first_rows(arrays: Sequence[Array], rows: int) -> list[Array]:
    return [None if array is None else array[:rows] for array in arrays]


def _given(array: Array | None) -> Array:
    assert array is not None, "a backward pass needs a workspace made with training=True"
    return array


def _layer_shapes(part: str, inputs: int, outputs: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a chain's weights and biases, in order."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i, width in enumerate(outputs):
        shapes[f"{part}.{i}.weight"] = (width, inputs)
        shapes[f"{part}.{i}.bias"] = (width,)
        inputs = width
    return shapes


def _views(flat: Array, stored: dict[str, tuple[int, ...]], shapes: dict[str, tuple[int, ...]]) -> dict[str, Array]:
    """Arrays of ``shapes`` inside those of ``stored``, which lie in ``flat`` one after the other."""
    views = {}
    begin = 0
    for name, shape in stored.items():
        end = begin + math.prod(shape)
        views[name] = flat[begin:end].reshape(shape)[..., : shapes[name][-1]]
        begin = end
    return views
