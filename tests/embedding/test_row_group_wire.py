"""16-bit rows: NumPy's own rounding bit for bit, the stated bounds, and what happens at the ends."""

from __future__ import annotations

import numpy as np
import pytest

from dlrm.device import HostDevice
from dlrm.errors import ConfigError
from embedding.wire import Wire, round_rows, widen_rows

COMPILED, REFERENCE = HostDevice(2), HostDevice(compiled=False)


def numbers(rng: np.random.Generator, dtype: str) -> np.ndarray:
    """Every magnitude, every fp16 with its neighbours' midpoints, and random bits."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middles = (halves[1:] + halves[:-1]) / 2
    bits = rng.integers(0, 2**32, 20_000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    scaled = rng.standard_normal(20_000) * 10.0 ** rng.uniform(-12, 6, 20_000)
    values = np.concatenate([halves, middles, np.nextafter(middles, 0), np.nextafter(middles, 1), bits, scaled])
    return np.concatenate([values, -values, [np.inf, -np.inf, np.nan, 65504, 65520, 1e38]]).astype(dtype)


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.filterwarnings("ignore:(overflow|invalid value|underflow) encountered:RuntimeWarning")
def test_compiled_rounding_equals_the_reference(half: bool, dtype: str, rng: np.random.Generator) -> None:
    values = numbers(rng, dtype)
    words = [np.empty(len(values), np.uint16) for _ in range(2)]
    for device, out in zip((COMPILED, REFERENCE), words, strict=True):
        round_rows(values, 0.5, half, out, device=device)
    same = words[0] == words[1]
    assert np.isnan(values[~same]).all()
    every = np.arange(65536, dtype=np.uint16)
    widened = [np.empty(65536, dtype) for _ in range(2)]
    for device, out in zip((COMPILED, REFERENCE), widened, strict=True):
        widen_rows(every, 0.25, half, out, device=device)
    np.testing.assert_array_equal(*widened)
    assert np.isnan(widened[0]).sum() == (2 * 1023 if half else 2 * 127)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("precision", "relative", "tiny"), [("fp16", 2.0**-11, 2.0**-25), ("bf16", 2.0**-8, 0.0)])
def test_errors_stay_within_the_stated_bounds(
    precision: str, relative: float, tiny: float, dtype: str, rng: np.random.Generator
) -> None:
    wire = Wire(precision, np.dtype(dtype), COMPILED)  # type: ignore[arg-type]
    values = (rng.standard_normal((4000, 8)) * 10.0 ** rng.uniform(-12, 4, (4000, 1))).astype(dtype)
    for global_rows in (0, 1, 2048, 65535):
        scale = wire.scale_of(global_rows)
        small = values / scale  # as gradients of a mean are
        words, out = np.empty((4001, 8), np.uint16), np.empty_like(small)
        encoded = wire.encode(small, words, scale)
        assert encoded.shape == (4000, 16)
        assert encoded.nbytes == 4000 * wire.row_bytes(8)
        wire.decode(words[:4000], out, scale)
        more = 2.0**-24 if dtype == "float64" else 0.0
        assert (np.abs(out - small) <= (relative + more) * np.abs(small) + tiny / scale).all()
        assert np.abs(out - small).max() > 0


def test_what_is_too_large_for_fp16_stays_finite_and_nan_stays_nan() -> None:
    wire = Wire("fp16", np.dtype("float32"), COMPILED)
    values = np.array([[1e30, -1e30, 65519, np.inf, -np.inf, np.nan]], np.float32)
    words, out = np.empty((1, 6), np.uint16), np.empty_like(values)
    wire.encode(values, words)
    wire.decode(words, out)
    np.testing.assert_array_equal(out, [[65504, -65504, 65504, np.inf, -np.inf, np.nan]])


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ConfigError, match="'fp8' is none of fp32, fp16, bf16"):
        Wire("fp8", np.dtype("float32"), COMPILED)  # type: ignore[arg-type]
