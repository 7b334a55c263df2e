"""An independent DLRM in PyTorch: the outside judge of the engine.

Written from ``docs/design.md`` alone; it imports nothing of the project. Gradients come from autograd, the
initial values from a Philox written here in NumPy, and the optimisers are the formulas of the design's table,
spelt out; ``check_optimizers`` compares them with ``torch.optim`` where the definitions agree, and FTRL with
the minimisation problem that it is published as. Needs PyTorch, so only the scripts that make expected values
(``make_golden.py``, ``make_twin.py``) import it, never a test.

Shapes: B rows of a batch, D embedding dim, K keys of one table, N dense columns, F vectors that interact.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn import functional

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)


def philox4x32_10(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Ten rounds of Philox4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    Args:
        counter: [n, 4] unsigned 32-bit words, any integer dtype.
        key: two 32-bit words.

    Returns:
        [n, 4] uint64, each below 2^32.
    """
    c0, c1, c2, c3 = (counter[:, i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            product1 & _LOW,
            (product0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            product0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1)


def _words(seed: int, name: str, rows: int, columns: int) -> np.ndarray:
    """The [rows, blocks, 4] words behind a tensor, blocks = ceil(columns / 4)."""
    blocks = -(-columns // 4)
    row, block = np.divmod(np.arange(rows * blocks, dtype=np.uint64), np.uint64(blocks))
    tensor = np.full_like(row, zlib.crc32(name.encode()))
    counter = np.stack([block, row & _LOW, row >> np.uint64(32), tensor], axis=1)
    words = philox4x32_10(counter, (seed & 0xFFFFFFFF, seed >> 32))
    return words.reshape(rows, blocks, 4).astype(np.float64)


def uniform_values(seed: int, name: str, rows: int, columns: int) -> np.ndarray:
    """[rows, columns] float64 in (-1, 1)."""
    words = _words(seed, name, rows, columns)
    return ((words + 0.5) / 2**31 - 1.0).reshape(rows, -1)[:, :columns]


def normal_values(seed: int, name: str, rows: int, columns: int) -> np.ndarray:
    """[rows, columns] float64, standard normal by Box-Muller on neighbouring words."""
    words = (_words(seed, name, rows, columns) + 0.5) / 2**32
    radius = np.sqrt(-2.0 * np.log(words[:, :, 0::2]))
    angle = 2.0 * np.pi * words[:, :, 1::2]
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=3)  # [rows, blocks, 2, 2]
    return pairs.reshape(rows, -1)[:, :columns]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What fixes the parameters' shapes."""

    num_dense: int
    tables: Mapping[str, int]
    """Rows by name, in manifest order."""
    dim: int
    bottom: tuple[int, ...]
    top: tuple[int, ...]
    concat: Mapping[str, int] = field(default_factory=dict)
    """Keys of every bag of the tables whose vectors are not pooled."""

    def layers(self) -> list[tuple[str, int, int]]:
        """``(name, in, out)`` of every linear layer."""
        num_vectors = sum(self.concat.get(table, 1) for table in self.tables) + bool(self.num_dense)
        top_in = num_vectors * (num_vectors - 1) // 2 + (self.dim if self.num_dense else 0)
        sizes = [("bottom", self.num_dense, self.bottom)] if self.num_dense else []
        found = []
        for part, first, outputs in [*sizes, ("top", top_in, self.top)]:
            inputs = (first, *outputs[:-1])
            found += [(f"{part}.{i}", a, b) for i, (a, b) in enumerate(zip(inputs, outputs, strict=True))]
        return found


def initial_values(architecture: Architecture, seed: int) -> dict[str, np.ndarray]:
    """Every parameter's default initial value in float64."""
    values = {}
    for name, inputs, outputs in architecture.layers():
        weight, bias = f"{name}.weight", f"{name}.bias"
        values[weight] = normal_values(seed, weight, outputs, inputs) * np.sqrt(2.0 / (inputs + outputs))
        values[bias] = normal_values(seed, bias, 1, outputs)[0] * np.sqrt(1.0 / outputs)
    for table, rows in architecture.tables.items():
        name = f"table.{table}"
        values[name] = uniform_values(seed, name, rows, architecture.dim) / np.sqrt(rows)
    return values


@dataclass(kw_only=True)
class Bags:
    """Keys of one table for the rows of one batch."""

    keys: torch.Tensor
    """[K] int64."""
    bag: torch.Tensor
    """[K] int64, the row of the batch that each key belongs to."""
    weights: torch.Tensor | None = None


@dataclass(kw_only=True)
class Batch:
    """One global batch."""

    labels: torch.Tensor
    dense: torch.Tensor
    """[B, N]."""
    tables: dict[str, Bags]


def predict(
    parameters: Mapping[str, torch.Tensor],
    architecture: Architecture,
    pooling: Mapping[str, str],
    batch: Batch,
    kinks: list[float] | None = None,
) -> torch.Tensor:
    """Logits [B] of one batch; ``kinks`` gets each ReLU's smallest distance from its kink."""
    num_rows = len(batch.labels)
    vectors = []
    if architecture.num_dense:
        vectors.append(_mlp(parameters, "bottom", len(architecture.bottom), batch.dense, True, kinks))
    for table in architecture.tables:
        bags = batch.tables[table]
        rows = parameters[f"table.{table}"][bags.keys]
        if bags.weights is not None:
            rows = rows * bags.weights[:, None]
        if pooling[table] == "concat":
            vectors += rows.reshape(num_rows, architecture.concat[table], architecture.dim).unbind(dim=1)
            continue
        pooled = rows.new_zeros(num_rows, architecture.dim).index_add(0, bags.bag, rows)
        if pooling[table] == "mean":
            counts = torch.bincount(bags.bag, minlength=num_rows).clamp(min=1)
            pooled = pooled / counts[:, None].to(pooled.dtype)
        vectors.append(pooled)
    stacked = torch.stack(vectors, dim=1)  # [B, F, D]
    dots = torch.bmm(stacked, stacked.transpose(1, 2))
    below = torch.tril_indices(len(vectors), len(vectors), offset=-1)
    crossed = dots[:, below[0], below[1]]
    if architecture.num_dense:
        crossed = torch.cat([vectors[0], crossed], dim=1)
    return _mlp(parameters, "top", len(architecture.top), crossed, False, kinks)[:, 0]


def _mlp(
    parameters: Mapping[str, torch.Tensor],
    part: str,
    depth: int,
    x: torch.Tensor,
    relu_at_end: bool,
    kinks: list[float] | None,
) -> torch.Tensor:
    for i in range(depth):
        x = functional.linear(x, parameters[f"{part}.{i}.weight"], parameters[f"{part}.{i}.bias"])
        if i < depth - 1 or relu_at_end:
            if kinks is not None:
                kinks.append(float(x.detach().abs().min()))
            x = torch.relu(x)
    return x


def learning_rate_at(step: int, base: float, schedule: Mapping[str, float]) -> float:
    """Warm-up from step 1, plateau, polynomial decay, floor."""
    warmup = schedule.get("warmup_steps", 0)
    start, length = schedule.get("decay_start", 0), schedule.get("decay_steps", 0)
    end = schedule.get("end_lr", 0.0)
    if step <= warmup:
        return base * step / warmup
    if not start or step <= start:
        return base
    if step <= start + length:
        return max(end, base * ((start + length - step) / length) ** schedule.get("decay_power", 2.0))
    return end


@dataclass(kw_only=True)
class Optimizer:
    """One parameter's optimiser; ``rows=None`` updates everything, otherwise those rows alone (lazy)."""

    kind: str
    lr: float
    momentum: float = 0.9
    eps: float = 1e-8
    beta1: float = 0.9
    beta2: float = 0.999
    initial_accumulator: float | None = None
    ftrl_beta: float = 0.0
    l1: float = 0.0
    l2: float = 0.0
    state: dict[str, torch.Tensor] = field(default_factory=dict)

    def _slot(self, name: str, like: torch.Tensor, start: float = 0.0) -> torch.Tensor:
        if name not in self.state:
            self.state[name] = torch.full_like(like, start)
        return self.state[name]

    @torch.no_grad()
    def update(
        self,
        weight: torch.Tensor,
        gradient: torch.Tensor,
        step: int,
        lr: float,
        rows: torch.Tensor | None = None,
    ) -> None:
        """Change ``weight`` in place by one step."""
        at = slice(None) if rows is None else rows
        w, g = weight[at], gradient[at]
        match self.kind:
            case "sgd":
                weight[at] = w - lr * g
            case "momentum":
                slot = self._slot("velocity", weight)
                velocity = self.momentum * slot[at] + g
                slot[at] = velocity
                weight[at] = w - lr * velocity
            case "adagrad":
                slot = self._slot("accumulator", weight, self.initial_accumulator or 0.0)
                total = slot[at] + g**2
                slot[at] = total
                weight[at] = w - lr * g / (total.sqrt() + self.eps)
            case "rowwise_adagrad":
                slot = self._slot("accumulator", weight[:, :1], self.initial_accumulator or 0.0)
                total = slot[at] + (g**2).mean(dim=1, keepdim=True)
                slot[at] = total
                weight[at] = w - lr * g / (total.sqrt() + self.eps)
            case "adam":
                first, second = self._slot("first", weight), self._slot("second", weight)
                m = self.beta1 * first[at] + (1 - self.beta1) * g
                v = self.beta2 * second[at] + (1 - self.beta2) * g**2
                first[at], second[at] = m, v
                root = (v / (1 - self.beta2**step)).sqrt()
                weight[at] = w - lr * (m / (1 - self.beta1**step)) / (root + self.eps)
            case "ftrl":
                start = 0.1 if self.initial_accumulator is None else self.initial_accumulator
                squares, linear = self._slot("squares", weight, start), self._slot("linear", weight)
                n = squares[at] + g**2
                sigma = (n.sqrt() - squares[at].sqrt()) / lr
                z = linear[at] + g - sigma * w
                squares[at], linear[at] = n, z
                moved = -(z - z.sign() * self.l1) / ((self.ftrl_beta + n.sqrt()) / lr + 2 * self.l2)
                weight[at] = torch.where(z.abs() <= self.l1, torch.zeros_like(z), moved)
            case _:
                raise ValueError(self.kind)


class Trainer:
    """Trains the reference model batch by batch."""

    def __init__(
        self,
        architecture: Architecture,
        initial: Mapping[str, np.ndarray],
        config: Mapping,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        """Start from ``initial``; ``config`` is the run's YAML as plain values."""
        self.architecture = architecture
        self.step = 0
        self.kinks: list[float] = []
        self.parameters = {
            name: torch.tensor(value, dtype=dtype, requires_grad=True) for name, value in initial.items()
        }
        embedding = config.get("embedding", {})
        exceptions = embedding.get("tables", {})
        default = embedding.get("pooling", "sum")
        self.pooling = {name: exceptions.get(name, {}).get("pooling", default) for name in architecture.tables}
        self.schedule = config.get("learning_rate", {})
        dense = config["optimizer"]
        sparse = embedding.get("optimizer", dense)
        self.optimizers = {
            name: Optimizer(**(sparse if name.startswith("table.") else dense)) for name in self.parameters
        }

    def train_step(self, batch: Batch) -> float:
        """One step on one global batch; the loss before the update."""
        self.step += 1
        for parameter in self.parameters.values():
            parameter.grad = None
        logits = predict(self.parameters, self.architecture, self.pooling, batch, self.kinks)
        loss = functional.binary_cross_entropy_with_logits(logits, batch.labels)
        loss.backward()
        for name, parameter in self.parameters.items():
            optimizer = self.optimizers[name]
            lr = learning_rate_at(self.step, optimizer.lr, self.schedule)
            rows = None
            if name.startswith("table."):
                rows = torch.unique(batch.tables[name.removeprefix("table.")].keys)
            gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            optimizer.update(parameter.data, gradient, self.step, lr, rows)
        return float(loss.detach())

    @torch.no_grad()
    def predict(self, batch: Batch) -> np.ndarray:
        """Probabilities [B]."""
        return torch.sigmoid(predict(self.parameters, self.architecture, self.pooling, batch)).numpy()

    def weights(self) -> dict[str, np.ndarray]:
        """Every parameter by name."""
        return {name: parameter.detach().numpy().copy() for name, parameter in self.parameters.items()}


def check_philox() -> None:
    """The known answers that the generator's authors publish (Random123, ``kat_vectors``)."""
    ones = 0xFFFFFFFF
    known = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones, ones, ones, ones), (ones, ones), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, key, answer in known:
        got = philox4x32_10(np.array([counter], dtype=np.uint64), key)[0]
        if tuple(int(word) for word in got) != answer:
            raise AssertionError(f"Philox of counter {counter} gives {got}, not {answer}")


def check_optimizers() -> None:
    """Compare the formulas with ``torch.optim``, and FTRL with its minimisation problem.

    Raises:
        AssertionError: a trajectory of 20 steps differs by more than 1e-12.
    """
    generator = torch.Generator().manual_seed(7)
    start = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    gradients = [torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(20)]
    lr = 0.05
    peers = {
        "sgd": lambda p: torch.optim.SGD(p, lr=lr),
        "momentum": lambda p: torch.optim.SGD(p, lr=lr, momentum=0.9),
        "adagrad": lambda p: torch.optim.Adagrad(p, lr=lr, eps=1e-8),
        "adam": lambda p: torch.optim.Adam(p, lr=lr, eps=1e-8),
    }
    for kind, make in peers.items():
        ours, theirs = start.clone(), start.clone().requires_grad_()
        own, peer = Optimizer(kind=kind, lr=lr), make([theirs])
        for step, gradient in enumerate(gradients, 1):
            own.update(ours, gradient, step, lr)
            theirs.grad = gradient.clone()
            peer.step()
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-12, atol=1e-12, msg=kind)
    # Row-wise Adagrad of one column is Adagrad, which ties its row mean to the checked form.
    narrow, wide = start[:, :1].clone(), start[:, :1].clone()
    by_row, by_value = Optimizer(kind="rowwise_adagrad", lr=lr), Optimizer(kind="adagrad", lr=lr)
    for step, gradient in enumerate(gradients, 1):
        by_row.update(narrow, gradient[:, :1], step, lr)
        by_value.update(wide, gradient[:, :1], step, lr)
    torch.testing.assert_close(narrow, wide, rtol=0.0, atol=0.0)
    _check_ftrl(start, gradients, lr)


def _check_ftrl(start: torch.Tensor, gradients: list[torch.Tensor], lr: float) -> None:
    """FTRL-proximal is the argmin of its own objective (McMahan et al., KDD 2013, section 3.1).

    ``sum_s g_s w + sum_s sigma_s / 2 (w - w_s)^2 + ((sqrt(n0) + beta) / (2 lr) + l2) w^2 + l1 |w|``;
    TensorFlow's ``l2`` is half of the paper's, and the initial accumulator n0 is a first, gradient-free
    summand. Found here by ternary search over the convex objective, without z.
    """
    n0, beta, l1, l2 = 0.1, 0.3, 0.4, 0.2
    own = Optimizer(kind="ftrl", lr=lr, ftrl_beta=beta, l1=l1, l2=l2)
    weight = start.clone()
    squares = torch.full_like(start, n0)
    summed, history = torch.zeros_like(start), []

    def objective(w: torch.Tensor) -> torch.Tensor:
        value = summed * w + ((n0**0.5 + beta) / (2 * lr) + l2) * w**2 + l1 * w.abs()
        for sigma, past in history:
            value = value + sigma / 2 * (w - past) ** 2
        return value

    for step, gradient in enumerate(gradients, 1):
        grown = squares + gradient**2
        history.append(((grown.sqrt() - squares.sqrt()) / lr, weight.clone()))
        squares, summed = grown, summed + gradient
        low, high = torch.full_like(start, -5.0), torch.full_like(start, 5.0)
        for _ in range(120):
            left, right = low + (high - low) / 3, high - (high - low) / 3
            keep_low = objective(left) <= objective(right)
            low, high = torch.where(keep_low, low, left), torch.where(keep_low, right, high)
        own.update(weight, gradient, step, lr)
        # A minimum's flatness hides half of the digits from a search by value.
        torch.testing.assert_close(weight, (low + high) / 2, rtol=1e-6, atol=1e-7)
