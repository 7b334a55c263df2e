"""Where a run's batches come from: decoded columns for the CPU, records or their numbers for a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pipeline.dataset import Split
from pipeline.device_feed import DeviceBatch, Origin, load_resident, make_origin, need_resident, open_feed
from pipeline.loader import LoadedBatch, Loader

if TYPE_CHECKING:
    from pipeline.engine import Engine

Batches = Iterator[LoadedBatch | DeviceBatch]

_SHARE_FOR_CACHE = 0.5
"""Of the GPU's free memory, for rows that are evaluated again and again."""


@contextmanager
def training_batches(engine: Engine, split: Split, *, start_step: int, stop_step: int) -> Iterator[Batches]:
    """This rank's batches of a run from ``start_step`` on."""
    config, comm = engine.config, engine.comm
    data = config.data
    if engine.layout is None:
        with Loader(
            split,
            batch_size=data.batch_size,
            rank=comm.rank,
            ranks=comm.size,
            seed=config.seed,
            shuffle=data.shuffle,
            window=data.shuffle_window,
            drop_last=data.drop_last,
            prefetch=data.prefetch,
            block=data.shuffle_block,
            readers=data.readers,
            start_step=start_step,
            stop_step=stop_step,
            epochs=config.train.epochs,
        ) as loader:
            yield iter(loader)
        return
    device = engine.device
    origin: Origin | None = need_resident(split, data, device) if data.on_device else None
    if origin is None:
        origin = make_origin(split, device, data.batch_size)
    with open_feed(
        split,
        data,
        device=device,
        origin=origin,
        batch_rows=data.batch_size,
        rank=comm.rank,
        ranks=comm.size,
        seed=config.seed,
        shuffle=data.shuffle,
        drop_last=data.drop_last,
        start_step=start_step,
        stop_step=stop_step,
        epochs=config.train.epochs,
    ) as batches:
        yield batches


@contextmanager
def evaluation_batches(engine: Engine, split: Split, batch_size: int, origin: Origin | None) -> Iterator[Batches]:
    """This rank's batches of one pass over a split, in the order of its rows."""
    comm, data = engine.comm, engine.config.data
    if engine.layout is None:
        with Loader(
            split,
            batch_size=batch_size,
            rank=comm.rank,
            ranks=comm.size,
            seed=engine.config.seed,
            shuffle=False,
            window=batch_size,
            drop_last=False,
            prefetch=data.prefetch,
            readers=data.readers,
            epochs=1,
        ) as loader:
            yield iter(loader)
        return
    with open_feed(
        split,
        data,
        device=engine.device,
        origin=origin,
        batch_rows=batch_size,
        rank=comm.rank,
        ranks=comm.size,
        seed=engine.config.seed,
        shuffle=False,
        drop_last=False,
        epochs=1,
    ) as batches:
        yield batches


def evaluation_origin(engine: Engine, split: Split, batch_size: int) -> Origin | None:
    """Where a GPU finds the rows of a split that it evaluates: kept in its memory where they fit, made, or read."""
    if engine.layout is None:
        return None
    if engine.config.eval.cache:
        resident = load_resident(split, engine.config.data, engine.device, _SHARE_FOR_CACHE)
        if resident is not None:
            return resident
    return make_origin(split, engine.device, batch_size)
