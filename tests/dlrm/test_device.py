"""The host device: aligned arrays, kernel look-up, copies."""

from __future__ import annotations

import numpy as np
import pytest

from dlrm.device import HostDevice


@pytest.mark.parametrize("shape", [0, 5, (0, 3), (7,), (3, 5, 2), ()])
@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.uint8])
def test_arrays_are_aligned_contiguous_and_writable(shape, dtype):
    device = HostDevice()
    for make in (device.empty, device.zeros, device.pinned_empty):
        array = make(shape, dtype)
        assert array.shape == ((shape,) if isinstance(shape, int) else shape)
        assert array.dtype == dtype
        # NumPy invents an address for an array without elements.
        assert not array.size or array.ctypes.data % 64 == 0
        assert array.flags.c_contiguous
        array[...] = 1
    assert not device.zeros(shape, dtype).any()


def test_kernel_is_the_compiled_function_beside_the_reference():
    import dlrm.interaction_numba

    device = HostDevice()
    assert device.kernel("dlrm.interaction", "interaction_forward") is dlrm.interaction_numba.interaction_forward
    assert device.kernel("dlrm.interaction", "no_such_operation") is None
    assert device.kernel("dlrm.mlp", "mlp_forward") is None
    assert HostDevice(compiled=False).kernel("dlrm.interaction", "interaction_forward") is None


def test_thread_count_is_the_kernels_mask():
    import numba

    before = numba.get_num_threads()
    try:
        HostDevice(1)
        assert numba.get_num_threads() == 1
        HostDevice(10_000)
        assert numba.get_num_threads() == numba.config.NUMBA_NUM_THREADS
    finally:
        numba.set_num_threads(before)


def test_upload_and_download_copy_and_refuse_another_dtype(rng):
    device = HostDevice()
    source = rng.normal(size=(4, 3))
    there, back = device.empty((4, 3), np.float64), device.pinned_empty((4, 3), np.float64)
    assert device.upload(source, there) is there
    assert device.download(there, back) is back
    np.testing.assert_array_equal(back, source)
    assert not np.shares_memory(back, there)
    with pytest.raises(TypeError):
        device.upload(source, device.empty((4, 3), np.float32))


def test_work_beside_the_schedule_has_ended_when_its_block_is_left():
    device, found = HostDevice(), np.zeros(1)
    point = device.record()
    with device.on("scoring", (point,)):
        found += 1
    assert point.done()
    assert found == 1
