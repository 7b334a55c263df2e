"""How listed rows get from their owners to those who ask, and gradients back: every pair of ranks by itself.

Shapes: W ranks, C_o most rows that rank o sends to one other, D columns, B rows of this rank, F places of the vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from dlrm.device import Array, Device
from embedding.comm import Comm
from embedding.pair_lists import PairLists
from embedding.row_moves import move_rows


def call(device: Device, reference: Callable[..., Any], *arguments: Any, beside: str | None = None) -> None:
    """Run the device's form of a function, or the function itself.

    Args:
        device: where the arrays lie.
        reference: the plain form.
        *arguments: of either.
        beside: the module beside which the launch lies; ``None``: the function's own.
    """
    kernel = device.kernel(beside or reference.__module__, reference.__name__)
    (kernel or reference)(*arguments)


def travelling(comm: Comm, device: Device, shape: tuple[int, ...], dtype: Any) -> Array:
    """Zeros that are exchanged again and again: in memory that the carrier prefers, where it has any (``room``)."""
    make = getattr(comm, "room", None)
    found = None if make is None else make(shape, dtype)
    return device.zeros(shape, dtype) if found is None else found


class Route(Protocol):
    """One batch's way between the ranks.

    Attributes:
        keys: [n] int32, store rows that ``gradients`` are of; padded.
        gradients: [n, D], after ``inward``.
        own: the last so many of them are of this rank's own part of the batch.
        sent_rows: rows that leave this rank, outward and inward; by node, those that are passed on leave twice.
    """

    keys: Array
    gradients: Array
    own: int
    sent_rows: tuple[int, int]

    def prepare(self) -> None:
        """After the lists have been made."""

    def pack(self, weight: Array) -> None:
        """Put the rows that others ask for side by side."""

    def outward(self, vectors: Array | None) -> None:
        """Bring them to ``vectors`` [B * F, D] of those who ask; ``None``: only as far as ``FlatRoute.come``."""

    def inward(self, gradients: Array | None, scale: float, *, own: bool) -> None:
        """Bring the gradients [B * F, D], times ``scale``, to the owners; ``own``: those of this rank's rows too.

        ``None``: they are in ``FlatRoute.come`` and ``FlatRoute.own_gradients``.
        """


class FlatRoute:
    """Every pair of ranks has its own message.

    Attributes:
        come: [N, D], rows that have come from others in the order of ``asked``; later their gradients.
    """

    def __init__(self, lists: PairLists, comm: Comm, device: Device, dim: int, wire: Any) -> None:
        """Allocate.

        Args:
            lists: of the batch; chunks in the order of the ranks.
            comm: the ranks.
            device: holds everything.
            dim: D.
            wire: type of what travels.
        """
        self._lists, self._comm, self._device = lists, comm, device
        self._own = lists.capacities[comm.rank]
        self._others = (comm.size - 1) * self._own
        self.come = travelling(comm, device, (sum(lists.capacities) - self._own, dim), wire)
        self.keys, self.own = lists.given, self._own
        self.gradients = travelling(comm, device, (len(lists.given), dim), wire)  # and rows on their way out
        self.sent_rows = self._others, len(self.come)

    def prepare(self) -> None:
        """Nothing: the lists are all that it needs."""

    def pack(self, weight: Array) -> None:
        """See ``Route``."""
        given = self._lists.given[: self._others]
        call(self._device, move_rows, weight, given, self.gradients[: self._others], None)

    def outward(self, vectors: Array | None) -> None:
        """See ``Route``."""
        self._exchange(self.gradients, self.come, outward=True)
        if vectors is not None:
            call(self._device, move_rows, self.come, None, vectors, self._lists.asked[: len(self.come)])

    def inward(self, gradients: Array | None, scale: float, *, own: bool) -> None:
        """See ``Route``."""
        asked, others = self._lists.asked, len(self.come)
        if gradients is not None:
            call(self._device, move_rows, gradients, asked[:others], self.come, None, scale)
        if gradients is not None and own:
            call(self._device, move_rows, gradients, asked[others:], self.own_gradients, None, scale)
        self._exchange(self.come, self.gradients, outward=False)

    @property
    def own_gradients(self) -> Array:
        """The last ``own`` of ``gradients``."""
        return self.gradients[self._others :]

    def _exchange(self, send: Array, recv: Array, *, outward: bool) -> None:
        rank, size = self._comm.rank, self._comm.size
        own = [0 if other == rank else self._own for other in range(size)]
        others = [0 if other == rank else self._lists.capacities[other] for other in range(size)]
        exchange(self._comm, send, own if outward else others, recv, others if outward else own)


def exchange(comm: Comm, send: Array, going: Sequence[int], recv: Array, coming: Sequence[int]) -> None:
    """All-to-all of rows of any type; with the only rank nothing."""
    if comm.size > 1:
        comm.all_to_all_v(_bytes(send), going, _bytes(recv), coming).wait()


def _bytes(rows: Array) -> Array:
    """[n, D] as [n, bytes]: carriers know no 16-bit numbers."""
    return rows.view(np.uint8) if len(rows) else np.empty((0, rows.shape[1] * rows.dtype.itemsize), np.uint8)
