"""Dot interaction: the dots of all pairs of a row's vectors, behind the bottom output.

Shapes: B rows, F vectors a row (the bottom output if there is one, then the tables), D embedding dim,
P = F (F - 1) / 2 pairs (i, j), j < i, rows first: (1,0), (2,0), (2,1), (3,0), ...; ``first`` is 1 if place 0 is
the bottom output, else 0.

Source: Naumov et al., "Deep Learning Recommendation Model for Personalization and Recommendation Systems"
(2019), section 2.1.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dlrm.device import Array, Device


def num_pairs(num_vectors: int) -> int:
    """P, the pairs of F vectors."""
    return num_vectors * (num_vectors - 1) // 2


def interaction_width(num_vectors: int, dim: int, first: int) -> int:
    """Columns of the interaction's output."""
    return first * dim + num_pairs(num_vectors)


def interaction_forward(vectors: Array, out: Array, *, first: int, device: Device) -> Array:
    """``out = [vectors[:, 0] if first] + [vectors_i . vectors_j for j < i]``.

    Args:
        vectors: [B, F, D].
        out: [B, first * D + P], written.
        first: 1 if place 0 is the bottom output, else 0.
        device: runs it.

    Returns:
        ``out``.
    """
    kernel = device.kernel(__name__, "interaction_forward")
    if kernel is not None:
        kernel(vectors, out, first)
        return out
    _, num_vectors, dim = vectors.shape
    lower_i, lower_j = np.tril_indices(num_vectors, -1)
    out[:, : first * dim] = vectors[:, 0] if first else 0
    out[:, first * dim :] = np.matmul(vectors, vectors.transpose(0, 2, 1))[:, lower_i, lower_j]
    return out


def interaction_backward(vectors: Array, grad_out: Array, grad_vectors: Array, *, first: int, device: Device) -> Array:
    """``grad_vectors_i = sum over j != i of grad_ij vectors_j``, and grad_out's first D columns on place 0.

    Args:
        vectors: [B, F, D].
        grad_out: [B, first * D + P].
        grad_vectors: [B, F, D], written.
        first: 1 if place 0 is the bottom output, else 0.
        device: runs it.

    Returns:
        ``grad_vectors``.
    """
    kernel = device.kernel(__name__, "interaction_backward")
    if kernel is not None:
        kernel(vectors, grad_out, grad_vectors, first)
        return grad_vectors
    rows, num_vectors, dim = vectors.shape
    lower_i, lower_j = np.tril_indices(num_vectors, -1)
    pairs = np.zeros((rows, num_vectors, num_vectors), vectors.dtype)
    pairs[:, lower_i, lower_j] = grad_out[:, first * dim :]
    pairs[:, lower_j, lower_i] = grad_out[:, first * dim :]
    np.matmul(pairs, vectors, out=grad_vectors)
    if first:
        grad_vectors[:, 0] += grad_out[:, :dim]
    return grad_vectors


def interaction_backward_relu(
    vectors: Array, grad_out: Array, grad_vectors: Array, *, first: int, device: Device
) -> Array:
    """``interaction_backward``, then the derivative of the ReLU that place 0 came out of.

    Args:
        vectors: [B, F, D].
        grad_out: [B, first * D + P].
        grad_vectors: [B, F, D], written; place 0 is 0 where ``vectors`` is not above 0.
        first: 1 if place 0 is the bottom output, else 0.
        device: runs it.

    Returns:
        ``grad_vectors``.
    """
    kernel = device.kernel(__name__, "interaction_backward_relu")
    if kernel is not None:
        kernel(vectors, grad_out, grad_vectors, first)
        return grad_vectors
    interaction_backward(vectors, grad_out, grad_vectors, first=first, device=device)
    if first:
        bottom = grad_vectors[:, 0]
        bottom[vectors[:, 0] <= 0] = 0
    return grad_vectors


def gather_interaction(
    bottom: Array,
    weight: Array,
    row_start: Array,
    keys: Array,
    num_rows: int,
    out: Array,
    *,
    first: int,
    device: Device,
) -> Array:
    """``interaction_forward`` of the tables' rows, which are not kept.

    Args:
        bottom: [B, >= D], place 0; not read if ``first`` is 0.
        weight: [R, D], the tables one after the other.
        row_start: [T] int64, first row of each table.
        keys: [T * B] int32 or int64, table-major, one a bag.
        num_rows: B.
        out: [B, first * D + P], written; its dtype is the one that is multiplied.
        first: 1 with a bottom output, else 0.
        device: runs it.

    Returns:
        ``out``.
    """
    kernel = device.kernel(__name__, "gather_interaction")
    if kernel is not None:
        kernel(bottom, weight, row_start, keys, num_rows, out, first)
        return out
    vectors = _gathered(bottom, weight, row_start, keys, num_rows, first, out.dtype, device)
    return interaction_forward(vectors, out, first=first, device=device)


def gather_interaction_backward(
    bottom: Array,
    weight: Array,
    row_start: Array,
    keys: Array,
    num_rows: int,
    grad_out: Array,
    grad_vectors: Array,
    *,
    first: int,
    device: Device,
) -> Array:
    """``interaction_backward_relu`` of the tables' rows, read once more: before anybody updates them.

    Args:
        bottom: as ``gather_interaction`` had it, as ``weight``, ``row_start``, ``keys`` and ``num_rows``.
        weight: [R, D].
        row_start: [T].
        keys: [T * B].
        num_rows: B.
        grad_out: [B, first * D + P]; its dtype is the one that is multiplied.
        grad_vectors: [B, F, D], written; place 0 is 0 where ``bottom`` is not above 0.
        first: 1 with a bottom output, else 0.
        device: runs it.

    Returns:
        ``grad_vectors``.
    """
    kernel = device.kernel(__name__, "gather_interaction_backward")
    if kernel is not None:
        kernel(bottom, weight, row_start, keys, num_rows, grad_out, grad_vectors, first)
        return grad_vectors
    vectors = _gathered(bottom, weight, row_start, keys, num_rows, first, grad_out.dtype, device)
    return interaction_backward_relu(vectors, grad_out, grad_vectors, first=first, device=device)


def listed_interaction(
    bottom: Array,
    weight: Array,
    come: Array,
    sources: Array,
    num_rows: int,
    out: Array,
    *,
    first: int,
    device: Device,
) -> Array:
    """``interaction_forward`` of rows of which some lie in tables here, and the others have come from elsewhere.

    Args:
        bottom: [B, >= D], place 0; not read if ``first`` is 0.
        weight: [R, D], the tables one after the other.
        come: [N, D] of the type of ``out``, what has come.
        sources: [T * B] int32, table-major: row i of ``weight``, or where it is negative row ``~i`` of ``come``.
        num_rows: B.
        out: [B, first * D + P], written; its dtype is the one that is multiplied.
        first: 1 with a bottom output, else 0.
        device: runs it.

    Returns:
        ``out``.
    """
    kernel = device.kernel(__name__, "listed_interaction")
    if kernel is not None:
        kernel(bottom, weight, come, sources, num_rows, out, first)
        return out
    vectors = _listed(bottom, weight, come, sources, num_rows, first, out.dtype, device)
    return interaction_forward(vectors, out, first=first, device=device)


def listed_interaction_backward(
    bottom: Array,
    weight: Array,
    come: Array,
    sources: Array,
    num_rows: int,
    grad_out: Array,
    grad_vectors: Array,
    slots: Array | None,
    own: Array,
    *,
    first: int,
    device: Device,
) -> Array:
    """``interaction_backward_relu`` of the rows of ``listed_interaction``, read once more.

    Args:
        bottom: as ``listed_interaction`` had it, as ``weight``, ``come``, ``sources`` and ``num_rows``.
        weight: [R, D].
        come: [N, D]; with ``slots`` gradients take the place of rows.
        sources: [T * B].
        num_rows: B.
        grad_out: [B, first * D + P]; its dtype is the one that is multiplied.
        grad_vectors: [B, F, D], written; place 0 is 0 where ``bottom`` is not above 0.
        slots: [T * B] int32: where a gradient goes instead: below N to that row of ``come``, which is then the vector's
            own, from N on to row ``slot - N`` of ``own``; negative: to ``grad_vectors``. ``None``: all go there.
        own: [M, D] of the type of ``come``.
        first: 1 with a bottom output, else 0.
        device: runs it.

    Returns:
        ``grad_vectors``.
    """
    kernel = device.kernel(__name__, "listed_interaction_backward")
    if kernel is not None:
        kernel(bottom, weight, come, sources, num_rows, grad_out, grad_vectors, slots, own, first)
        return grad_vectors
    vectors = _listed(bottom, weight, come, sources, num_rows, first, grad_out.dtype, device)
    gradients = interaction_backward_relu(vectors, grad_out, vectors.copy(), first=first, device=device)
    places = device.xp.full(sources.shape, -1) if slots is None else slots
    places = places.reshape(-1, num_rows).T
    if first:
        grad_vectors[:num_rows, 0] = gradients[:, 0]
    row, table = device.xp.nonzero(places < 0)
    grad_vectors[row, first + table] = gradients[row, first + table]
    for target, begin, end in ((come, 0, len(come)), (own, len(come), len(come) + len(own))):
        row, table = device.xp.nonzero((places >= begin) & (places < end))
        target[places[row, table] - begin] = gradients[row, first + table]
    return grad_vectors


def _listed(
    bottom: Array, weight: Array, come: Array, sources: Array, num_rows: int, first: int, dtype: Any, device: Device
) -> Array:
    here = sources.reshape(-1, num_rows)[..., None] >= 0
    items = sources.reshape(-1, num_rows)
    rows = weight[device.xp.where(items >= 0, items, 0)].astype(dtype)
    if len(come):
        rows = device.xp.where(here, rows, come[device.xp.where(items < 0, ~items, 0)])
    rows = rows.transpose(1, 0, 2)
    return device.xp.concatenate([bottom[:num_rows, None, : weight.shape[1]], rows], axis=1) if first else rows


def _gathered(
    bottom: Array, weight: Array, row_start: Array, keys: Array, num_rows: int, first: int, dtype: Any, device: Device
) -> Array:
    rows = weight[row_start[:, None] + keys.reshape(len(row_start), num_rows)].transpose(1, 0, 2).astype(dtype)
    dim = weight.shape[1]
    return device.xp.concatenate([bottom[:num_rows, None, :dim], rows], axis=1) if first else rows
