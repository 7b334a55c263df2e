"""Room for copies: arrays apart from each other, the same memory again, touched behind the training."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding.comm import SingleComm
from pipeline.checkpoint import open_checkpoint
from pipeline.checkpoint_async import AsyncSaver
from pipeline.copy_room import CopyRoom

ARRAYS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 40), max_size=3).map(tuple), st.sampled_from(["<f4", "<f8", "<i8", "?", "<u2", "<c16"])
    ),
    max_size=8,
)


def size_of(shape: tuple[int, ...], dtype: str) -> int:
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize


@given(copies=st.lists(ARRAYS, min_size=1, max_size=4), touch=st.booleans())
def test_arrays_of_a_copy_keep_what_is_written_whatever_the_copy_before_was(copies: list[Any], touch: bool) -> None:
    room = CopyRoom()
    for copy in copies:
        sizes = [size_of(*array) for array in copy]
        if touch:
            room.prepare(sizes)
        room.begin(sizes)
        arrays = [room.take(shape, dtype) for shape, dtype in copy]
        expected = [np.full(shape, 1 + i, dtype) for i, (shape, dtype) in enumerate(copy)]
        for array, values in zip(arrays, expected, strict=True):
            array[...] = values
        for array, values in zip(arrays, expected, strict=True):
            assert array.flags.c_contiguous
            assert array.dtype == values.dtype
            np.testing.assert_array_equal(array, values)


def test_memory_is_used_again_and_grows_only_where_it_has_to() -> None:
    room = CopyRoom()
    room.begin([4000, 100])
    first = room.take((1000,), "<f4")
    held = room.nbytes
    room.begin([800])
    assert np.shares_memory(room.take((100,), "<f8"), first)
    assert room.nbytes == held
    with pytest.raises(ValueError, match="more than the"):
        room.take((1000,), "<f8")
    room.begin([held + 1])
    assert room.nbytes > held


def test_all_room_is_touched() -> None:
    room, size = CopyRoom(), 100 << 20  # more than is touched at once
    room.begin([size])
    whole = room.take((size,), "u1")
    whole.fill(1)
    room.prepare([size])
    while room.touching:
        time.sleep(0.001)
    assert not whole[::4096].any()


def test_what_is_saved_is_what_was_there_however_the_room_was_filled_before(rng, tmp_path) -> None:
    shapes = {"table.a": (5000, 16), "table.b": (70,), "step": ()}
    with AsyncSaver(tmp_path, SingleComm()) as saver:
        saver.prepare({name: np.empty(shape) for name, shape in shapes.items()})
        held = saver.room.nbytes
        saved = []
        for step in range(1, 4):
            tensors = {name: np.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
            saved.append({name: array.copy() for name, array in tensors.items()})
            saver.save(step=step, tensors=tensors, meta={})
            for array in tensors.values():  # training goes on
                array[...] = np.nan
        saver.wait()
        assert saver.room.nbytes == held
    for step, tensors in enumerate(saved, 1):
        checkpoint = open_checkpoint(tmp_path / f"step-{step:012d}")
        for name, array in tensors.items():
            np.testing.assert_array_equal(checkpoint.read(name), array)


def test_nothing_is_touched_where_no_copy_may_be_made(tmp_path) -> None:
    for limit in (0, 100):
        saver = AsyncSaver(tmp_path, SingleComm(), memory_limit_bytes=limit)
        saver.prepare({"x": np.empty(1000)})
        assert saver.room.nbytes == 0
