"""Where a run's batches come from: decoded columns for the CPU, records or their numbers for a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, TypedDict

from embedding.captured_bags import ExchangedBags
from pipeline.dataset import Split
from pipeline.device_feed import DeviceBatch, Origin, load_resident, make_origin, need_resident, open_feed
from pipeline.loader import LoadedBatch, Loader

if TYPE_CHECKING:
    from pipeline.engine import Engine

Batches = Iterator[LoadedBatch | DeviceBatch]

_SHARE_FOR_CACHE = 0.5
"""Of the GPU's free memory, for rows that are evaluated again and again."""


class _Order(TypedDict):
    """Which batches of a split, in which order: what a ``Loader`` and ``open_feed`` call by the same names."""

    rank: int
    ranks: int
    seed: int
    shuffle: bool
    drop_last: bool
    start_step: int
    stop_step: int | None
    epochs: int | None


class TrainingFeed:
    """This rank's batches of a run."""

    def __init__(self, engine: Engine, split: Split) -> None:
        """Bring the rows to the device where the config asks for it.

        Raises:
            DeviceError: they do not fit.
        """
        self._engine, self._split = engine, split
        data, device = engine.config.data, engine.device
        self._origin: Origin | None = None
        if engine.layout is not None:
            self._origin = need_resident(split, data, device) if data.on_device else None
            if self._origin is None:
                self._origin = make_origin(split, device, data.batch_size)

    def batches(self, start_step: int, stop_step: int) -> AbstractContextManager[Batches]:
        """Those of the steps behind ``start_step``, up to ``stop_step``."""
        config = self._engine.config
        return _batches(
            self._engine,
            self._split,
            self._origin,
            batch_size=config.data.batch_size,
            shuffle=config.data.shuffle,
            drop_last=config.data.drop_last,
            start_step=start_step,
            stop_step=stop_step,
            epochs=config.train.epochs,
        )


def evaluation_batches(
    engine: Engine, split: Split, batch_size: int, origin: Origin | None, only: int | None = None
) -> AbstractContextManager[Batches]:
    """This rank's batches of one pass over a split, in the order of its rows; or only one of them, from 0."""
    first, stop = (0, None) if only is None else (only, only + 1)
    return _batches(
        engine,
        split,
        origin,
        batch_size=batch_size,
        shuffle=False,
        drop_last=False,
        start_step=first,
        stop_step=stop,
        epochs=1,
    )


@contextmanager
def _batches(
    engine: Engine,
    split: Split,
    origin: Origin | None,
    *,
    batch_size: int,
    shuffle: bool,
    drop_last: bool,
    start_step: int,
    stop_step: int | None,
    epochs: int | None,
) -> Iterator[Batches]:
    """What both feeds take from the config, and decoded columns or records as the engine's device wants them."""
    data, comm = engine.config.data, engine.comm
    order = _Order(
        rank=comm.rank,
        ranks=comm.size,
        seed=engine.config.seed,
        shuffle=shuffle,
        drop_last=drop_last,
        start_step=start_step,
        stop_step=stop_step,
        epochs=epochs,
    )
    if engine.layout is not None:
        with open_feed(split, data, device=engine.device, origin=origin, batch_rows=batch_size, **order) as batches:
            yield batches
        return
    with Loader(
        split,
        batch_size=batch_size,
        window=data.shuffle_window if shuffle else batch_size,
        block=data.shuffle_block if shuffle else 1,
        prefetch=data.prefetch,
        readers=data.readers,
        # Where every rank makes lists of what travels, from all ranks' keys.
        global_keys=isinstance(engine.embedding, ExchangedBags),
        **order,
    ) as loader:
        yield iter(loader)


def evaluation_origin(engine: Engine, split: Split, batch_size: int) -> Origin | None:
    """Where a GPU finds the rows of a split that it evaluates: kept in its memory where they fit, made, or read."""
    if engine.layout is None:
        return None
    if engine.config.eval.cache:
        resident = load_resident(split, engine.config.data, engine.device, _SHARE_FOR_CACHE)
        if resident is not None:
            return resident
    return make_origin(split, engine.device, batch_size)
