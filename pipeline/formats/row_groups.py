"""Decoded row groups of column-wise files, each decoded once while rows are drawn from it.

Shapes: R rows of a group, V 32-bit words a row.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.int32]

_PATIENCE = 32
"""Calls after which a group that nobody asks for is let go: readers are a few batches apart, two calls a batch."""
_WINDOWS = 2  # this one and the next


class RowGroups:
    """Gives groups by number, some of them decoded ahead on a thread of its own.

    Held are the groups of the last two ranges that were announced, or without announcements those behind the ones
    asked for last; others go once they have not been asked for during a few calls. What is held changes how long a
    call takes and never what it gives. Safe from several threads at once.
    """

    def __init__(self, decode: Callable[[int], Words], count: int) -> None:
        """Nothing is decoded yet.

        Args:
            decode: gives the rows [R, V] of a group.
            count: groups in all.
        """
        self._decode = decode
        self._count = count
        self._lock = threading.Lock()
        self._held: dict[int, Future[Words]] = {}
        self._used: dict[int, int] = {}
        self._announced: list[range] = []
        self._next = range(0)
        self._turn = 0
        self._waiting: list[int] = []
        self._busy = False
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="row groups")

    @property
    def num_held(self) -> int:
        """Groups that are in memory or on their way."""
        return len(self._held)

    def get(self, groups: Sequence[int]) -> list[Words]:
        """Groups in ascending order; waits for, or decodes, those that are not there.

        Raises:
            DataError: what ``decode`` raised.
        """
        with self._lock:
            self._turn += 1
            if not self._announced and groups:
                first = groups[-1] + 1
                self._next = range(first, min(first + len(groups), self._count))
            self._let_go()
            self._decode_ahead(self._next)
        return [self._one(group) for group in groups]

    def announce(self, groups: range) -> None:
        """Have groups decoded ahead and held until two further ranges have been announced; returns at once."""
        with self._lock:
            if groups in self._announced:
                self._announced.remove(groups)
            self._announced = [*self._announced, groups][-_WINDOWS:]
            self._next = range(0)
            self._decode_ahead(groups)

    def _one(self, group: int) -> Words:
        with self._lock:
            future = self._held.get(group)
            # One that only waits for the thread is decoded here: several readers are faster than one thread.
            mine = future is None
            if future is None:
                future = self._begin(group)
            self._used[group] = self._turn
        if mine:
            self._fill(group, future)
        try:
            return future.result()
        except BaseException:
            with self._lock:
                if self._held.get(group) is future:
                    self._drop(group)
            raise

    def _begin(self, group: int) -> Future[Words]:
        future = self._held[group] = Future()
        self._used[group] = self._turn
        return future

    def _fill(self, group: int, future: Future[Words]) -> None:
        try:
            words = self._decode(group)
        except BaseException as error:  # noqa: BLE001  whoever asked for the group gets it
            future.set_exception(error)
        else:
            future.set_result(words)

    def _decode_ahead(self, groups: range) -> None:
        self._waiting += [group for group in groups if group not in self._waiting]
        self._feed()

    def _feed(self) -> None:
        """Give the thread the next group; it never has more than one, so that the process can end at any time."""
        while self._waiting and not self._busy:
            group = self._waiting.pop(0)
            if group in self._held:
                continue
            future = self._begin(group)
            try:
                self._ahead.submit(self._work, group, future)
                self._busy = True
            except RuntimeError:  # the interpreter is ending
                self._drop(group)

    def _work(self, group: int, future: Future[Words]) -> None:
        self._fill(group, future)
        with self._lock:
            self._busy = False
            self._feed()

    def _let_go(self) -> None:
        kept: list[Any] = [*self._announced, self._next]
        self._waiting = [group for group in self._waiting if any(group in wanted for wanted in kept)]
        for group in list(self._held):
            if self._turn - self._used[group] > _PATIENCE and not any(group in wanted for wanted in kept):
                self._drop(group)

    def _drop(self, group: int) -> None:
        del self._held[group], self._used[group]
