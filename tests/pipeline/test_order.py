"""Proof of order: no schedule reads a field before it is written or overwrites it before its last read."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.schedule import (
    EVAL_OVERLAPPED,
    EVAL_SEQUENTIAL,
    TRAIN_EXCHANGED,
    TRAIN_OVERLAPPED,
    TRAIN_SEQUENTIAL,
    at_depth,
    ring_size,
)
from pipeline.stages import FIELDS, S

sys.path.insert(0, str(Path(__file__).parent))

import clocked_device
from clocked_device import faults_of

DEPTHS = range(1, 5)
OVERLAPPED = {"train": TRAIN_OVERLAPPED, "train on GPUs": TRAIN_EXCHANGED, "eval": EVAL_OVERLAPPED}
WAITS = [
    pytest.param(rows, index, wait, id=f"{name}: {row.stage} after {wait}")
    for name, rows in OVERLAPPED.items()
    for index, row in enumerate(rows)
    for wait in row.after
]


@pytest.mark.parametrize("batches", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("rows", [TRAIN_SEQUENTIAL, EVAL_SEQUENTIAL], ids=["train", "eval"])
def test_sequential_schedules_are_in_order(rows, batches):
    assert faults_of(rows, batches) == []


@pytest.mark.parametrize("batches", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("name", OVERLAPPED)
def test_overlapped_schedules_are_in_order_at_every_depth(name, depth, batches):
    rows = at_depth(OVERLAPPED[name], depth)
    assert ring_size(rows) <= depth
    assert faults_of(rows, batches) == []


@pytest.mark.parametrize("batches", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("depth", DEPTHS)
def test_schedules_of_cpus_are_in_order_where_one_stage_does_what_three_do(depth, batches, monkeypatch):
    """``grad_dist`` sums the gradients of replicated rows there, while the others' travel."""
    reads, writes = FIELDS[S.grad_dist]
    monkeypatch.setitem(FIELDS, S.grad_dist, (reads, writes | {"embedding.replicated"}))
    for stage in (S.sum_replicated, S.reduce_replicated):
        monkeypatch.setitem(FIELDS, stage, (frozenset(), frozenset()))
    assert faults_of(at_depth(TRAIN_OVERLAPPED, depth), batches) == []


@pytest.mark.parametrize(("rows", "index", "wait"), WAITS)
def test_no_wait_can_be_deleted(rows, index, wait):
    """A wait whose loss would not be caught is redundant, and must not stand in a table."""
    row = rows[index]
    without = replace(row, after=tuple(stage for stage in row.after if stage != wait))
    mutant = (*rows[:index], without, *rows[index + 1 :])
    assert any(faults_of(at_depth(mutant, depth), 9) for depth in DEPTHS)


@pytest.mark.parametrize("name", OVERLAPPED)
def test_a_ring_too_short_is_caught(name, monkeypatch):
    """Batches further ahead than the ring is long overwrite what is still read."""
    monkeypatch.setattr(clocked_device, "ring_size", lambda rows: ring_size(rows) - 1)
    assert faults_of(at_depth(OVERLAPPED[name], 3), 9)


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_rows_that_travel_before_the_last_update_are_caught(depth):
    """Of the next batch, issued before this one's update."""
    rows = list(at_depth(TRAIN_EXCHANGED, depth))
    early = [row for row in rows if row.stage in {S.lookup, S.output_dist}]
    assert all(row.ahead == 1 for row in early)
    rest = [row for row in rows if row not in early]
    at = next(place for place, row in enumerate(rest) if row.stage == S.sparse_update)
    faults = faults_of((*rest[:at], *early, *rest[at:]), 5)
    assert any(fault.startswith("lookup 1 reads weights.tables") for fault in faults)


def test_a_look_up_before_the_last_update_is_caught():
    rows = {row.stage: row for row in at_depth(TRAIN_OVERLAPPED, 3)}
    lane = [rows.pop(stage) for stage in (S.upload, S.input_dist, S.lookup, S.output_dist)]
    stale = (lane[0], *(replace(row, ahead=1) for row in lane[1:]), *rows.values())
    assert any(fault.startswith("lookup 1 reads weights.tables") for fault in faults_of(stale, 5))
