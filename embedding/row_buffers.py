"""What tables whose rows travel keep of one batch in flight.

Shapes: W ranks, K keys of this rank, M rows that it is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dlrm.device import Array
from embedding.buffers import BatchBuffers
from embedding.jagged import Jagged
from embedding.row_route import RowRoute


@dataclass(slots=True)
class RowBuffers(BatchBuffers):
    """One batch of tables whose rows travel.

    Attributes:
        keys: of this rank, used where they lie.
        slots: [K] slot of each key.
        asked: [W] rows asked of each owner.
        route: what this rank asks for and is asked for; ``None``: nothing travels.
        ids: [M] numbers, among this rank's rows, of those that it is asked for.
        touched: replicated rows of the global batch; ``None``: not found out.
    """

    keys: Jagged | None = None
    slots: Array = field(default_factory=lambda: np.empty(0, np.int32))
    asked: list[int] = field(default_factory=list)
    route: RowRoute | None = None
    ids: Array = field(default_factory=lambda: np.empty(0, np.int32))
    touched: Array | None = None
