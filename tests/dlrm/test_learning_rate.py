"""Phases of the learning rate."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlrm.config import LearningRateConfig
from dlrm.learning_rate import learning_rate


def test_left_out_config_multiplies_nothing():
    config = LearningRateConfig()
    assert [learning_rate(config, 0.3, step) for step in (1, 2, 10**6)] == [0.3] * 3


def test_phases_of_mlperf():
    config = LearningRateConfig(warmup_steps=2750, decay_start=49_315, decay_steps=27_772, decay_power=2.0, end_lr=0.1)
    lr = {
        step: learning_rate(config, 24.0, step)
        for step in (1, 1375, 2750, 2751, 49_315, 49_316, 63_201, 77_087, 90_000)
    }
    assert lr[1] == pytest.approx(24 / 2750, rel=1e-15)
    assert lr[1375] == pytest.approx(12, rel=1e-15)
    assert lr[2750] == lr[2751] == lr[49_315] == 24.0
    assert lr[49_316] == pytest.approx(24 * (27_771 / 27_772) ** 2, rel=1e-15)
    assert lr[63_201] == pytest.approx(6, rel=1e-15)
    assert lr[77_087] == lr[90_000] == 0.1


def test_end_rate_is_a_floor_during_the_decay():
    config = LearningRateConfig(decay_start=1, decay_steps=10, decay_power=1.0, end_lr=0.5)
    assert [learning_rate(config, 1.0, step) for step in (1, 2, 5, 6, 7, 11, 12)] == pytest.approx(
        [1.0, 0.9, 0.6, 0.5, 0.5, 0.5, 0.5]
    )


@given(
    warmup=st.integers(0, 50),
    plateau=st.integers(1, 50),
    steps=st.integers(1, 50),
    power=st.floats(0.25, 4),
    step=st.integers(1, 200),
)
def test_rises_then_falls_within_its_bounds(warmup, plateau, steps, power, step):
    config = LearningRateConfig(
        warmup_steps=warmup, decay_start=warmup + plateau, decay_steps=steps, decay_power=power, end_lr=0.01
    )
    now, after = learning_rate(config, 2.0, step), learning_rate(config, 2.0, step + 1)
    assert 0 < now <= 2.0
    assert after >= now if step < warmup else after <= now
    if step > warmup:
        assert now >= 0.01
