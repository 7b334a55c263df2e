"""Metrics of scores that lie on a GPU: the CPU's, to the last bit where no logarithm is taken."""

from __future__ import annotations

import importlib
import math
import runpy
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlrm.device import HostDevice
from dlrm.errors import DataError
from embedding.comm import SingleComm
from pipeline.metrics import evaluate_scores
from pipeline.score_groups import count_bad_rows, groups_of_rows, groups_of_runs

TESTS = Path(__file__).parents[1] / "pipeline"
CASES = runpy.run_path(str(TESTS / "score_cases.py"))
KINDS, scored_rows, grouped = CASES["KINDS"], CASES["scored_rows"], CASES["grouped"]
on_ranks = runpy.run_path(str(TESTS / "thread_ranks.py"))["run_ranks"]

TOLERANCE = 1e-14
"""Of what is made of exponentials and logarithms, relative."""
REAL = ("log_loss", "normalized_entropy", "calibration")


class EmulatedDevice(HostDevice):
    """Stands for a GPU: its kernels are the emulated ones, its memory is not the host's."""

    def __init__(self) -> None:
        super().__init__(1, compiled=False)
        self._beside = HostDevice()
        self._turn = threading.Lock()

    @property
    def host(self) -> HostDevice:
        return self._beside

    def kernel(self, module: str, name: str) -> Any:
        launch = getattr(importlib.import_module(f"{module}_cuda"), name)

        def alone(*arguments: Any) -> None:
            with self._turn:  # the emulator has one set of threads
                launch(*arguments)

        return alone

    def empty(self, shape: Any, dtype: Any) -> Any:
        poisoned = super().empty(shape, dtype)
        poisoned.reshape(-1).view(np.uint8)[...] = 0xFF
        return poisoned

    def to_host(self, array: Any) -> Any:
        return array.copy()


@pytest.fixture
def device(machine: Any) -> Any:
    if machine.emulated:
        return EmulatedDevice()
    from dlrm.cuda import CudaDevice

    return CudaDevice()


def sizes_of(machine: Any) -> tuple[int, ...]:
    """Below, at and above a tile; large ones where a GPU runs them."""
    return (33, 4_500) if machine.emulated else (1, 33, 4_096, 4_097, 300_001)


def assert_alike(found: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    """Metrics and curves: real ones within the tolerance, everything else equal."""
    metrics, curves = found
    wanted, wanted_curves = expected
    for name in REAL:
        one, other = getattr(metrics, name), getattr(wanted, name)
        assert one == other or math.isclose(one, other, rel_tol=TOLERANCE), name
    assert replace(metrics, **dict.fromkeys(REAL)) == replace(wanted, **dict.fromkeys(REAL))
    mine, theirs = asdict(curves), asdict(wanted_curves)
    if theirs["calibration"] is not None:
        means, wanted_means = (values["calibration"].pop("mean_prediction") for values in (mine, theirs))
        np.testing.assert_allclose(means, wanted_means, rtol=TOLERANCE, atol=2.0**-59)  # terms are cut at 2^-60
    assert mine == theirs


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_and_curves_are_the_cpus(machine: Any, device: Any, kind: str, rng: np.random.Generator) -> None:
    for size in sizes_of(machine):
        scores, labels = scored_rows(kind, size, rng)
        expected = evaluate_scores(scores, labels, SingleComm())
        found = evaluate_scores(machine.array(scores), machine.array(labels), SingleComm(), device)
        assert_alike(found, expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_labels_may_be_integers(machine: Any, device: Any, dtype: Any, rng: np.random.Generator) -> None:
    scores, labels = scored_rows("tied", 700, rng)
    expected = evaluate_scores(scores, labels, SingleComm())
    assert_alike(
        evaluate_scores(machine.array(scores), machine.array(labels.astype(dtype)), SingleComm(), device), expected
    )


def test_groups_are_the_references(machine: Any, device: Any, rng: np.random.Generator) -> None:
    for kind in ("tied", "zeros of both signs") if machine.emulated else KINDS:
        for size in (1, 4_096, *sizes_of(machine)):
            scores, labels = scored_rows(kind, size, rng)
            found = groups_of_rows(machine.array(scores), machine.array(labels), np.int32, device)
            arrays = [machine.host(array) for array in (found.scores, found.rows_below, found.positives_below)]
            for array, wanted in zip(arrays, grouped(scores, labels), strict=True):
                np.testing.assert_array_equal(array, wanted)


@pytest.mark.parametrize("runs", [1, 2, 5])
def test_runs_of_several_ranks_become_one(machine: Any, device: Any, runs: int, rng: np.random.Generator) -> None:
    for kind in ("tied",) if machine.emulated else KINDS:
        scores, labels = scored_rows(kind, 5_000, rng)
        parts = np.split(np.arange(len(scores)), np.sort(rng.integers(0, len(scores), runs - 1)))
        own = [grouped(scores[part], labels[part]) for part in parts]
        counted = ((a, np.diff(b), np.diff(c)) for a, b, c in own)
        joined = [machine.array(np.concatenate(arrays)) for arrays in zip(*counted, strict=True)]
        found = groups_of_runs(*joined, [len(one[0]) for one in own], device)
        arrays = [machine.host(array) for array in (found.scores, found.rows_below, found.positives_below)]
        for array, wanted in zip(arrays, grouped(scores, labels), strict=True):
            np.testing.assert_array_equal(array, wanted)


class Settled:
    """Threads that copy each other's arrays, each on its own stream: once they are there, and as long as they are."""

    def __init__(self, comm: Any, device: Any) -> None:
        self._comm, self._device = comm, device

    def all_to_all_v(self, *arguments: Any) -> Any:
        self._device.record().synchronize()
        event = self._comm.all_to_all_v(*arguments)
        event.wait()
        self._device.record().synchronize()
        self._comm.barrier()
        return event


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("carried", [False, True], ids=["by way of the host", "from device to device"])
def test_ranks_change_no_bit(machine: Any, device: Any, size: int, carried: bool, rng: np.random.Generator) -> None:
    """One rank has no rows, and the others' share many scores."""
    scores, labels = scored_rows("tied", 3_000, rng)
    scores[:1_000] += rng.normal(size=1_000).astype(np.float32)
    cuts = np.sort(rng.integers(0, len(scores), size - 2)).tolist()
    parts = [np.arange(0), *np.split(rng.permutation(len(scores)), cuts)]
    arrays = [(machine.array(scores[part]), machine.array(labels[part])) for part in parts]
    whole = evaluate_scores(machine.array(scores), machine.array(labels), SingleComm(), device)
    ready = device.record()

    def work(comm: Any) -> Any:
        with device.on(f"rank {comm.rank}", (ready,)):
            return evaluate_scores(*arrays[comm.rank], comm, device, Settled(comm, device) if carried else None)

    for found in on_ranks(size, work):
        if isinstance(found, Exception):
            raise found
        assert found == whole
    assert_alike(whole, evaluate_scores(scores, labels, SingleComm()))


def test_no_rows_define_nothing(machine: Any, device: Any) -> None:
    nothing = np.empty(0, np.float32)
    found = evaluate_scores(machine.array(nothing), machine.array(nothing), SingleComm(), device)
    assert found == evaluate_scores(nothing, nothing, SingleComm())


def message(*arguments: Any) -> str:
    with pytest.raises(DataError) as error:
        evaluate_scores(*arguments)
    return str(error.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_no_numbers_are_refused_as_on_the_cpu(
    machine: Any, device: Any, bad: float, rng: np.random.Generator
) -> None:
    scores, labels = scored_rows("distinct", 3_000, rng)
    scores[rng.integers(0, 3_000, 5)] = bad
    expected = message(scores, labels, SingleComm())
    assert "are NaN or infinite" in expected
    assert message(machine.array(scores), machine.array(labels), SingleComm(), device) == expected


@pytest.mark.parametrize("bad", [2, -1, 0.5, math.nan])
def test_labels_other_than_0_and_1_are_refused_as_on_the_cpu(
    machine: Any, device: Any, bad: float, rng: np.random.Generator
) -> None:
    scores, labels = scored_rows("distinct", 3_000, rng)
    labels[rng.integers(3_000)] = bad
    expected = message(scores, labels, SingleComm())
    assert "1 of 3000 labels on rank 0 are neither 0 nor 1" in expected
    assert message(machine.array(scores), machine.array(labels), SingleComm(), device) == expected


def test_bad_rows_are_counted(machine: Any, device: Any, rng: np.random.Generator) -> None:
    scores, labels = scored_rows("distinct", 5_000, rng)
    bad = rng.permutation(5_000)
    scores[bad[:3]] = np.nan, np.inf, -np.inf
    labels[bad[:4]] = 2, -1, 0.5, np.nan
    assert count_bad_rows(machine.array(scores), machine.array(labels), device) == (3, 4)


def test_float64_scores_are_ranked_by_the_host(machine: Any, device: Any, rng: np.random.Generator) -> None:
    scores, labels = scored_rows("distinct", 500, rng, np.float64)
    found = evaluate_scores(machine.array(scores), machine.array(labels), SingleComm(), device)
    assert found == evaluate_scores(scores, labels, SingleComm())


def test_work_in_another_thread_is_behind_what_it_was_told_to_wait_for(
    machine: Any, device: Any, rng: np.random.Generator
) -> None:
    scores, labels = scored_rows("tied", 2_000, rng)
    place, truth = device.empty(2_000, np.float32), machine.array(labels)
    found = []

    def score(forward: Any) -> None:
        with device.on("scoring", (forward,)):
            found.append(evaluate_scores(place, truth, SingleComm(), device))

    device.upload(scores, place)
    thread = threading.Thread(target=score, args=(device.record(),))
    thread.start()
    thread.join()
    assert_alike(found[0], evaluate_scores(scores, labels, SingleComm()))
