"""What tables over several GPUs keep of one batch in flight.

Shapes: T tables, G rows of the global batch, W ranks, D columns, C_o most rows that rank o sends to one other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dlrm.device import Array, Device
from dlrm.scalars import UNSCALE
from embedding.buffers import BatchBuffers
from embedding.captured_update import CapturedUpdate
from embedding.exchange_route import Route
from embedding.pair_lists import PairLists
from embedding.row_sort import RowSort
from embedding.touched_rows import TouchedRows
from embedding.wire import Precision

_WIRE_TYPES: dict[Precision, Any] = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16}


@dataclass(slots=True, kw_only=True)
class GroupBuffers(BatchBuffers):
    """What one group of tables keeps of a batch in flight.

    Attributes:
        keys: [T * G] int32 of the device, table-major, of all groups.
        places: [T * G], where tables list their frequent rows: the same as places (``frequent_rows``).
        lists: what travels.
        route: how it travels.
        update: of this rank's own rows; ``None``: forward only.
        order: of the replicated rows' keys, where sums have an order.
        touched: the replicated rows whose gradients are summed over the ranks; ``None``: all.
        guard: what ``update`` is told of the guard.
        exact: lists are as long as they have to be.
        factor: how many times as long as expected to be enough they were made.
    """

    keys: Array
    lists: PairLists
    route: Route
    update: CapturedUpdate | None = None
    order: RowSort | None = None
    touched: TouchedRows | None = None
    guard: Array = None
    exact: bool = False
    factor: float = 1.0
    places: Array = None

    @property
    def named(self) -> Array:
        """What says where rows lie: the keys, or their places."""
        return self.keys if self.places is None else self.places

    @property
    def listed(self) -> bool:
        """Whether rows are not put into the vectors: whoever reads them finds them by ``lists.sources``."""
        return len(self.lists.sources) > 0

    def scale(self, ranks: int) -> float:
        """Factor of gradients on their way: fp16 has too few small numbers for those of fp32 without a loss scale."""
        if self.route.gradients.dtype != np.float16 or self.vectors.dtype == np.float16:
            return 1.0
        return float(1 << ((self.capacity * ranks).bit_length() - 1))

    def told(self, guard: Array, ranks: int, device: Device) -> Array:
        """What ``update`` is told of the guard: gradients that have travelled are ``scale`` times as large."""
        scale = self.scale(ranks)
        if scale == 1.0:
            return guard
        self.guard[...] = guard
        unscale = self.guard[UNSCALE : UNSCALE + 1]
        device.xp.multiply(unscale, np.float32(1.0 / scale), out=unscale)
        return self.guard


@dataclass(slots=True, kw_only=True)
class ExchangeBuffers(BatchBuffers):
    """One batch in flight.

    Attributes:
        keys: [T * G] int32 or int64 of the device, table-major; written by whoever uploads the batch.
        groups: what each group of tables keeps of it.
    """

    keys: Array
    groups: tuple[GroupBuffers, ...]

    def begin(self, rows: int, global_rows: int) -> None:
        """See ``BatchBuffers``."""
        BatchBuffers.begin(self, rows, global_rows)
        for group in self.groups:
            group.begin(rows, global_rows)

    @property
    def lists(self) -> PairLists:
        """What travels of the first group; once rows have travelled, its ``flag`` is that of all."""
        return self.groups[0].lists

    @property
    def route(self) -> Route:
        """How it travels."""
        return self.groups[0].route


def wire_type(precision: Precision, vectors: Any) -> Any:
    """The type of what travels: that of the vectors, unless the precision has fewer bits."""
    wire = np.dtype(_WIRE_TYPES[precision])
    return wire if wire.itemsize < np.dtype(vectors).itemsize else np.dtype(vectors)
