"""Criteo-shaped rows out of a counter: any rank makes any row, and a GPU can make the same ones.

docs/data.md gives the arithmetic row by row; it is integers and float32 in a fixed order without fused products, so
that the rows are the same on every machine. ``pipeline.synthetic`` is the smaller sister: its ceilings are known.

Shapes: B rows, V 32-bit words of a Raw row, N dense columns, T tables, H key columns of all tables, S segments of
all tables' laws, E latent dimensions.

Source of the counter: Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011); of the choice of segments: Walker's alias method
(Vose 1991); of the hash: Wellons, "Prospecting for hash functions", lowbias32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dlrm.device import Array, Device, Kernel
from dlrm.philox import philox4x32
from embedding.frequency import bin_edges

STREAM = 0x53594E54
BYTES_MEAN = 510
BYTES_SCALE = np.float32(1 / math.sqrt(4 * (256**2 - 1) / 12))
LOG2_E = np.float32(1 / math.log(2))
UNIT = np.float32(2**-24)
EXP2_SERIES = tuple(np.float32(math.log(2) ** n / math.factorial(n)) for n in range(7))
"""Of 2^f, f in 0 .. 1, lowest power first."""

LATENT_DIM = 4
DENSE_STRENGTH, ADDITIVE_STRENGTH, INTERACTION_STRENGTH = 0.7, 0.7, 1.0
"""Standard deviations of the logit's parts."""
BASE_RATE = 0.25

_HEAD = 1 << 16  # rows whose own mean and variance are reckoned with; behind them both are those of a normal value
_CALIBRATION_ROW = 1 << 62
_CALIBRATION_ROWS = 1 << 14
_GRID = 1024  # constants are multiples of 1 / _GRID: a last bit of a library's function cannot change them


def generate_records(
    numbers: Any,
    seed: Any,
    hotness: Any,
    law_starts: Any,
    limits: Any,
    aliases: Any,
    firsts: Any,
    sizes: Any,
    salts: Any,
    means: Any,
    scales: Any,
    linear: Any,
    bias: Any,
    records: Any,
    logits: Any,
) -> None:
    """Write Raw rows (int32 label, float32 dense, int32 keys) and the teacher's logits.

    Args:
        numbers: [B] int64, rows of the whole set.
        seed: uint64.
        hotness: [T] int64.
        law_starts: [T + 1] int64, first segment of each table.
        limits: [S] uint64, 0 .. 2^32: a fraction at or above it takes the alias.
        aliases: [S] int64, segments.
        firsts: [S] uint64, first key of each segment.
        sizes: [S] uint64, keys of each segment.
        salts: [T, 1 + E] uint64, 32 bits: of the effect and of each latent coordinate.
        means: [T, 1 + E] float32.
        scales: [T, 1 + E] float32.
        linear: [N] float32.
        bias: float32.
        records: [B, V] uint32, written.
        logits: [B] float32, written.
    """
    num_dense, num_latent = linear.size, salts.shape[1] - 1
    rows = numbers.astype(np.uint64)
    num_words = 1 + num_dense + 2 * (records.shape[1] - 1 - num_dense)
    words: list[Any] = []
    for block in range(-(-num_words // 4)):
        words += philox4x32(
            (
                rows & np.uint64(0xFFFFFFFF),
                rows >> np.uint64(32),
                np.full_like(rows, block),
                np.full_like(rows, STREAM),
            ),
            int(seed),
        )
    logit = np.full(numbers.size, bias, np.float32)
    for n in range(num_dense):
        x = bell(words[1 + n])
        records[:, 1 + n] = x.view(np.uint32)
        logit = logit + x * linear[n]
    total, squares = np.zeros((2, num_latent, numbers.size), np.float32)
    column = 0
    for t in range(hotness.size):
        vector = np.zeros((num_latent, numbers.size), np.float32)
        for _ in range(hotness[t]):
            at = 1 + num_dense + 2 * column
            product = words[at] * np.uint64(law_starts[t + 1] - law_starts[t])
            segment = law_starts[t] + (product >> np.uint64(32)).astype(np.int64)
            fraction = product & np.uint64(0xFFFFFFFF)
            segment = np.where(fraction >= limits[segment], aliases[segment], segment)
            key = firsts[segment] + ((words[at + 1] * sizes[segment]) >> np.uint64(32))
            records[:, 1 + num_dense + column] = key
            logit = logit + (bell(hash32(key, salts[t, 0])) - means[t, 0]) * scales[t, 0]
            for e in range(num_latent):
                vector[e] += (bell(hash32(key, salts[t, 1 + e])) - means[t, 1 + e]) * scales[t, 1 + e]
            column += 1
        total += vector
        squares += vector * vector
    for e in range(num_latent):
        pairs = total[e] * total[e] - squares[e]
        logit = logit - pairs if e % 2 else logit + pairs
    logits[:] = logit
    u = (words[0] >> np.uint64(8)).astype(np.float32) * UNIT
    records[:, 0] = u * (np.float32(1) + exp2(-(logit * LOG2_E))) < np.float32(1)


def bell(words: Any) -> Any:
    """Sum of the four bytes of 32-bit words, brought to mean 0 and variance 1, float32."""
    total = sum((words >> np.uint64(shift)) & np.uint64(255) for shift in (0, 8, 16, 24))
    return (np.asarray(total).astype(np.int64) - BYTES_MEAN).astype(np.float32) * BYTES_SCALE


def hash32(keys: Any, salt: Any) -> Any:
    """32 bits for each key, as uint64."""
    mask = np.uint64(0xFFFFFFFF)
    z = ((keys * np.uint64(0x9E3779B1)) & mask) ^ salt
    z = ((z ^ (z >> np.uint64(16))) * np.uint64(0x7FEB352D)) & mask
    z = ((z ^ (z >> np.uint64(15))) * np.uint64(0x846CA68B)) & mask
    return z ^ (z >> np.uint64(16))


def exp2(y: Any) -> Any:
    """2^y, float32, y held within -60 .. 60: the series of the fraction by Horner's rule, times a power of two."""
    y = np.minimum(np.maximum(y, np.float32(-60)), np.float32(60))
    whole = np.floor(y)
    f = y - whole
    series = EXP2_SERIES[6] * f + EXP2_SERIES[5]
    for coefficient in EXP2_SERIES[4::-1]:
        series = series * f + coefficient
    return series * ((whole.astype(np.int32) + np.int32(127)) << np.int32(23)).view(np.float32)


def segments(rows: int, exponent: float) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """First keys [S + 1] and probabilities [S] of the law's segments, inside which every key is as likely.

    They are the bins of ``embedding.frequency``: 64 single keys, then a sixteenth of an octave each; a segment has what
    the power law x^-exponent, x in 1 .. rows + 1, has there.
    """
    edges = bin_edges(rows)
    x = np.log(edges + 1.0)
    cumulative = x if exponent == 1.0 else np.expm1((1.0 - exponent) * x)
    return edges, np.diff(cumulative / cumulative[-1])


class Generator:
    """The constants of one synthetic set, and its rows.

    Attributes:
        constants: arguments of ``generate_records`` between ``numbers`` and ``records``.
        row_words: V.
    """

    def __init__(
        self, table_rows: Sequence[int], hotness: Sequence[int], exponents: Sequence[float], num_dense: int, seed: int
    ) -> None:
        """Work out the constants; takes time and memory for the first 65,536 rows of each table, not for all.

        Args:
            table_rows: [T], 1 .. 2^31 each.
            hotness: [T].
            exponents: [T], 0: uniform.
            num_dense: N.
            seed: 0 .. 2^63 - 1.
        """
        self.row_words = 1 + num_dense + sum(hotness)
        laws = [segments(rows, exponent) for rows, exponent in zip(table_rows, exponents, strict=True)]
        starts = np.cumsum([0, *(law[1].size for law in laws)], dtype=np.int64)
        tables = [_alias(law[1]) for law in laws]
        limits = np.concatenate([table[0] for table in tables])
        aliases = np.concatenate([table[1] + start for table, start in zip(tables, starts[:-1], strict=True)])
        firsts = np.concatenate([law[0][:-1] for law in laws]).astype(np.uint64)
        sizes = np.concatenate([np.diff(law[0]) for law in laws]).astype(np.uint64)
        salts = self._words(seed, 1, len(laws) * (1 + LATENT_DIM)).reshape(len(laws), -1)
        means, scales = self._centre(laws, salts, np.asarray(hotness))
        raw = bell(self._words(seed, 2, max(num_dense, 1))[:num_dense]).astype(np.float64)
        length = math.sqrt(float((raw**2).sum())) or 1.0
        linear = _rounded(raw * (DENSE_STRENGTH / length))
        hot = np.asarray(hotness, np.int64)
        self.constants: list[Any] = [
            np.uint64(seed),
            hot,
            starts,
            limits,
            aliases,
            firsts,
            sizes,
            salts,
            means,
            scales,
            linear,
        ]
        self.constants.append(np.float32(0))
        self.constants[-1] = self._calibrate()

    def write(self, numbers: NDArray[np.int64], records: NDArray[np.uint32]) -> NDArray[np.float32]:
        """Write rows [B, V] of these numbers; returns the teacher's logits [B]. Safe from several threads at once."""
        from pipeline import generator_numba  # it needs this module's constants

        logits = np.empty(numbers.size, np.float32)
        fill: Callable[..., None] = generator_numba.generate_records
        fill(numbers, *self.constants, records, logits)
        return logits

    @staticmethod
    def _words(seed: int, purpose: int, count: int) -> NDArray[np.uint64]:
        """Random words for constants: counters (0, 1, ...), 0, purpose, ~STREAM."""
        number = np.arange(-(-count // 4), dtype=np.uint64)
        counter = (number, number * np.uint64(0), number * np.uint64(0) + np.uint64(purpose))
        words = philox4x32((*counter, number * np.uint64(0) + np.uint64(STREAM ^ 0xFFFFFFFF)), seed)
        result: NDArray[np.uint64] = np.stack(words, axis=1).reshape(-1)[:count]
        return result

    @staticmethod
    def _centre(
        laws: Sequence[tuple[NDArray[np.int64], NDArray[np.float64]]], salts: Any, hotness: Any
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Means and scales [T, 1 + E] that bring effects and latents to mean 0 and their variance under the law."""
        means, scales = np.zeros((2, *salts.shape))
        varied = max(sum(law[0][-1] > 1 for law in laws), 1)
        pairs = max(varied * (varied - 1) / 2, 1)
        # A pair's product of coordinates has variance var^2, there are `pairs` of them in E dimensions, and each pair
        # comes twice in (sum u)^2 - sum u^2.
        variance = INTERACTION_STRENGTH / math.sqrt(4 * pairs * LATENT_DIM)
        deviations = np.array([ADDITIVE_STRENGTH / math.sqrt(varied)] + [math.sqrt(variance)] * LATENT_DIM)
        for t, (edges, probabilities) in enumerate(laws):
            if edges[-1] < 2:
                continue
            head = min(int(edges[-1]), _HEAD)
            each = np.repeat(probabilities / np.diff(edges), np.diff(edges).clip(max=head))[:head]
            rest = max(0.0, 1.0 - float(each.sum()))
            values = bell(hash32(np.arange(head, dtype=np.uint64)[:, None], salts[t])).astype(np.float64)
            means[t] = each @ values
            spread = each @ values**2 + rest - means[t] ** 2
            scales[t] = deviations / np.sqrt(np.maximum(spread, 1e-3) * hotness[t])
        return _rounded(means), _rounded(scales)

    def _calibrate(self) -> np.float32:
        """The bias that makes a quarter of the labels 1."""
        records = np.empty((_CALIBRATION_ROWS, self.row_words), np.uint32)
        written = np.empty(_CALIBRATION_ROWS, np.float32)
        numbers = np.arange(_CALIBRATION_ROW, _CALIBRATION_ROW + _CALIBRATION_ROWS)
        # The reference: loading the compiled form takes ten times as long as these rows, and a GPU never needs it.
        fill: Callable[..., None] = generate_records
        fill(numbers, *self.constants, records, written)
        logits = written.astype(float)
        low, high = -30.0, 30.0
        for _ in range(40):
            middle = (low + high) / 2
            if (1 / (1 + np.exp(-np.clip(logits + middle, -60, 60)))).mean() < BASE_RATE:
                low = middle
            else:
                high = middle
        return np.float32(_rounded(np.array(high)))


class DeviceRows:
    """The rows of a generator, made on a device."""

    def __init__(self, generator: Generator, device: Device) -> None:
        """Upload the constants, some ten kilobytes a table, on the current stream."""
        self._kernel: Kernel = device.kernel(__name__, "generate_records") or generate_records
        self._constants = [
            device.upload(value, device.empty(value.shape, value.dtype)) if value.ndim else value
            for value in generator.constants
        ]

    def write(self, numbers: Array, records: Array, logits: Array) -> None:
        """Write rows on the current stream; nothing is allocated and nothing waits.

        Args:
            numbers: [B] int64, rows of the whole set.
            records: [B, V] uint32, written: what a Raw file holds.
            logits: [B] float32, written: the teacher's.
        """
        self._kernel(numbers, *self._constants, records, logits)


def _rounded(values: NDArray[Any]) -> NDArray[np.float32]:
    rounded: NDArray[np.float32] = (np.rint(values * _GRID) / _GRID).astype(np.float32)
    return rounded


def _alias(probabilities: NDArray[np.float64]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Limits [S] and aliases [S]: place j is kept with probability limit / 2^32, else its alias is taken."""
    count = probabilities.size
    shares = probabilities * count
    limits = np.full(count, 1 << 32, np.uint64)
    aliases = np.arange(count)
    small = [j for j in range(count) if shares[j] < 1]
    large = [j for j in range(count) if shares[j] >= 1]
    while small and large:
        low, high = small.pop(), large[-1]
        limits[low] = np.uint64(min(1 << 32, round(shares[low] * 2**32)))
        aliases[low] = high
        shares[high] -= 1 - shares[low]
        if shares[high] < 1:
            small.append(large.pop())
    return limits, aliases
