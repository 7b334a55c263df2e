"""Take records of Raw rows apart on the device: labels, dense columns, and bags of keys in table-major order.

Shapes: G records that are read, of V 32-bit words; B of them are this rank's share; C dense columns with their padding;
T tables with H key columns in all, whose bags make L vectors of a row; K keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dlrm.device import Array, Device
from embedding.placement import TableSpec
from pipeline.formats.record_files import RecordLayout

_SHARED_BYTES = 32 * 1024
"""Of a block's records, about."""
_MOST_ROWS = 64


@dataclass(frozen=True, slots=True)
class KeyColumns:
    """Which keys a record has, and what becomes of them; arrays on the device.

    Attributes:
        table_rows: [T] int32.
        column: [T + 1] int32: first key column of each table, and H.
        vector: [T + 1] int32: first vector of each table, and L; several where each key has one of its own
            (``concat``): such a table's keys are written key by key ([H_t, G]), those of others row by row.
        full: [T] int32: 1 where no key may be missing.
    """

    table_rows: Array
    column: Array
    vector: Array
    full: Array

    @classmethod
    def of(cls, layout: RecordLayout, specs: Sequence[TableSpec], device: Device, *, turned: bool) -> KeyColumns:
        """Those of a layout's tables; unless they are ``turned``, the keys of all are written row by row."""

        def words(numbers: Sequence[int]) -> Any:
            return device.upload(np.array(numbers, np.int32), device.empty(len(numbers), np.int32))

        def starts(counts: Sequence[int]) -> Any:
            return words(np.cumsum([0, *counts]).tolist())

        vectors = [spec.num_vectors if turned else 1 for spec in specs]
        full = [int(spec.bag_keys is not None) for spec in specs]
        return cls(words(layout.table_rows), starts(layout.hotness), starts(vectors), words(full))


@dataclass(frozen=True, slots=True)
class SplitKeys:
    """Where the keys of a batch are written; arrays on the device.

    Attributes:
        keys: [H * G or more] int32.
        offsets: [L * G + 1] int64; empty: every vector has one key.
        weights: [H * G or more] float32; empty: none.
        room: see ``counting_room``.
    """

    keys: Array
    offsets: Array
    weights: Array
    room: Array


def rows_of_block(layout: RecordLayout) -> int:
    """Records that a block of the GPU takes apart."""
    words = (layout.words | 1) + (len(layout.table_rows) if layout.missing else 0)
    return max(1, min(_MOST_ROWS, _SHARED_BYTES // (4 * words)))


def counting_room(layout: RecordLayout, num_rows: int) -> int:
    """Words that counting the keys of up to ``num_rows`` records takes."""
    tables = len(layout.table_rows)
    return tables * (-(-num_rows // rows_of_block(layout)) + 1) if layout.missing else 0


def split_records(
    records: Array,
    index: Array | None,
    num_rows: int,
    own: slice,
    layout: RecordLayout,
    columns: KeyColumns,
    labels: Array,
    dense: Array,
    out: SplitKeys,
    fault: Array,
    *,
    device: Device,
) -> None:
    """Write labels and dense columns of this rank's rows, and the keys of all.

    Args:
        records: [G or more, V] uint32.
        index: [G] int64, which of ``records``; ``None``: the first G.
        num_rows: G.
        own: which of the G are this rank's B.
        layout: where a record's columns are; see its ``splittable``.
        columns: of it.
        labels: [B or more] float32, written: 0 or 1.
        dense: [B or more, C] float32, float16 or bfloat16 (uint16), written; columns behind the layout's are 0.
        out: written; a key outside its table becomes 0, and one that is missing where it must not be.
        fault: [1] int32; set to 1 + the place of a record whose label is neither 0 nor 1, whose key lies outside its
            table, or is missing where every bag has to be full, or whose weight is not finite; never cleared.
        device: runs it.
    """
    kernel = device.kernel(__name__, "split_records")
    if kernel is not None:
        kernel(records, index, num_rows, own, layout, columns, labels, dense, out, fault)
        return
    chosen = records[:num_rows] if index is None else records[index[:num_rows]]
    count = own.stop - own.start
    label = chosen[:, 0]
    labels[:count] = label[own] == layout.label_one
    words = np.ascontiguousarray(chosen[own, 1 : layout.first_key])
    wide = layout.dense_transform == "log1p_at_read"
    values = np.log1p(np.maximum(words.view(np.int32), 0).astype(np.float32)) if wide else words.view(np.float32)
    dense[:count] = 0
    device.convert(values, dense[:count, : layout.num_dense])
    wrong = (label != 0) & (label != layout.label_one) | _split_keys(chosen, layout, columns, out)
    if wrong.any():
        fault[0] = 1 + np.flatnonzero(wrong)[0]


def _split_keys(chosen: Array, layout: RecordLayout, columns: KeyColumns, out: SplitKeys) -> Array:
    """Write the keys of records [G, V]; which records are wrong."""
    rows, tables = len(chosen), len(columns.table_rows)
    stop = layout.first_key + layout.key_words * sum(layout.hotness)
    stored = chosen[:, layout.first_key : stop : layout.key_words].astype(np.int64)
    if layout.key_words == 2:
        stored += chosen[:, layout.first_key + 1 : stop : 2].astype(np.int64) << 32
    else:
        stored = stored.astype(np.int32).astype(np.int64)
    weights = np.ascontiguousarray(chosen[:, stop:]).view(np.float32) if layout.weighted else None
    wrong, at, offsets = np.zeros(rows, np.bool_), 0, [np.zeros(1, np.int64)]
    for table in range(tables):
        part = slice(int(columns.column[table]), int(columns.column[table + 1]))
        turned = columns.vector[table + 1] - columns.vector[table] > 1
        own = stored[:, part]
        there = (own != -1) | bool(columns.full[table] or not layout.missing)
        outside = there & ((own < 0) | (own >= columns.table_rows[table]))
        own[outside] = 0
        wrong |= outside.any(axis=1)
        if turned:
            own, there = own.T, there.T
        found = own[there]
        out.keys[at : at + len(found)] = found
        if weights is not None:
            own_weights = weights[:, part].T if turned else weights[:, part]
            out.weights[at : at + len(found)] = own_weights[there]
            wrong |= (~np.isfinite(weights[:, part]) & (there.T if turned else there)).any(axis=1)
        lengths = np.ones(there.size, np.int64) if turned else there.sum(axis=1)
        offsets.append(at + np.cumsum(lengths))
        at += len(found)
    if len(out.offsets):
        out.offsets[...] = np.concatenate(offsets)
    return wrong
