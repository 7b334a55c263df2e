"""Compiled sparse update: parallel, without the interpreter's lock; reference in ``sparse_optim.py``.

SGD applies one occurrence after the other, which asks for nothing but the rows. For the others, occurrences of a row
are chained in the order of the batch: ``head[row]`` holds the first, ``following[k]`` the next one. A backward pass
builds the chains, a forward pass meets each row at its first occurrence, sums along the chain and updates the row
once: every touched row and its state are read and written once, and nothing is sorted. A piece of work is the rows of
one table with ``row % of_parts == part``; a worker has several.
"""

from __future__ import annotations

import numba
import numpy as np

from embedding.lookup_numba import prefetch_row

SGD, MOMENTUM, ADAGRAD, ROWWISE_ADAGRAD, ADAM, FTRL = range(6)

_AHEAD = 8
"""Keys between asking for a row and using it: some hundred nanoseconds of work."""


@numba.njit(parallel=True, nogil=True, cache=True, error_model="numpy")
def update(  # type: ignore[no-untyped-def]
    kind, numbers, weight, first, second, row_start, keys, offsets, key_weights, mean, place, num_rows, gradients,
    head, following, bag, tables, parts, of_parts, worker_end,
):  # fmt: skip
    """See ``sparse_optim.update``."""
    for worker in numba.prange(len(worker_end)):
        for item in range(worker_end[worker - 1] if worker > 0 else 0, worker_end[worker]):
            table = tables[item]
            start = row_start[table]
            one_hot = len(offsets) == 0
            bags = offsets[:0] if one_hot else offsets[table * num_rows : (table + 1) * num_rows + 1]
            base = table * num_rows if one_hot else bags[0]
            end = base + num_rows if one_hot else bags[num_rows]
            own_keys = keys[base:end]
            own_weights = key_weights if len(key_weights) == 0 else key_weights[base:end]
            if kind == SGD:
                _descend(
                    numbers, weight, start, own_keys, bags, own_weights, mean[table], gradients, place[table],
                    num_rows, parts[item], of_parts[item],
                )  # fmt: skip
                continue
            own_bag = bag[base:end]
            own_following = following[base:end]
            own_head = head[start:]
            _chain(own_keys, bags, num_rows, parts[item], of_parts[item], own_head, own_following, own_bag)
            _walk(
                kind, numbers, weight[start:], first[start:], second[start:], own_keys, bags, own_weights, mean[table],
                gradients, place[table], parts[item], of_parts[item], own_head, own_following, own_bag,
            )  # fmt: skip


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _descend(  # type: ignore[no-untyped-def]
    numbers, weight, start, keys, bags, key_weights, mean, gradients, place, num_rows, part, of_parts
):
    """SGD is linear: occurrence after occurrence gives the same as their sum, but for rounding."""
    number = weight.dtype.type
    lr = number(numbers[0])
    address = weight.ctypes.data
    row_bytes = weight.shape[1] * weight.itemsize
    for b in range(num_rows):
        begin = b if len(bags) == 0 else bags[b] - bags[0]
        end = b + 1 if len(bags) == 0 else bags[b + 1] - bags[0]
        for k in range(begin, end):
            if k + _AHEAD < len(keys):
                prefetch_row(address, start + keys[k + _AHEAD], row_bytes)
            if of_parts > 1 and keys[k] % of_parts != part:
                continue
            rate = lr * number(key_weights[k]) if len(key_weights) > 0 else lr
            if mean:
                rate /= number(end - begin)
            row = start + keys[k]
            for d in range(weight.shape[1]):
                weight[row, d] -= rate * gradients[b, place, d]


@numba.njit(nogil=True, cache=True)
def _chain(keys, bags, num_rows, part, of_parts, head, following, bag):  # type: ignore[no-untyped-def]
    # Positions are relative to the table's first key, so that they fit 32 bits.
    for b in range(num_rows - 1, -1, -1):
        begin = b if len(bags) == 0 else bags[b] - bags[0]
        end = b + 1 if len(bags) == 0 else bags[b + 1] - bags[0]
        for k in range(end - 1, begin - 1, -1):
            key = keys[k]
            if of_parts == 1 or key % of_parts == part:
                following[k] = head[key]
                bag[k] = b
                head[key] = k


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _walk(  # type: ignore[no-untyped-def]
    kind, numbers, weight, first, second, keys, bags, key_weights, mean, gradients, place, part, of_parts, head,
    following, bag,
):  # fmt: skip
    total = np.empty(weight.shape[1], weight.dtype)
    divide = mean and len(bags) > 0
    address = weight.ctypes.data
    row_bytes = weight.shape[1] * weight.itemsize
    for k in range(len(keys)):
        row = keys[k]
        if k + _AHEAD < len(keys):
            prefetch_row(address, keys[k + _AHEAD], row_bytes)
        if (of_parts > 1 and row % of_parts != part) or head[row] != k:
            continue
        head[row] = -1
        _sum_chain(k, key_weights, divide, bags, gradients, place, following, bag, total)
        if kind == MOMENTUM:
            _momentum(weight, first, row, total, numbers)
        elif kind == ADAGRAD:
            _adagrad(weight, first, row, total, numbers)
        elif kind == ROWWISE_ADAGRAD:
            _rowwise_adagrad(weight, first, row, total, numbers)
        elif kind == ADAM:
            _adam(weight, first, second, row, total, numbers)
        else:
            _ftrl(weight, first, second, row, total, numbers)


@numba.njit(nogil=True, forceinline=True, cache=True, error_model="numpy")
def _sum_chain(k, key_weights, divide, bags, gradients, place, following, bag, total):  # type: ignore[no-untyped-def]
    factor = _factor(k, key_weights, divide, bags, bag, total)
    b = bag[k]
    for d in range(len(total)):
        total[d] = factor * gradients[b, place, d]
    k = following[k]
    while k >= 0:
        factor = _factor(k, key_weights, divide, bags, bag, total)
        b = bag[k]
        for d in range(len(total)):
            total[d] += factor * gradients[b, place, d]
        k = following[k]


@numba.njit(nogil=True, forceinline=True, cache=True, error_model="numpy")
def _factor(k, key_weights, divide, bags, bag, total):  # type: ignore[no-untyped-def]
    number = total.dtype.type
    factor = number(key_weights[k]) if len(key_weights) > 0 else number(1)
    if divide:
        factor /= number(bags[bag[k] + 1] - bags[bag[k]])
    return factor


# The functions below take whole arrays and a row: a view of the row would count references atomically, on one
# counter for all threads, which costs more than the arithmetic.


@numba.njit(nogil=True, forceinline=True, cache=True)
def _momentum(w, velocity, r, g, numbers):  # type: ignore[no-untyped-def]
    lr, mu = w.dtype.type(numbers[0]), w.dtype.type(numbers[1])
    for d in range(len(g)):
        velocity[r, d] = mu * velocity[r, d] + g[d]
        w[r, d] -= lr * velocity[r, d]


@numba.njit(nogil=True, forceinline=True, cache=True, error_model="numpy")
def _adagrad(w, accumulator, r, g, numbers):  # type: ignore[no-untyped-def]
    lr, eps = w.dtype.type(numbers[0]), w.dtype.type(numbers[1])
    for d in range(len(g)):
        a = accumulator[r, d] + g[d] * g[d]
        accumulator[r, d] = a
        w[r, d] -= lr * g[d] / (np.sqrt(a) + eps)


@numba.njit(nogil=True, forceinline=True, cache=True, fastmath={"reassoc"})
def _mean_square(g):  # type: ignore[no-untyped-def]
    # Reassociation lets the sum use vector registers; the order is fixed when this is compiled.
    total = g[0] * g[0]
    for d in range(1, len(g)):
        total += g[d] * g[d]
    return total / g.dtype.type(len(g))


@numba.njit(nogil=True, forceinline=True, cache=True, error_model="numpy")
def _rowwise_adagrad(w, accumulator, r, g, numbers):  # type: ignore[no-untyped-def]
    lr, eps = w.dtype.type(numbers[0]), w.dtype.type(numbers[1])
    accumulator[r, 0] += _mean_square(g)
    root = np.sqrt(accumulator[r, 0]) + eps
    for d in range(len(g)):
        w[r, d] -= lr * g[d] / root


@numba.njit(nogil=True, forceinline=True, cache=True, error_model="numpy")
def _adam(w, m, v, r, g, numbers):  # type: ignore[no-untyped-def]
    number = w.dtype.type
    rate, eps, correction = number(numbers[0]), number(numbers[1]), number(numbers[4])
    beta1, beta2 = number(numbers[2]), number(numbers[3])
    rest1, rest2 = number(1 - numbers[2]), number(1 - numbers[3])
    for d in range(len(g)):
        mean = beta1 * m[r, d] + rest1 * g[d]
        square = beta2 * v[r, d] + rest2 * g[d] * g[d]
        m[r, d] = mean
        v[r, d] = square
        w[r, d] -= rate * mean / (np.sqrt(square) * correction + eps)


@numba.njit(nogil=True, forceinline=True, cache=True, error_model="numpy")
def _ftrl(w, n, z, r, g, numbers):  # type: ignore[no-untyped-def]
    number = w.dtype.type
    lr, beta, l1, l2 = number(numbers[0]), number(numbers[1]), number(numbers[2]), number(numbers[3])
    for d in range(len(g)):
        before = np.sqrt(n[r, d])
        squares = n[r, d] + g[d] * g[d]
        after = np.sqrt(squares)
        linear = z[r, d] + (g[d] - (after - before) / lr * w[r, d])
        n[r, d] = squares
        z[r, d] = linear
        shrunk = -(linear - np.sign(linear) * l1) / ((beta + after) / lr + number(2) * l2)
        w[r, d] = shrunk if abs(linear) > l1 else number(0)
