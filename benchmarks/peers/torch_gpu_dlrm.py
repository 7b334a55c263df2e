"""The GPU peer: a PyTorch DLRM in the fastest forms known, for ``gpu_train.py`` and ``time_to_auc.py``.

Independent of the project: nothing of it is imported. What is done for PyTorch's speed: all plain tables are one
matrix (one gather, one ``index_add_`` with atomics as exact SGD; no sparse gradients to coalesce), the interaction has
a backward of its own (one batched product instead of two, gathers instead of scatters), the loss scale is static
(``GradScaler`` asks the GPU every step), SGD is PyTorch's fused one. FBGEMM's tables update themselves in backward.

Shapes: B rows of a batch, N dense columns, T tables, D columns of a table, R rows of all tables, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

Step = Callable[[], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a DLRM.

    Attributes:
        rows: of each table.
        dim: D.
        num_dense: N.
        bottom: outputs of the bottom MLP's layers; the last is D.
        top: outputs of the top MLP's layers; the last is 1.
    """

    rows: Sequence[int]
    dim: int
    num_dense: int
    bottom: Sequence[int]
    top: Sequence[int]


@dataclass(frozen=True, slots=True)
class Form:
    """One way of running the same step.

    Attributes:
        tables: one matrix in PyTorch, or FBGEMM's table-batched embeddings.
        dense: how the rest runs.
        graph: the whole step is captured into one CUDA graph for each batch of the ring.
    """

    tables: Literal["torch", "fbgemm"] = "torch"
    dense: Literal["eager", "compile", "reduce-overhead"] = "eager"
    graph: bool = False


FORMS = {
    "eager": Form(),
    "compile": Form(dense="compile"),
    "reduce-overhead": Form(dense="reduce-overhead"),
    "graph": Form(graph=True),
    "compile + graph": Form(dense="compile", graph=True),
    "fbgemm eager": Form("fbgemm"),
    "fbgemm compile": Form("fbgemm", "compile"),
    "fbgemm reduce-overhead": Form("fbgemm", "reduce-overhead"),
    "fbgemm graph": Form("fbgemm", graph=True),
    "fbgemm compile + graph": Form("fbgemm", "compile", graph=True),
}


@dataclass(slots=True)
class Batch:
    """One batch on the device: dense [B, N] float32, labels [B] float32, keys int64 as the tables want them."""

    dense: torch.Tensor
    labels: torch.Tensor
    keys: torch.Tensor


class _Interaction(torch.autograd.Function):
    """Dots of all pairs (i, j), j < i, of vectors [B, F, D]: [B, P]."""

    @staticmethod
    def forward(ctx: Any, vectors: torch.Tensor, pairs: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """``pairs`` [P] are places in [F, F]; ``places`` [F * F] pairs, P on the diagonal."""
        ctx.save_for_backward(vectors, places)
        return torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1).index_select(1, pairs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        """Of vectors: (G + G^T) vectors, G the pairs' gradients in their places: symmetric and zero on the diagonal."""
        vectors, places = ctx.saved_tensors
        size = vectors.shape[1]
        symmetric = functional.pad(grad, (0, 1)).index_select(1, places).view(-1, size, size)
        return torch.bmm(symmetric, vectors), None, None


def _mlp(first: int, outputs: Sequence[int], *, relu_at_end: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, (inputs, size) in enumerate(zip((first, *outputs[:-1]), outputs, strict=True)):
        layers.append(nn.Linear(inputs, size))
        if relu_at_end or i < len(outputs) - 1:
            layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


class Dense(nn.Module):
    """Both MLPs, the interaction and the scaled loss."""

    def __init__(self, shape: ModelShape, *, half: bool, scale: float) -> None:
        """Build the layers.

        Args:
            shape: of the model.
            half: products in float16 by autocast.
            scale: factor of the loss.
        """
        super().__init__()
        self.half, self.scale = half, scale
        vectors = 1 + len(shape.rows)
        below = torch.tril_indices(vectors, vectors, offset=-1)
        count = below.shape[1]
        places = torch.full((vectors, vectors), count)
        places[below[0], below[1]] = places[below[1], below[0]] = torch.arange(count)
        self.register_buffer("pairs", below[0] * vectors + below[1])
        self.register_buffer("places", places.flatten())
        self.bottom = _mlp(shape.num_dense, shape.bottom, relu_at_end=True)
        self.top = _mlp(shape.dim + count, shape.top, relu_at_end=False)

    def logits(self, vectors: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
        """Logits [B] float32 of pooled vectors [B, T, D] and dense [B, N]."""
        with torch.autocast(dense.device.type, torch.float16, enabled=self.half):
            bottom = self.bottom(dense)
            together = torch.cat([bottom.unsqueeze(1), vectors], dim=1)
            dots = _Interaction.apply(together, self.pairs, self.places)
            return self.top(torch.cat([bottom, dots], dim=1)).squeeze(1).float()

    def forward(self, vectors: torch.Tensor, dense: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean loss of the batch times the scale."""
        return functional.binary_cross_entropy_with_logits(self.logits(vectors, dense), labels) * self.scale


class TorchTables(nn.Module):
    """All tables as one matrix [R, D] float32; keys of a batch [B * T], row after row, count through all tables."""

    def __init__(self, shape: ModelShape, *, half: bool, device: torch.device) -> None:
        """Allocate the matrix; ``draw`` fills it."""
        super().__init__()
        self.num_tables, self.dim, self.half = len(shape.rows), shape.dim, half
        weight = torch.empty(sum(shape.rows), shape.dim, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        starts = torch.tensor([0, *shape.rows[:-1]], device=device).cumsum(0)
        self.register_buffer("starts", starts)

    def views(self, rows: Sequence[int]) -> Sequence[torch.Tensor]:
        """The weights of each table."""
        return self.weight.split(list(rows))

    def arrange(self, keys: torch.Tensor) -> torch.Tensor:
        """Keys [B, T] of each table as this class wants them."""
        return (keys + self.starts).flatten()

    def lookup(self, keys: torch.Tensor) -> torch.Tensor:
        """Rows [B, T, D] of a batch."""
        found = self.weight.index_select(0, keys)
        return (found.half() if self.half else found).view(-1, self.num_tables, self.dim)

    def update(self, keys: torch.Tensor, grad: torch.Tensor, lr: float) -> None:
        """Exact SGD by atomic additions."""
        self.weight.index_add_(0, keys, grad.view(-1, self.dim).float(), alpha=-lr)


class Peer:
    """A model and its step in one form."""

    def __init__(
        self,
        shape: ModelShape,
        form: Form,
        *,
        half: bool,
        lr: float,
        scale: float,
        device: str,
        table_lr: float | None = None,
        seed: int = 1,
    ) -> None:
        """Build and draw the weights; compilation happens at the first step.

        Args:
            shape: of the model.
            form: how to run it.
            half: float16 activations and gradients, float32 weights.
            lr: learning rate of SGD.
            table_lr: that of the tables; ``None``: the same.
            scale: static factor of all gradients on their way, taken out by the updates.
            device: ``cuda``, or ``cpu`` to test the arithmetic.
            seed: of the weights.
        """
        self.shape, self.form, self.seed = shape, form, seed
        self.device = torch.device(device)
        self.scale, self._table_lr = scale, (lr if table_lr is None else table_lr) / scale
        self.dense = Dense(shape, half=half, scale=scale).to(self.device)
        if form.tables == "fbgemm":
            from torch_gpu_fbgemm import FbgemmTables

            self.tables: Any = FbgemmTables(shape, half=half, lr=self._table_lr, device=self.device)
        else:
            self.tables = TorchTables(shape, half=half, device=self.device)
        self.draw()
        fused = {"fused": True} if self.device.type == "cuda" else {}
        self.optimizer = torch.optim.SGD(self.dense.parameters(), lr=lr / scale, **fused)
        self._loss: Callable[..., torch.Tensor] = self.dense
        self._logits: Callable[..., torch.Tensor] = self.dense.logits
        self._lookup, self._update = self.tables.lookup, self.tables.update
        if form.dense != "eager":
            mode = None if form.dense == "compile" else form.dense
            self._loss = torch.compile(self.dense, mode=mode, dynamic=False)
            self._logits = torch.compile(self.dense.logits, mode=mode, dynamic=False)
            if form.tables == "torch":
                # In place and without gradient: otherwise the graph trees of reduce-overhead would copy the tables.
                torch._dynamo.mark_static_address(self.tables.weight)  # noqa: SLF001  the documented way
                self._lookup = torch.compile(self._lookup, mode=mode, dynamic=False)
                self._update = torch.compile(self._update, mode=mode, dynamic=False)

    def draw(self) -> None:
        """Initial weights, the same in every form: Crosslane's laws, PyTorch's generator."""
        generator = torch.Generator(self.device).manual_seed(self.seed)
        with torch.no_grad():
            for rows, view in zip(self.shape.rows, self.tables.views(self.shape.rows), strict=True):
                view.uniform_(-(rows**-0.5), rows**-0.5, generator=generator)
            for name, parameter in self.dense.named_parameters():
                outputs, inputs = parameter.shape[0], parameter.shape[-1]
                variance = 1 / outputs if name.endswith("bias") else 2 / (inputs + outputs)
                parameter.normal_(0, variance**0.5, generator=generator)

    def step(self, batch: Batch) -> torch.Tensor:
        """Forward, backward, updates; the loss times the scale, on the device."""
        if self.form.dense == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        self.optimizer.zero_grad(set_to_none=True)
        vectors = self._lookup(batch.keys)
        own = self.form.tables == "torch"
        if own:
            vectors = vectors.detach().requires_grad_()
        loss = self._loss(vectors, batch.dense, batch.labels)
        loss.backward()
        if own:
            self._update(batch.keys, vectors.grad, self._table_lr)
        self.optimizer.step()
        return loss.detach()

    def steps(self, ring: Sequence[Batch]) -> list[Step]:
        """A function for each batch of the ring, compiled or captured and run a few times already."""

        def bind(batch: Batch) -> Step:
            return lambda: self.step(batch)

        issue = [bind(batch) for batch in ring]
        for call in issue[:3] * 2:
            call()
        if not self.form.graph:
            return issue
        return self._capture(issue)

    def _capture(self, issue: Sequence[Step]) -> list[Step]:
        """One graph a batch; they run one after the other and share their memory."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in issue[:3]:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        pool = torch.cuda.graph_pool_handle()
        captured: list[Step] = []
        for call in issue:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                loss = call()

            def replay(graph: Any = graph, loss: torch.Tensor = loss) -> torch.Tensor:
                graph.replay()
                return loss

            captured.append(replay)
        return captured

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits [B], without gradients."""
        if self.form.dense == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            return self._logits(self._lookup(batch.keys), batch.dense)
