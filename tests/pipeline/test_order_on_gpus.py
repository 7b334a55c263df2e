"""Proof of order of what GPUs make of the schedules' tables, whose stages read and write more there."""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.engine_cuda import fused_schedule, guarded, looking_up_beside
from pipeline.overlap import Schedule
from pipeline.schedule import (
    EVAL_FUSED,
    EVAL_OVERLAPPED,
    EVAL_SEQUENTIAL,
    TRAIN_EXCHANGED,
    TRAIN_OVERLAPPED,
    at_depth,
    ring_size,
)
from pipeline.stages import FIELDS, S

sys.path.insert(0, str(Path(__file__).parent))

from clocked_device import faults_of

DEPTHS = range(1, 5)
DYNAMIC = types.SimpleNamespace(dynamic=True)
TRAINING = {"one": TRAIN_OVERLAPPED, "several": TRAIN_EXCHANGED}


def without(rows, stage, wait):
    """The schedule with a wait deleted."""
    assert any(row.stage == stage and wait in row.after for row in rows)
    return tuple(
        replace(row, after=tuple(other for other in row.after if other != wait)) if row.stage == stage else row
        for row in rows
    )


def declare(monkeypatch, stage, reads="", writes=""):
    """Fields that a stage uses on GPUs besides those that it declares."""
    declared = FIELDS[stage]
    monkeypatch.setitem(FIELDS, stage, (declared[0] | set(reads.split()), declared[1] | set(writes.split())))


@pytest.fixture
def fused(monkeypatch):
    """In evaluations of one GPU the look-up crosses what it finds with the bottom layers' output."""
    declare(monkeypatch, S.lookup, reads="vectors.bottom", writes="activations.crossed")
    declare(monkeypatch, S.top_forward, reads="activations.crossed")


@pytest.mark.parametrize("batches", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("depth", DEPTHS)
def test_an_evaluation_with_look_up_and_interaction_as_one_kernel_is_in_order(fused, depth, batches):
    for rows in (at_depth(EVAL_OVERLAPPED, depth), EVAL_SEQUENTIAL):
        made = fused_schedule(Schedule(rows, ""))
        assert ring_size(made.rows) == ring_size(rows)
        assert made.overlapped == (ring_size(rows) > 1)
        assert faults_of(made.rows, batches) == []


def test_its_wait_cannot_be_deleted(fused):
    assert [(row.stage, row.after) for row in EVAL_FUSED if row.after] == [(S.input_dist, (S.upload,))]
    mutants = [without(at_depth(EVAL_FUSED, depth), S.input_dist, S.upload) for depth in DEPTHS[1:]]
    assert any(faults_of(rows, 9) for rows in mutants)


@pytest.fixture
def flagged(monkeypatch):
    """With dynamic loss scaling: the reduction finds whether all gradients are finite, and no update goes before."""
    declare(monkeypatch, S.reduce_bottom, reads="gradients.top grad_vectors.tables", writes="gradients.finite")
    declare(monkeypatch, S.sparse_update, reads="gradients.finite")
    declare(monkeypatch, S.dense_update, reads="gradients.finite")


@pytest.mark.parametrize("batches", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("gpus", TRAINING)
def test_no_table_is_updated_before_all_gradients_are_known_to_be_finite(flagged, gpus, depth, batches):
    rows = guarded(Schedule(at_depth(TRAINING[gpus], depth), ""), DYNAMIC).rows
    assert faults_of(rows, batches) == []


@pytest.mark.parametrize("gpus", TRAINING)
def test_the_guard_cannot_be_deleted(flagged, gpus):
    schedules = [guarded(Schedule(at_depth(TRAINING[gpus], depth), ""), DYNAMIC).rows for depth in DEPTHS]
    assert any(faults_of(without(rows, S.sparse_update, S.reduce_bottom), 9) for rows in schedules)
    assert any(faults_of(at_depth(TRAINING[gpus], depth), 9) for depth in DEPTHS)


@pytest.fixture
def finding(monkeypatch):
    """On several GPUs the interaction finds rows where they lie or have come to; gradients leave from there."""
    for stage in (S.top_forward, S.top_backward):
        declare(monkeypatch, stage, reads="embedding.keys embedding.rows")
    declare(monkeypatch, S.top_backward, writes="embedding.rows")


@pytest.mark.parametrize("batches", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("table", [TRAIN_EXCHANGED, EVAL_OVERLAPPED], ids=["train", "eval"])
def test_rows_are_found_once_they_have_come(finding, table, depth, batches):
    assert faults_of(at_depth(table, depth), batches) == []


@pytest.fixture
def beside(monkeypatch):
    """On several GPUs the bottom layers' stage looks the rows up that lie here, by the batch's lists."""
    declare(monkeypatch, S.bottom_forward, reads="keys embedding.keys weights.tables", writes="vectors.own")
    for stage in (S.top_forward, S.top_backward):
        declare(monkeypatch, stage, reads="vectors.own")


@pytest.mark.parametrize("batches", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("depth", DEPTHS)
def test_rows_of_a_gpus_own_are_not_stale(beside, depth, batches):
    assert faults_of(looking_up_beside(Schedule(at_depth(TRAIN_EXCHANGED, depth), "")).rows, batches) == []


def test_the_wait_for_the_lists_cannot_be_deleted(beside):
    schedules = [looking_up_beside(Schedule(at_depth(TRAIN_EXCHANGED, depth), "")).rows for depth in DEPTHS]
    assert any(faults_of(without(rows, S.bottom_forward, S.input_dist), 9) for rows in schedules)
