"""Update the rows that a global batch touched.

A row's gradient is first summed over all its occurrences in the batch, in the order of the batch, and then used
once; rows that no bag names keep weight and state bit for bit. The formulas stand in ``docs/design.md``.

Shapes: T tables in one weight array of R rows, B bags a table, K keys, D columns, F places of the gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from dlrm.config import OptimizerConfig
from dlrm.device import Array, Device
from dlrm.scalars import SPARSE, UNSCALE, is_blocked

KINDS = ("sgd", "momentum", "adagrad", "rowwise_adagrad", "adam", "ftrl")
"""The compiled update knows a kind by its number here."""


@dataclass(frozen=True, slots=True)
class StateSpec:
    """One array of optimiser state.

    Attributes:
        name: as in ``docs/design.md``.
        per_row: one number a row instead of one a weight.
        start: initial value.
    """

    name: str
    per_row: bool = False
    start: float = 0.0


def state_specs(optimizer: OptimizerConfig) -> tuple[StateSpec, ...]:
    """The state that an optimiser keeps: none, one or two arrays."""
    match optimizer.kind:
        case "momentum":
            return (StateSpec("velocity"),)
        case "adagrad":
            return (StateSpec("accumulator", start=optimizer.accumulator_start),)
        case "rowwise_adagrad":
            return (StateSpec("accumulator", per_row=True, start=optimizer.accumulator_start),)
        case "adam":
            return (StateSpec("m"), StateSpec("v"))
        case "ftrl":
            return (StateSpec("n", start=optimizer.accumulator_start), StateSpec("z"))
        case _:
            return ()


def bytes_per_row(optimizer: OptimizerConfig, dim: int, itemsize: int) -> int:
    """Memory of one row of a table: weights, state and the 4 bytes that an update needs for itself."""
    return itemsize * (dim + sum(1 if item.per_row else dim for item in state_specs(optimizer))) + 4


def constants(optimizer: OptimizerConfig, lr: float, step: int) -> Array:
    """The numbers of one update: [8] float64, by kind.

    Args:
        optimizer: kind and constants.
        lr: learning rate of this step.
        step: t, from 1.
    """
    match optimizer.kind:
        case "momentum":
            values = [lr, optimizer.momentum]
        case "adagrad" | "rowwise_adagrad":
            values = [lr, optimizer.eps]
        case "adam":
            beta1, beta2 = optimizer.beta1, optimizer.beta2
            # Both corrections are taken out of the loop: lr m / (1 - b1^t) and 1 / sqrt(1 - b2^t). The differences
            # are for float32 readers, which cannot take 0.999 from 1 exactly enough.
            corrections = (lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step))
            values = [corrections[0], optimizer.eps, beta1, beta2, corrections[1], 1 - beta1, 1 - beta2]
        case "ftrl":
            values = [lr, optimizer.ftrl_beta, optimizer.l1, optimizer.l2]
        case _:
            values = [lr]
    return np.array(values + [0.0] * (8 - len(values)))


@dataclass(slots=True)
class UpdateScratch:
    """What an update needs for itself; one for all batches of a collection.

    Attributes:
        head: [R] int32, -1 between calls.
        following: [K or more] int32.
        bag: [K or more] int32.
        touched: [R] bool, rows that were updated since it was last cleared; ``None``: nobody asks.
    """

    head: Array
    following: Array
    bag: Array
    touched: Array | None = None

    @classmethod
    def create(cls, rows: int) -> UpdateScratch:
        """For tables of ``rows`` rows together."""
        return cls(np.full(rows, -1, np.int32), np.empty(0, np.int32), np.empty(0, np.int32))

    def track_touched(self) -> None:
        """Note from now on which rows are updated."""
        if self.touched is None:
            self.touched = np.zeros(len(self.head), np.bool_)

    def clear_touched(self) -> None:
        """Forget which rows were updated."""
        if self.touched is not None:
            self.touched.fill(False)

    def reserve(self, keys: int) -> None:
        """Make room for a batch of ``keys`` keys."""
        if len(self.following) < keys:
            self.following = np.empty(keys + keys // 4, np.int32)
            self.bag = np.empty(keys + keys // 4, np.int32)


def update_rows(
    optimizer: OptimizerConfig,
    weight: Array,
    state: dict[str, Array],
    row_start: Array,
    keys: Array,
    offsets: Array,
    key_weights: Array,
    mean: Array,
    place: Array,
    num_rows: int,
    gradients: Array,
    *,
    lr: float,
    step: int,
    scratch: UpdateScratch,
    device: Device,
) -> None:
    """Sum each touched row's gradient over its occurrences, then apply the optimiser once.

    An occurrence in bag b of table t contributes ``gradients[b, place[t]] * key_weight``, divided by the length of
    the bag where pooling is mean. The result does not depend on the number of threads: a row is summed by one of
    them, in the order of the batch.

    Args:
        optimizer: kind and constants.
        weight: [R, D] float32 or float64; changed.
        state: [R, D] or [R, 1] by name (``state_specs``); changed.
        row_start: [T] int64, first row of each table.
        keys: [K] int32 or int64, table-major.
        offsets: [T * B + 1] int64; empty for one key a bag.
        key_weights: [K] float32; empty for none.
        mean: [T] bool.
        place: [T] int64, where each table's gradient lies.
        num_rows: B.
        gradients: [B or more, F, D] C-contiguous, dtype of ``weight``.
        lr: learning rate of this step.
        step: t, from 1.
        scratch: room to work in.
        device: where the arrays lie.
    """
    if optimizer.kind == "ftrl" and not lr:
        return  # the formula divides by the rate; the dense side changes nothing then either
    if scratch.touched is not None:
        mark_touched(keys, offsets, row_start, num_rows, scratch.touched)
    kind = KINDS.index(optimizer.kind)
    numbers = constants(optimizer, lr, step)
    arrays = [*state.values(), weight[:0], weight[:0]]
    kernel = device.kernel(__name__, "update")
    if kernel is None:
        update(
            kind, numbers, weight, arrays[0], arrays[1], row_start, keys, offsets, key_weights, mean, place,
            num_rows, gradients,
        )  # fmt: skip
        return
    scratch.reserve(len(keys))
    tables, parts, of_parts, worker_end = share_work(offsets, len(row_start), num_rows, device.threads)
    kernel(
        kind, numbers, weight, arrays[0], arrays[1], row_start, keys, offsets, key_weights, mean, place,
        num_rows, gradients, scratch.head, scratch.following, scratch.bag, tables, parts, of_parts, worker_end,
    )  # fmt: skip


def mark_touched(keys: Array, offsets: Array, row_start: Array, num_rows: int, touched: Array) -> None:
    """Set ``touched`` [R] for every row that a bag names; arguments as of ``update_rows``. A key below 0 names none."""
    for table, start in enumerate(row_start.tolist()):
        begin, end = table * num_rows, (table + 1) * num_rows
        if len(offsets):
            begin, end = int(offsets[begin]), int(offsets[end])
        own = keys[begin:end]
        touched[start:][own[own >= 0]] = True


def share_work(offsets: Array, num_tables: int, num_rows: int, workers: int) -> tuple[Array, Array, Array, Array]:
    """``_share_out`` of a batch's keys among workers; B is not 0 where there are offsets."""
    if len(offsets) == 0:
        return _share_out((num_rows,) * num_tables, workers)
    return _share_out(tuple(np.diff(offsets[::num_rows]).tolist()), workers)


@lru_cache(maxsize=64)  # batches of one key a bag are all alike, and the loops cost more than a small update
def _share_out(keys: tuple[int, ...], workers: int) -> tuple[Array, Array, Array, Array]:
    """Share the keys out: each piece is the rows of a table with row % of_parts = part.

    Large tables are cut, then the largest piece goes to the worker with the least, and so on.

    Args:
        keys: of each table.
        workers: threads.

    Returns:
        tables, parts, of_parts: [pieces] int64, worker after worker.
        worker_end: [workers] int64, end of each worker's pieces.
    """
    # A table of up to half a worker's share stays whole: every part reads through all keys of its table.
    most = max(1, sum(keys) // (2 * workers))
    cut = [min(workers, max(1, -(-count // most))) if workers > 1 else 1 for count in keys]
    loads = [0] * workers
    pieces: list[list[tuple[int, int, int]]] = [[] for _ in range(workers)]
    for table in sorted(range(len(keys)), key=lambda t: -(keys[t] // cut[t])):
        for part in range(cut[table]):
            worker = loads.index(min(loads))
            loads[worker] += keys[table] // cut[table]
            pieces[worker].append((table, part, cut[table]))
    columns = np.array([piece for own in pieces for piece in own], np.int64).T.copy()
    return columns[0], columns[1], columns[2], np.cumsum([len(own) for own in pieces])


def update(
    kind: int,
    numbers: Array,
    weight: Array,
    first: Array,
    second: Array,
    row_start: Array,
    keys: Array,
    offsets: Array,
    key_weights: Array,
    mean: Array,
    place: Array,
    num_rows: int,
    gradients: Array,
    head: Any = None,  # noqa: ARG001 the compiled form's scratch
    following: Any = None,  # noqa: ARG001
    bag: Any = None,  # noqa: ARG001
    tables: Any = None,  # noqa: ARG001
    parts: Any = None,  # noqa: ARG001
    of_parts: Any = None,  # noqa: ARG001
    worker_end: Any = None,  # noqa: ARG001
) -> None:
    """The plain form of the compiled ``update``: ``update_rows`` with ``kind`` an index into ``KINDS``, ``numbers``
    from ``constants``, and the optimiser's state as ``first`` and ``second``, empty where it has none.
    """  # noqa: D205
    num_tables = len(row_start)
    if len(offsets) == 0:
        offsets = np.arange(num_tables * num_rows + 1)
    lengths = np.diff(offsets)
    bags = np.repeat(np.arange(num_tables * num_rows), lengths)
    table = bags // max(1, num_rows)
    factor = np.ones(len(keys), weight.dtype)
    if len(key_weights):
        factor *= key_weights
    factor /= np.where(mean[table], lengths[bags], 1).astype(weight.dtype)
    touched, slot = np.unique(row_start[table] + keys, return_inverse=True)
    gradient = np.zeros((len(touched), weight.shape[1]), weight.dtype)
    np.add.at(gradient, slot, gradients[bags % max(1, num_rows), place[table]] * factor[:, None])
    states = [array[touched] for array in (first, second) if len(array)]
    weight[touched], states = _apply(KINDS[kind], weight[touched], states, gradient, [float(x) for x in numbers])
    for array, values in zip((first, second), states, strict=False):
        array[touched] = values


def _apply(
    kind: str, weight: Array, states: list[Array], gradient: Array, numbers: list[float]
) -> tuple[Array, list[Array]]:
    lr = numbers[0]
    match kind:
        case "momentum":
            velocity = numbers[1] * states[0] + gradient
            return weight - lr * velocity, [velocity]
        case "adagrad" | "rowwise_adagrad":
            square = gradient * gradient
            total = states[0] + (square if kind == "adagrad" else square.mean(axis=1, keepdims=True))
            # A row whose gradient was 0 throughout divides 0 by eps, not by 0.
            return weight - lr * gradient / (np.sqrt(total) + numbers[1]), [total]
        case "adam":
            rate, eps, beta1, beta2, correction = numbers[:5]
            m = beta1 * states[0] + (1 - beta1) * gradient
            v = beta2 * states[1] + (1 - beta2) * gradient * gradient
            return weight - rate * m / (np.sqrt(v) * correction + eps), [m, v]
        case "ftrl":
            beta, l1, l2 = numbers[1:4]
            n = states[0] + gradient * gradient
            z = states[1] + gradient - (np.sqrt(n) - np.sqrt(states[0])) / lr * weight
            shrunk = -(z - np.sign(z) * l1) / ((beta + np.sqrt(n)) / lr + 2 * l2)
            return np.where(np.abs(z) <= l1, 0, shrunk).astype(weight.dtype), [n, z]
        case _:
            return weight - lr * gradient, []


def widened(array: Array) -> Array:
    """16-bit numbers as float32, wider ones as they are; uint16 holds the bits of bfloat16."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return array.astype(np.float32) if array.dtype == np.float16 else array


def sgd_one_hot(
    weight: Array,
    row_start: Array,
    keys: Array,
    place: Array,
    num_rows: int,
    gradients: Array,
    scalars: Array,
    guard: Array,
) -> None:
    """``weight[row_start[t] + keys[t, b]] -= lr / loss_scale * gradients[b, place[t]]``: SGD of one key a bag.

    Nothing is written when ``guard`` says that a gradient is not finite or an exchange ran over.

    Args:
        weight: [R, D] float32; changed.
        row_start: [T] int64, first row of each table.
        keys: [T * B] int32 or int64, table-major; one below 0 names no row.
        place: [T] int64, where each table's gradient lies.
        num_rows: B.
        gradients: [B or more, F, D] C-contiguous, times the loss scale.
        scalars: see ``dlrm.scalars``.
        guard: see ``dlrm.scalars``.
    """
    if is_blocked(guard):
        return
    rate = np.float32(scalars[SPARSE]) * np.float32(guard[UNSCALE])
    keys = keys.reshape(len(row_start), num_rows)
    for table in range(len(row_start)):
        named = keys[table] >= 0
        own = gradients[:num_rows, place[table]][named]
        np.subtract.at(weight, row_start[table] + keys[table][named], rate * widened(own).astype(weight.dtype))


def sgd_bags(
    weight: Array,
    row_start: Array,
    keys: Array,
    offsets: Array,
    key_weights: Array,
    mean: Array,
    place: Array,
    num_rows: int,
    gradients: Array,
    scalars: Array,
    guard: Array,
) -> None:
    """SGD of bags of keys for captured steps: ``update_rows`` with the rate at ``scalars[SPARSE]``.

    Nothing is written when ``guard`` says that a gradient is not finite or an exchange ran over.

    Args:
        weight: [R, D] float32; changed.
        row_start: [T] int64, first row of each table.
        keys: [K or more] int32 or int64, table-major.
        offsets: [T * B + 1] int64.
        key_weights: [K] float32; empty for none.
        mean: [T] bool.
        place: [T] int64, where each table's gradient lies.
        num_rows: B.
        gradients: [B or more, F, D] C-contiguous, times the loss scale.
        scalars: see ``dlrm.scalars``.
        guard: see ``dlrm.scalars``.
    """
    if is_blocked(guard):
        return
    scaled = gradients.astype(weight.dtype) * weight.dtype.type(guard[UNSCALE])
    none, numbers = weight[:0], scalars[SPARSE : SPARSE + 8]
    keys = keys[: int(offsets[-1])]
    update(0, numbers, weight, none, none, row_start, keys, offsets, key_weights, mean, place, num_rows, scaled)
