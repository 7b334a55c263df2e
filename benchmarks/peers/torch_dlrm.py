"""The peer: a plain PyTorch CPU DLRM, one repetition of one shape (needs PyTorch; started by ``cpu_train.py``).

Written the way that is fastest of those tried (see RESULTS.md): ``nn.EmbeddingBag(sparse=True)`` for the
tables, ``nn.Linear`` for the MLPs, one ``bmm`` and one ``index_select`` for the interaction (indexing by a pair
of index tensors, as facebookresearch/dlrm does, is slower backward), ``torch.optim.SGD`` for everything.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from shapes import SHAPES, Shape, make_batches
from timing import repeat, report
from torch import nn


def _mlp(first: int, outputs: tuple[int, ...], *, relu_at_end: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, (inputs, size) in enumerate(zip((first, *outputs[:-1]), outputs, strict=True)):
        layers.append(nn.Linear(inputs, size))
        if relu_at_end or i < len(outputs) - 1:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


class Dlrm(nn.Module):
    """Bottom MLP, embedding bags, dot interaction, top MLP."""

    def __init__(self, shape: Shape) -> None:
        """Default initial values of PyTorch, except the tables' (small and even: normal draws take minutes)."""
        super().__init__()
        self.bottom = _mlp(shape.num_dense, shape.bottom, relu_at_end=True)
        tables = []
        for rows in shape.table_rows:
            weight = torch.empty(rows, shape.dim).uniform_(-(rows**-0.5), rows**-0.5)
            tables.append(nn.EmbeddingBag.from_pretrained(weight, freeze=False, mode="sum", sparse=True))
        self.tables = nn.ModuleList(tables)
        num_vectors = 1 + len(shape.table_rows)
        below = torch.tril_indices(num_vectors, num_vectors, offset=-1)
        self.register_buffer("pairs", below[0] * num_vectors + below[1])
        self.top = _mlp(shape.layers()[len(shape.bottom)][0], shape.top, relu_at_end=False)

    def forward(self, dense: torch.Tensor, keys: list[torch.Tensor]) -> torch.Tensor:
        """Logits [B] of dense [B, N] and keys of [B, H] per table."""
        bottom = self.bottom(dense)
        vectors = [bottom, *(table(key) for table, key in zip(self.tables, keys, strict=True))]
        stacked = torch.stack(vectors, dim=1)
        dots = torch.bmm(stacked, stacked.transpose(1, 2)).flatten(1).index_select(1, self.pairs)
        return self.top(torch.cat([bottom, dots], dim=1)).squeeze(1)


def training_step(shape: Shape, *, compiled: bool, num_batches: int, lr: float) -> Callable[[int], object]:
    """A function that makes one step, on batches that lie in memory as tensors."""
    torch.manual_seed(1)
    model = Dlrm(shape)
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    criterion = nn.BCEWithLogitsLoss()
    batches = [
        (
            torch.from_numpy(batch.labels).to(torch.float32),
            torch.from_numpy(batch.dense),
            [torch.from_numpy(keys).to(torch.int64) for keys in batch.keys],
        )
        for batch in make_batches(shape, num_batches)
    ]

    def step(number: int) -> float:
        labels, dense, keys = batches[number % len(batches)]
        optimizer.zero_grad(set_to_none=True)
        loss = criterion(forward(dense, keys), labels)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def main() -> None:
    """One repetition."""
    parser = argparse.ArgumentParser()
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--variant", choices=("eager", "compile"), default="eager")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--warmup", type=float, default=2.0)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--batches", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    step = training_step(
        SHAPES[options.shape], compiled=options.variant == "compile", num_batches=options.batches, lr=0.01
    )
    result = repeat(step, warmup_s=options.warmup, measure_s=options.seconds)
    report(**result, version=f"torch {torch.__version__}", cpu=torch.backends.cpu.get_cpu_capability())


if __name__ == "__main__":
    main()
