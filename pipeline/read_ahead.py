"""Reads items ahead by background threads and hands them over in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

READERS = 2  # so that one may wait for the disk

Item = TypeVar("Item")


class ReadAhead(Generic[Item]):
    """Iterates over ``read(first)``, ``read(first + 1)``, ... in order, up to ``depth`` of them ahead.

    Nothing is read further ahead than that: a slow consumer holds the readers back. What a reader raises, the
    consumer gets in place of that item, and the iteration is over. A context manager; ``close`` ends the threads.
    """

    def __init__(
        self, read: Callable[[int], Item], *, first: int, stop: int | None, depth: int, threads: int, name: str
    ) -> None:
        """Reading starts with the first item that is asked for or ``with``.

        Args:
            read: gives an item by its number; is called on the threads, in ascending order of numbers.
            first: number of the first item.
            stop: number past the last item; ``None``: there is no end.
            depth: items read ahead, at least 1.
            threads: how many read at once.
            name: the threads' names start with it.
        """
        self._read_item = read
        self._next = first
        self._stop = stop
        self._depth = depth
        self._ring: deque[Future[Item]] = deque()
        self._readers = ThreadPoolExecutor(min(threads, depth), thread_name_prefix=name)
        self._closed = False

    def __iter__(self) -> Iterator[Item]:
        """The iterator itself: it goes over its items once."""
        return self

    def __next__(self) -> Item:
        """The next item; waits for it where it is not there yet.

        Raises:
            DataError: a row of it is wrong, or a file cannot be read.
        """
        self._fill()
        if not self._ring:
            raise StopIteration
        try:
            item = self._ring.popleft().result()
        except BaseException:
            self.close()
            raise
        self._fill()
        return item

    def close(self) -> None:
        """Stop reading and end the threads; iterating further gives nothing."""
        self._closed = True
        self._ring.clear()
        self._readers.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        """Start reading."""
        self._fill()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the threads."""
        self.close()

    def _fill(self) -> None:
        while not self._closed and len(self._ring) < self._depth and (self._stop is None or self._next < self._stop):
            self._ring.append(self._readers.submit(self._read_item, self._next))
            self._next += 1
