"""Synthetic rows made on a GPU: the CPU's, bit for bit (tolerance 0: every float32 operation is rounded by itself)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dlrm.config import DataConfig
from pipeline.dataset import load_dataset
from pipeline.generator import DeviceRows, Generator

cupy = pytest.importorskip("cupy", reason="CuPy is not installed")


def _gpus() -> int:
    try:
        return int(cupy.cuda.runtime.getDeviceCount())
    except cupy.cuda.runtime.CUDARuntimeError:
        return 0


if not _gpus():
    pytest.skip("no GPU is visible", allow_module_level=True)

from dlrm.cuda import CudaDevice  # noqa: E402  it loads CuPy


@pytest.mark.parametrize("num_dense", [0, 5, 13])
@pytest.mark.parametrize("num_rows", [0, 1, 127, 128, 129, 70_001])
def test_rows_and_logits_are_the_cpus(num_dense: int, num_rows: int, rng: np.random.Generator) -> None:
    sizes = [1, 2, 64, 65, 1000, 40_000_000, 2**31, *rng.integers(1, 10**6, 5).tolist()]
    hotness = rng.integers(1, 4, len(sizes)).tolist()
    generator = Generator(sizes, hotness, rng.uniform(0, 2, len(sizes)).tolist(), num_dense, int(rng.integers(2**63)))
    numbers = rng.integers(0, 2**62, num_rows)
    expected = np.empty((num_rows, generator.row_words), np.uint32)
    logits = generator.write(numbers, expected)
    made = DeviceRows(generator, CudaDevice())
    records = cupy.full(expected.shape, 0xFFFFFFFF, np.uint32)
    found = cupy.full(num_rows, np.nan, np.float32)
    made.write(cupy.asarray(numbers), records, found)
    np.testing.assert_array_equal(records.get(), expected)
    np.testing.assert_array_equal(found.get().view(np.uint32), logits.view(np.uint32))


def test_an_epoch_made_on_the_gpu_is_the_epoch_read_on_the_cpu() -> None:
    """Shuffled shares of two ranks: the CPU hands over records, or numbers out of which the GPU makes them."""
    path = "synthetic:criteo-terabyte?rows=50000&exponent=1.1"
    split, device = load_dataset(path).split("validation"), CudaDevice()
    made = split.rows_on(device)
    data = DataConfig(path=path, batch_size=1000, shuffle_window=1500)
    for rank in (0, 1):
        usual: dict[str, Any] = {"seed": 3, "rank": rank, "ranks": 2, "device": device, "epochs": 2}
        with split.records(data, **usual) as rows, split.records(data, numbers=True, **usual) as numbers:
            for one, other in zip(rows, numbers, strict=True):
                records, logits = cupy.empty(one.records.shape, np.uint32), cupy.empty(len(one.records), np.float32)
                words = device.upload(other.records, cupy.empty(other.records.shape, np.uint32))
                made.write(words.view(np.int64).reshape(-1), records, logits)
                np.testing.assert_array_equal(records.get(), one.records)
