"""Take records of Raw rows apart on the device: labels, dense columns, and keys in table-major order.

Shapes: G records that are read, of V 32-bit words; B of them are this rank's share; C dense columns with their padding;
T tables with one key each.
"""

from __future__ import annotations

import numpy as np

from dlrm.device import Array, Device
from pipeline.formats.record_files import RecordLayout


def split_records(
    records: Array,
    index: Array | None,
    num_rows: int,
    own: slice,
    layout: RecordLayout,
    table_rows: Array,
    labels: Array,
    dense: Array,
    keys: Array,
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
        table_rows: [T] int32.
        labels: [B or more] float32, written: 0 or 1.
        dense: [B or more, C] float32, float16 or bfloat16 (uint16), written; columns behind the layout's are 0.
        keys: [T * G or more] int32, written; a key outside its table becomes 0.
        fault: [1] int32; set to 1 + the place of a record whose label is neither 0 nor 1 or whose key lies outside its
            table, never cleared.
        device: runs it.
    """
    kernel = device.kernel(__name__, "split_records")
    if kernel is not None:
        kernel(records, index, num_rows, own, layout, table_rows, labels, dense, keys, fault)
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
    stored = chosen[:, layout.first_key :: layout.key_words].astype(np.int64)
    if layout.key_words == 2:
        stored += chosen[:, layout.first_key + 1 :: 2].astype(np.int64) << 32
    outside = (stored < 0) | (stored >= table_rows)
    stored[outside] = 0
    keys[: stored.size] = stored.T.reshape(-1)
    wrong = np.flatnonzero(outside.any(axis=1) | ((label != 0) & (label != layout.label_one)))
    if len(wrong):
        fault[0] = 1 + wrong[0]
