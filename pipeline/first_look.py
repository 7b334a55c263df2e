"""What a plan and its lists read of the data, in a thread while GPUs and their carriers get ready."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from dlrm.config import RunConfig
from embedding.jagged import Jagged
from pipeline.dataset import Dataset
from pipeline.planning import Calibration, calibrate, first_batches

_MOST_BATCHES = 64


class FirstLook:
    """Counts of the first batches, and the first rows themselves; each is read once."""

    def __init__(self, config: RunConfig, dataset: Dataset, *, threads: int = 1) -> None:
        """Read nothing yet.

        Args:
            config: of the run.
            dataset: of the run.
            threads: of this rank.
        """
        self._config, self._dataset, self._threads = config, dataset, threads
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="first look")
        self._begun: dict[str, Future[Any]] = {}

    def begin(self, *, counts: bool) -> None:
        """Read what will be asked for, behind the caller's back.

        Args:
            counts: the counts, too.
        """
        if counts:
            self._begin("counts", self._count)
        self._begin("rows", self._read)

    def counts(self) -> Calibration:
        """What the first ``embedding.calibration_batches`` batches tell about the tables.

        Raises:
            DataError: a row of them is wrong.
        """
        found: Calibration = self._begin("counts", self._count).result()
        return found

    def rows(self) -> list[Jagged]:
        """The first rows in training order, as many as the larger of a training and an evaluation batch has.

        Raises:
            DataError: one of them is wrong.
        """
        found: list[Jagged] = self._begin("rows", self._read).result()
        return found

    def wait(self) -> None:
        """Until all that was begun is read: whoever measures wants to be alone."""
        wait(self._begun.values())

    def _begin(self, name: str, work: Callable[[], Any]) -> Future[Any]:
        if name not in self._begun:
            self._begun[name] = self._pool.submit(work)
        return self._begun[name]

    def _count(self) -> Calibration:
        return calibrate(self._config, self._dataset, threads=self._threads)

    def _read(self) -> list[Jagged]:
        batch_size = self._config.data.batch_size
        batches = -(-max(batch_size, self._config.eval.batch_size) // batch_size)
        with first_batches(self._config, self._dataset, min(batches, _MOST_BATCHES)) as loader:
            return [batch.host.keys for batch in loader]
