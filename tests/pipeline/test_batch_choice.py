"""The proposed global batch: against every candidate, one by one."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from dlrm.errors import ConfigError
from pipeline.batch_choice import NOTICEABLE, choose_batch, weigh_batch
from pipeline.row_order import steps_per_epoch
from service.commands import app


def waste_of(rows: int, batch: int, ranks: int, drop_last: bool) -> Fraction:
    """Step by step: rows that every rank could have taken, and those that it took."""
    places = trained = 0
    left = rows
    while left > 0 and not (drop_last and left < batch):
        taken = min(batch, left)
        shares = [batch // ranks + (rank < batch % ranks) for rank in range(ranks)]
        places += ranks * max(shares)
        trained += taken
        left -= taken
    empty = 1 - Fraction(trained, places) if places else Fraction(0)
    return empty + Fraction(left, rows)


@given(rows=st.integers(1, 900), batch=st.integers(1, 200), ranks=st.integers(1, 9), drop_last=st.booleans())
def test_waste_is_what_counting_every_step_gives(rows: int, batch: int, ranks: int, drop_last: bool) -> None:
    found = weigh_batch(rows, batch, ranks, drop_last=drop_last)
    assert found.waste == pytest.approx(float(waste_of(rows, batch, ranks, drop_last)), abs=1e-12)
    assert found.steps == steps_per_epoch(rows, batch, drop_last)
    assert 0 < found.last_share <= 1


@given(
    rows=st.integers(1, 2000), ranks=st.integers(1, 9), extra=st.integers(0, 150), percent=st.integers(1, 90),
    drop_last=st.booleans(),
)  # fmt: skip
def test_no_multiple_in_reach_is_noticeably_better_or_as_good_and_nearer(
    rows: int, ranks: int, extra: int, percent: int, drop_last: bool
) -> None:
    wished, within = ranks + extra, percent / 100
    found = choose_batch(rows, wished, ranks, within=within, drop_last=drop_last)
    low, high = wished * (1 - within), wished * (1 + within)
    near = [wished, *(b for b in range(ranks, 2 * wished, ranks) if low + 1e-6 < b < high - 1e-6)]
    wastes = {batch: float(waste_of(rows, batch, ranks, drop_last)) for batch in near}
    assert found.waste <= min(wastes.values()) + NOTICEABLE + 1e-12
    assert found.batch == wished or (found.batch % ranks == 0 and low - 1e-6 <= found.batch <= high + 1e-6)
    least = min(*wastes.values(), found.waste)  # rounding decides whether an end of the reach belongs to it
    nearer = [b for b in near if abs(b - wished) < abs(found.batch - wished)]
    assert all(wastes[batch] > least + NOTICEABLE - 1e-12 for batch in nearer)


def test_imagenet_on_527_nodes_of_128_rows_is_nearly_full() -> None:
    """The trick as MLPerf's ResNet runs used it: 1,281,167 images fill 19 steps of 527 x 128."""
    found = weigh_batch(1_281_167, 527 * 128, 527)
    assert found.steps == 19
    assert found.waste == pytest.approx(1 - 1_281_167 / (19 * 527 * 128), abs=1e-12)
    chosen = choose_batch(1_281_167, 65_536, 512, within=0.1)
    assert chosen.batch % 512 == 0
    assert chosen.waste < weigh_batch(1_281_167, 65_536, 512).waste - 0.01


def test_of_very_many_rows_the_wished_batch_is_kept() -> None:
    assert choose_batch(4_195_197_692, 65_536, 8, within=0.1).batch == 65_536


@pytest.mark.parametrize(("wished", "within"), [(3, 0.1), (64, 0.0), (64, 1.0), (64, math.nan)])
def test_what_cannot_be_is_refused(wished: int, within: float) -> None:
    with pytest.raises(ConfigError):
        choose_batch(1000, wished, 4, within=within)


def test_the_command_shows_training_and_evaluation(tmp_path: Any) -> None:
    config = tmp_path / "run.json"
    path = "synthetic:criteo-terabyte?rows=1000&scale=1000"
    values = {"data": {"path": path, "batch_size": 300}, "eval": {"split": "test", "batch_size": 128}}
    config.write_text(json.dumps(values))
    done = CliRunner().invoke(app, ["plan", str(config), "--batch", "--ranks", "4", "--json"])
    assert done.exit_code == 0, done.output
    shown = {row["split"]: row for row in json.loads(done.stdout)}
    train = shown["train"]
    assert (train["batch"], train["steps"]) == (300, -(-train["rows"] // 300))
    assert train["proposed"] % 4 == 0
    assert train["proposed_waste_percent"] <= train["waste_percent"]
