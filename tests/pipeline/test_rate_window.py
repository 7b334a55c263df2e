"""Rates leave pauses, a process's first steps and steps that are done again out."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline import rate_window
from pipeline.rate_window import RateWindow


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves where it is told to."""

    class Clock:
        now = 0.0

        def perf_counter(self):
            return self.now

    monkeypatch.setattr(rate_window, "time", clock := Clock())
    return clock


def step(window, clock, samples, seconds, settle=lambda: None):
    window.add(samples)
    clock.now += seconds
    window.warm_up(samples, settle)


def test_samples_and_seconds_of_steps_alone(rng, clock):
    cold = int(rng.integers(1, 5))
    window = RateWindow(cold)
    settled = []

    def settle():
        settled.append(clock.now)
        clock.now += 7.0  # of the first steps too: whatever they left under way

    for _ in range(4):
        samples, seconds = rng.integers(1, 100, 12), rng.random(12)
        for i in range(12):
            step(window, clock, int(samples[i]), seconds[i], settle)
            with window.pause():
                clock.now += rng.random()
        counted, took = window.take()
        assert counted == samples[cold:].sum()
        np.testing.assert_allclose(took, seconds[cold:].sum(), rtol=0, atol=1e-9)
        assert len(settled) == 1
        cold = 0


def test_steps_done_again_count_once(rng, clock):
    window = RateWindow(1)
    step(window, clock, 5, 1.0)
    window.take()
    step(window, clock, 6, 2.0)
    window.add(int(lost := rng.integers(1, 100)))  # issued, and known to be unsound
    clock.now += 3.0
    window.take_back(int(lost))
    step(window, clock, 8, 1.0)
    assert window.take() == (14, 6.0)


def test_first_steps_done_again_begin_the_window_anew(clock):
    window = RateWindow(2)
    step(window, clock, 5, 1.0)
    window.add(6)
    clock.now += 3.0
    window.take_back(6)
    step(window, clock, 6, 1.0)
    step(window, clock, 7, 2.0)
    assert window.take() == (7, 2.0)
