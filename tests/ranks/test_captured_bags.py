"""Bags over ranks that exchange lists of fixed capacity, on the CPU: threads."""

from __future__ import annotations

from typing import Any

import bag_exchange_cases as bc
import exchange_cases as xc
import numpy as np
import pytest
import rank_threads

from dlrm.device import HostDevice
from dlrm.errors import DataError


@pytest.mark.parametrize("case", bc.CASES, ids=lambda case: f"{case.seed}-{case.kind}")
def test_ranks_train_as_one(case: bc.BagCase) -> None:
    ranks = 2 + case.seed % 3 if case.nodes == 1 else 4
    outcomes = rank_threads.run_ranks(ranks, lambda comm: bc.train(case, comm))
    xc.check_all(case, outcomes, bc.run_alone(case))
    if case.short < 1:
        assert outcomes[0].overflows > 0
    elif not case.grows:
        assert outcomes[0].overflows == 0


def test_fresh_tables_and_batches(rng: np.random.Generator) -> None:
    case = bc.BagCase(
        seed=int(rng.integers(2**32)),
        rows=tuple(rng.integers(1, 300, 6).tolist()),
        hotness=tuple(rng.integers(1, 6, 6).tolist()),
        poolings=tuple(rng.choice(["sum", "mean", "concat"], 6).tolist()),
        kinds=tuple(rng.choice(["row_wise", "table_wise", "hybrid"], 6).tolist()),
        threshold=float(rng.random()),
        weighted=bool(rng.integers(2)),
        batches=tuple(rng.integers(1, 300, 3).tolist()),
        deterministic=bool(rng.integers(2)),
        first=int(rng.integers(2)),
    )
    outcomes = rank_threads.run_ranks(int(rng.integers(1, 6)), lambda comm: bc.train(case, comm))
    xc.check_all(case, outcomes, bc.run_alone(case))


def test_a_bag_that_is_not_full_is_refused_by_its_rank() -> None:
    case = bc.BagCase(seed=3)

    def work(comm: Any) -> None:
        trainer = bc.Trainer(case, comm, HostDevice(compiled=False))
        keys = trainer.work[0][0]
        assert keys.offsets is not None
        own = bc.part_of(keys, 0, 5)
        assert own.offsets is not None
        own.offsets[16:] -= 1  # of table 3 the first bag lacks a key
        own.keys = own.keys[:-1]
        trainer.embedding.take_bags(own, keys, trainer.flights[0])

    with pytest.raises(DataError, match=r"rank \d: table 't3': row 0 of .* holds 2 keys, .* concat every row holds 3"):
        rank_threads.run_ranks(2, work)
