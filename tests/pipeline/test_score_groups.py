"""Compiled functions over groups of equal scores beside their references, and both beside NumPy's own functions."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

from dlrm.device import HostDevice
from pipeline import score_sums
from pipeline.score_groups import Groups, count_bad_rows, groups_of_rows, groups_of_runs

CASES = runpy.run_path(str(Path(__file__).with_name("score_cases.py")))
KINDS, scored_rows, grouped = CASES["KINDS"], CASES["scored_rows"], CASES["grouped"]
DEVICES = {"compiled": HostDevice(), "reference": HostDevice(compiled=False)}
SIZES = [1, 2, 33, 4_000]


def assert_groups(found: Groups, expected) -> None:
    for array, wanted in zip((found.scores, found.rows_below, found.positives_below), expected, strict=True):
        assert array.dtype == wanted.dtype
        np.testing.assert_array_equal(array, wanted)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_rows_become_groups(device, kind, size, rng) -> None:
    for dtype in (np.float32, np.float64):
        for count_type in (np.int32, np.int64):
            scores, labels = scored_rows(kind, size, rng, dtype)
            kept = scores.copy(), labels.copy()
            assert_groups(groups_of_rows(scores, labels, count_type, device), grouped(scores, labels, count_type))
            np.testing.assert_array_equal((scores, labels), kept)


@pytest.mark.parametrize("runs", [1, 2, 5])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_runs_of_several_ranks_become_one(device, kind, runs, rng) -> None:
    scores, labels = scored_rows(kind, 3_000, rng)
    parts = np.split(np.arange(len(scores)), np.sort(rng.integers(0, len(scores), runs - 1)))
    own = [grouped(scores[part], labels[part]) for part in parts]
    joined = [np.concatenate(arrays) for arrays in zip(*((a, np.diff(b), np.diff(c)) for a, b, c in own), strict=True)]
    found = groups_of_runs(*joined, [len(one[0]) for one in own], device)
    assert_groups(found, grouped(scores, labels))


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_nothing_is_no_group(device) -> None:
    nothing = np.empty(0, np.float32)
    for found in (
        groups_of_rows(nothing, nothing, np.int32, device),
        groups_of_runs(nothing, np.empty(0, np.int32), np.empty(0, np.int32), [0, 0], device),
    ):
        assert_groups(found, (nothing, np.zeros(1, np.int32), np.zeros(1, np.int32)))


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_bad_rows_are_counted(device, rng) -> None:
    scores, labels = scored_rows("distinct", 5_000, rng)
    bad = rng.permutation(5_000)
    scores[bad[:3]] = np.nan, np.inf, -np.inf
    labels[bad[:4]] = 2, -1, 0.5, np.nan
    assert count_bad_rows(scores, labels, device) == (3, 4)


def sums_of(groups: Groups, rng: np.random.Generator, device) -> tuple[list, list]:
    """Whatever is summed over groups that are the middle ones of three ranks': exact results, and real sums."""
    before, above = int(rng.integers(100)), (int(rng.integers(50)), int(rng.integers(50)))
    rows, ones = int(groups.rows_below[-1]), int(groups.positives_below[-1])
    totals = (ones + above[0] + 1, rows - ones + above[1] + 1)
    low, high = np.sort(rng.normal(-2, 2, 2)).tolist()
    ends = score_sums.class_ends(groups, device)
    shrink = 0.25 / (1 + max(abs(float(score)) for score in groups.scores))
    losses = score_sums.loss_sums(groups, shrink, device)
    bins = np.array(score_sums.bin_sums(groups, before, before + rows + sum(above), 20, device), object).reshape(20, 4)
    exact = [
        score_sums.rank_statistic(groups, device),
        ends,
        losses[2],
        bins[:, :2].tolist(),
        score_sums.histogram_sums(groups, low, high, 50, device),
        score_sums.precision_sums(groups, above, device),
        score_sums.curve_points(groups, above, totals, (199, 199), device),
        [score_sums.score_at(groups, position, device) for position in (0, rows // 2, rows - 1)],
    ]
    limb = int(score_sums.LIMB)
    return exact, [losses[0] * limb + losses[1], *(bins[:, 2] * limb + bins[:, 3])]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_sums_are_the_references(kind, size, rng, seed) -> None:
    for dtype in (np.float32, np.float64):
        groups = Groups(*grouped(*scored_rows(kind, size, rng, dtype)))
        (exact, real), (wanted, wanted_real) = (
            sums_of(groups, np.random.default_rng(seed), device) for device in DEVICES.values()
        )
        assert exact == wanted
        for one, other in zip(real, wanted_real, strict=True):
            # exp and log1p of two libraries; a term is cut at 2^-60.
            assert abs(one - other) <= 1e-14 * other + 2 * size


def test_the_rank_statistic_is_the_share_of_pairs_in_order(rng) -> None:
    scores, labels = scored_rows("tied", 400, rng)
    ones, zeros = scores[labels == 1][:, None], scores[labels == 0][None, :]
    doubled = 2 * (ones > zeros).sum() + (ones == zeros).sum()
    for device in DEVICES.values():
        assert score_sums.rank_statistic(groups_of_rows(scores, labels, np.int32, device), device) == doubled
