"""Criteo-shaped data of any size, labelled by a planted teacher whose best possible AUC is known.

A row has N normal dense columns x and one or more keys of each of T tables, drawn independently from a power law.
Every table row k has an effect a_t[k] and a latent vector u_t[k] of few dimensions, both centred under the
power law. The label is 1 with probability sigmoid(logit),

    logit = bias + dense(x) + sum_t a_t[k_t] + sum_{i<j} s_ij <u_i[k_i], u_j[k_j]>

where dense(x) = sum_n l_n x_n + c_n (abs(x_n) - sqrt(2 / pi)) and each s_ij is one scale times +1 or -1. As
the latents are centred, a pair's dot has mean zero given either key alone: whatever a model gains above the additive
ceiling it owes to interactions. With several keys in a bag, effects and latents are summed and divided by
sqrt(hotness).

Shapes: B rows, N dense columns, T tables, H key columns of all tables, E latent dimensions, R rows of all tables.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dlrm.errors import ConfigError
from pipeline import synthetic_numba
from pipeline.manifest import Ceilings, TableInfo
from pipeline.synthetic_ceilings import BASE_RATE, Sample, compute_ceilings, sigmoid
from pipeline.writer import DatasetWriter

Floats = NDArray[np.float64]

_CHUNK = 131_072  # rows generated and written at once
_CALIBRATION_ROW = 1 << 62  # rows that set the bias; beyond every set
_CALIBRATION_ROWS = 65_536
_CEILING_ROWS = 2_000_000  # of the test split
_FIT_ROWS = 300_000  # of the training split


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticTable:
    """One table: how many rows, and how its keys are drawn.

    Attributes:
        rows: keys are 0 .. rows - 1, by descending probability.
        exponent: of the power law; 0: uniform.
        hotness: keys of each row of data, drawn independently.
    """

    rows: int
    exponent: float = 1.1
    hotness: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Strengths:
    """Standard deviations of the logit's parts."""

    dense: float = 0.7
    additive: float = 0.7
    interaction: float = 1.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Synthesis:
    """What ``synthesize`` made.

    Attributes:
        path: folder of the data set.
        rows: samples in all.
        seconds: time of generating, hashing and writing the rows.
        rows_per_s: the quotient.
        total_seconds: with the teacher, compilation and the ceilings.
        ceilings: AUC on the test split.
    """

    path: Path
    rows: int
    seconds: float
    rows_per_s: float
    total_seconds: float
    ceilings: Ceilings | None


DEFAULT_TABLES = tuple(SyntheticTable(rows=rows) for rows in (20, 30, 40, 60, 90, 140, 200, 300))
DEFAULT_SPLITS: Mapping[str, float] = {"train": 0.9, "validation": 0.05, "test": 0.05}


def generate(
    out: str | Path,
    *,
    rows: int,
    tables: Sequence[SyntheticTable] = DEFAULT_TABLES,
    num_dense: int = 13,
    splits: Mapping[str, float] = DEFAULT_SPLITS,
    seed: int = 1,
    latent_dim: int = 2,
    strengths: Strengths | None = None,
    control: bool = False,
    overwrite: bool = False,
    name: str = "synthetic",
) -> Path:
    """``synthesize``, returning the folder alone."""
    return synthesize(
        out,
        rows=rows,
        tables=tables,
        num_dense=num_dense,
        splits=splits,
        seed=seed,
        latent_dim=latent_dim,
        strengths=strengths,
        control=control,
        overwrite=overwrite,
        name=name,
    ).path


def synthesize(
    out: str | Path,
    *,
    rows: int,
    tables: Sequence[SyntheticTable] = DEFAULT_TABLES,
    num_dense: int = 13,
    splits: Mapping[str, float] = DEFAULT_SPLITS,
    seed: int = 1,
    latent_dim: int = 2,
    strengths: Strengths | None = None,
    control: bool = False,
    overwrite: bool = False,
    name: str = "synthetic",
) -> Synthesis:
    """Write a synthetic data set; the same arguments give the same bytes on any number of threads.

    Args:
        out: folder.
        rows: samples in all splits.
        tables: two or more that have more than one row. The teacher takes 4 (1 + latent_dim) bytes a table row.
        num_dense: N; 0: none.
        splits: share of each split; ``test`` is where the ceilings are computed.
        seed: 0 .. 2^63 - 1.
        latent_dim: E.
        strengths: how much of the logit each part makes up.
        control: write the keys of row (r + rows / 2) modulo rows beside the label of row r: the category columns
            are permuted over rows, so that nothing can be learnt from them, and all ceilings are ``dense_only``.
        overwrite: replace a data set that is there.
        name: name of the set.

    Returns:
        Where it lies, how fast it came about, and its ceilings (``None`` without a test split of both classes).

    Raises:
        ConfigError: an argument is out of range.
        DataError: the folder holds a data set already, or cannot be written.
    """
    begin = time.perf_counter()
    counts = _split_rows(rows, splits)
    teacher = Teacher(tables, num_dense, seed, latent_dim, strengths or Strengths())
    shift = rows // 2 if control else 0
    infos = [
        TableInfo(name=f"C{t + 1}", rows=table.rows, hotness=table.hotness, frequency_ordered=True)
        for t, table in enumerate(tables)
    ]
    fit, test = Sample(_FIT_ROWS), Sample(_CEILING_ROWS)
    with DatasetWriter(
        out, name=name, dense_names=[f"I{n + 1}" for n in range(num_dense)], tables=infos, overwrite=overwrite
    ) as writer:
        start = time.perf_counter()
        first = 0
        for split, count in counts.items():
            sample = {"train": fit, "test": test}.get(split)
            _write_split(writer, teacher, split, first, count, shift, rows, sample)
            first += count
        seconds = time.perf_counter() - start
        ceilings = compute_ceilings(teacher, fit, test, control=control)
        writer.finish(
            source=f"crosslane synth, seed {seed}",
            licence="none: made by a random generator",
            notes=(
                f"keys: power law, exponents {', '.join(f'{table.exponent:g}' for table in tables)}",
                f"teacher: {latent_dim} latent dimensions, all pairs of tables, {strengths or Strengths()}",
                *(("control: category columns permuted over rows",) if control else ()),
            ),
            ceilings=ceilings,
        )
    return Synthesis(
        path=Path(out),
        rows=rows,
        seconds=seconds,
        rows_per_s=rows / max(seconds, 1e-9),
        total_seconds=time.perf_counter() - begin,
        ceilings=ceilings,
    )


def key_probabilities(rows: int, exponent: float) -> Floats:
    """Probability of each key [rows], descending.

    A power law cut off at both ends, made discrete: key k has the part of x^-exponent between k + 1 and k + 2,

        p_k = F(k + 2) - F(k + 1),  F(x) = (x^(1 - a) - 1) / ((rows + 1)^(1 - a) - 1)   (a = 1: ln x / ln(rows + 1))

    so that a key is drawn in constant time, by inverting F, whatever the number of rows.
    """
    edges = np.arange(1, rows + 2, dtype=np.float64)
    cumulative = np.log(edges) if exponent == 1.0 else np.expm1((1.0 - exponent) * np.log(edges))
    probabilities: Floats = np.diff(cumulative / cumulative[-1])
    return probabilities


class Teacher:
    """The planted model.

    Attributes:
        effects: [R] float32.
        latents: [R, E] float32.
        scales: [T, T] float64, weight s_ij of each pair of tables, above the diagonal.
        row_words: V, 32-bit words of a row of data.
        columns: [T + 1], first key column of each table.
        table_starts: [T + 1], first row of each table in ``effects``.
    """

    def __init__(
        self, tables: Sequence[SyntheticTable], num_dense: int, seed: int, latent_dim: int, strengths: Strengths
    ) -> None:
        """Draw the teacher's parameters and set its bias so that a quarter of the labels is 1.

        Raises:
            ConfigError: an argument is out of range.
        """
        _check_arguments(tables, num_dense, seed, latent_dim, strengths)
        self.num_dense = num_dense
        self.hotness = np.array([table.hotness for table in tables], np.int64)
        self.columns = np.cumsum([0, *self.hotness], dtype=np.int64)
        self.table_rows = np.array([table.rows for table in tables], np.int64)
        self.table_starts = np.cumsum([0, *self.table_rows], dtype=np.int64)
        self.row_words = 1 + num_dense + int(self.columns[-1])
        self._seed = np.uint64(seed)
        exponents = np.array([table.exponent for table in tables])
        flat = exponents == 1.0
        limits = np.log1p(self.table_rows)
        self._spans = np.where(flat, limits, np.expm1((1.0 - exponents) * limits))
        self._inverses = np.where(flat, 0.0, 1.0 / np.where(flat, 1.0, 1.0 - exponents))
        generator = np.random.Generator(np.random.Philox(key=[seed, 1]))
        self._draw_dense(generator, strengths.dense)
        self._draw_tables(generator, exponents, latent_dim, strengths)
        self.bias = 0.0
        self.bias = self._calibrate()

    def label(
        self, first: int, words: NDArray[np.int32], parts: Floats, *, key_shift: int = 0, num_rows: int = 1
    ) -> None:
        """Generate rows ``first ..``; see ``synthetic_numba.generate_rows``."""
        synthetic_numba.generate_rows(
            self._seed,
            first,
            key_shift,
            num_rows,
            self.hotness,
            self.table_rows,
            self._spans,
            self._inverses,
            self.table_starts,
            self._parameters,
            self.scales,
            self._linear,
            self._curved,
            self.bias,
            words,
            words.view(np.float32),
            parts,
        )

    def _draw_dense(self, generator: np.random.Generator, strength: float) -> None:
        linear, curved = generator.normal(size=(2, self.num_dense))
        variance = (linear**2).sum() + (1.0 - 2.0 / np.pi) * (curved**2).sum()
        scale = strength / np.sqrt(variance) if variance else 0.0
        self._linear, self._curved = linear * scale, curved * scale

    def _draw_tables(
        self, generator: np.random.Generator, exponents: Floats, latent_dim: int, strengths: Strengths
    ) -> None:
        """Centre under the power law, bring each table to the same variance and the sums to their strengths."""
        num_tables = self.table_rows.size
        # Side by side in memory: a row's effect and latent vector are wanted together, from a random place.
        self._parameters = np.empty((self.table_starts[-1], 1 + latent_dim), np.float32)
        self.effects = self._parameters[:, 0]
        self.latents = self._parameters[:, 1:]
        covariances = np.empty((num_tables, latent_dim, latent_dim))
        varied = self.table_rows > 1
        for t, rows in enumerate(self.table_rows):
            weights = key_probabilities(int(rows), float(exponents[t]))
            here = slice(self.table_starts[t], self.table_starts[t + 1])
            effects = generator.normal(size=int(rows))
            effects -= weights @ effects
            deviation = np.sqrt(weights @ effects**2)
            effects *= strengths.additive / np.sqrt(varied.sum()) / (deviation or 1.0)
            vectors = generator.normal(size=(int(rows), latent_dim))
            vectors -= weights @ vectors
            covariances[t] = (vectors * weights[:, None]).T @ vectors
            spread = np.sqrt(np.trace(covariances[t])) or 1.0
            self.effects[here] = effects
            self.latents[here] = vectors / spread
            covariances[t] /= spread**2
        pairs = list(combinations(range(num_tables), 2))
        # Different pairs are uncorrelated, and the dot of independent centred vectors has variance tr(C_i C_j).
        variance = sum(np.trace(covariances[i] @ covariances[j]) for i, j in pairs)
        self.scales = np.zeros((num_tables, num_tables))
        self.scales[tuple(zip(*pairs, strict=True))] = generator.choice([-1.0, 1.0], size=len(pairs))
        self.scales *= strengths.interaction / np.sqrt(variance)

    def _calibrate(self) -> float:
        words = np.empty((_CALIBRATION_ROWS, self.row_words), np.int32)
        parts = np.empty((_CALIBRATION_ROWS, 3))
        self.label(_CALIBRATION_ROW, words, parts)
        low, high = -30.0, 30.0
        for _ in range(60):
            middle = (low + high) / 2
            if sigmoid(parts[:, 0] + middle).mean() < BASE_RATE:
                low = middle
            else:
                high = middle
        return high


def _write_split(
    writer: DatasetWriter,
    teacher: Teacher,
    split: str,
    first: int,
    count: int,
    shift: int,
    num_rows: int,
    sample: Sample | None,
) -> None:
    """Generate a split chunk by chunk, each while the one before is hashed and written."""
    buffers = [np.empty((min(_CHUNK, count), teacher.row_words), np.int32) for _ in range(2)]
    parts = np.empty((min(_CHUNK, count), 3))
    pending: Future[None] | None = None
    with ThreadPoolExecutor(1) as background:
        for turn, start in enumerate(range(0, max(count, 1), _CHUNK)):
            size = min(_CHUNK, count - start)
            words = buffers[turn % 2][:size]
            teacher.label(first + start, words, parts[:size], key_shift=shift, num_rows=num_rows)
            if sample is not None:
                sample.add(words, parts[:size], teacher.num_dense)
            if pending is not None:
                pending.result()
            pending = background.submit(writer.write_rows, split, words)
        if pending is not None:
            pending.result()


def _split_rows(rows: int, splits: Mapping[str, float]) -> dict[str, int]:
    total = sum(splits.values())
    if rows < 1 or not splits or min(splits.values()) < 0 or not np.isfinite(total) or total <= 0:
        raise ConfigError(f"synth: {rows} rows in splits {dict(splits)}; needs rows and shares above 0")
    ends = np.rint(np.cumsum(list(splits.values())) / total * rows).astype(int)
    return {name: int(count) for name, count in zip(splits, np.diff(ends, prepend=0), strict=True)}


def _check_arguments(
    tables: Sequence[SyntheticTable], num_dense: int, seed: int, latent_dim: int, strengths: Strengths
) -> None:
    for t, table in enumerate(tables):
        if not 1 <= table.rows <= 2**31 or table.hotness < 1 or not 0 <= table.exponent <= 10:
            raise ConfigError(
                f"synth: table {t + 1} has {table.rows} rows, hotness {table.hotness}, exponent {table.exponent:g}; "
                "rows lie in 1 .. 2^31, hotness is at least 1, the exponent lies in 0 .. 10"
            )
    if sum(table.rows > 1 for table in tables) < 2:
        raise ConfigError(f"synth: {len(tables)} tables; interactions need two with more than one row")
    if num_dense < 0 or latent_dim < 1 or not 0 <= seed < 2**63:
        raise ConfigError(
            f"synth: {num_dense} dense columns, {latent_dim} latent dimensions, seed {seed}; needs at least 0, at "
            "least 1, and a seed in 0 .. 2^63 - 1"
        )
    values = (strengths.dense, strengths.additive, strengths.interaction)
    if not all(np.isfinite(value) and value >= 0 for value in values):
        raise ConfigError(f"synth: strengths {values}; each is a finite number of at least 0")
