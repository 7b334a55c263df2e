"""The generator: its distributions, its teacher and its ceilings."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import OneHotEncoder

from dlrm.errors import ConfigError, DataError
from pipeline.dataset import load_dataset
from pipeline.synthetic import (
    BASE_RATE,
    Strengths,
    SyntheticTable,
    Teacher,
    generate,
    key_probabilities,
    synthesize,
)

SMALL = tuple(SyntheticTable(rows=rows) for rows in (5, 8, 13, 30))


def digest(folder: Path) -> str:
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in ("train.bin", "test.bin"))).hexdigest()


@given(rows=st.integers(1, 300), exponent=st.floats(0, 4))
def test_key_probabilities_descend_and_sum_to_one(rows: int, exponent: float) -> None:
    probabilities = key_probabilities(rows, exponent)
    assert probabilities.shape == (rows,)
    np.testing.assert_allclose(probabilities.sum(), 1, rtol=1e-12)
    assert (np.diff(probabilities) <= 1e-12).all()
    if exponent == 0:
        np.testing.assert_allclose(probabilities, 1 / rows, rtol=1e-9)


@pytest.mark.parametrize("exponent", [0.0, 0.7, 1.0, 1.1, 2.5])
def test_keys_follow_the_power_law(exponent: float, seed: int) -> None:
    """Chi-squared of 200,000 keys: within six standard deviations of its mean."""
    tables = [SyntheticTable(rows=12, exponent=exponent), SyntheticTable(rows=3, hotness=2)]
    teacher = Teacher(tables, 0, seed, 2, Strengths())
    words, parts = np.empty((200_000, teacher.row_words), np.int32), np.empty((200_000, 3))
    teacher.label(0, words, parts)
    expected = key_probabilities(12, exponent) * 200_000
    chi_squared = ((np.bincount(words[:, 1], minlength=12) - expected) ** 2 / expected).sum()
    assert abs(chi_squared - 11) < 6 * np.sqrt(2 * 11)


def test_dense_columns_are_independent_normals(seed: int) -> None:
    """Moments of 100,000 rows, within five standard errors."""
    teacher = Teacher(SMALL, 3, seed, 2, Strengths())
    words, parts = np.empty((100_000, teacher.row_words), np.int32), np.empty((100_000, 3))
    teacher.label(0, words, parts)
    dense = words[:, 1:4].view(np.float32).astype(float)
    error = 5 / np.sqrt(100_000)
    np.testing.assert_allclose(dense.mean(axis=0), 0, atol=error)
    np.testing.assert_allclose(dense.T @ dense / 100_000, np.eye(3), atol=error * np.sqrt(2))
    np.testing.assert_allclose((dense**4).mean(axis=0), 3, atol=error * np.sqrt(96))


def test_teacher_is_the_formula_and_its_parts_have_their_strengths(seed: int) -> None:
    strengths = Strengths(dense=0.5, additive=0.8, interaction=1.2)
    tables = [*SMALL, SyntheticTable(rows=9, hotness=3)]
    teacher = Teacher(tables, 4, seed, 3, strengths)
    words, parts = np.empty((60_000, teacher.row_words), np.int32), np.empty((60_000, 3))
    teacher.label(0, words, parts)
    keys = words[:, 5:]
    bags = [
        keys[:, a:b] + s for a, b, s in zip(teacher.columns, teacher.columns[1:], teacher.table_starts, strict=False)
    ]
    effects = sum(teacher.effects[bag].sum(axis=1) / np.sqrt(bag.shape[1]) for bag in bags)
    vectors = [teacher.latents[bag].sum(axis=1) / np.sqrt(bag.shape[1]) for bag in bags]
    interaction = sum(
        teacher.scales[i, j] * (vectors[i] * vectors[j]).sum(axis=1) for i in range(5) for j in range(i + 1, 5)
    )
    np.testing.assert_allclose(parts[:, 1] - parts[:, 2], effects, atol=1e-5)
    np.testing.assert_allclose(parts[:, 0], teacher.bias + parts[:, 1] + interaction, atol=1e-4)
    # Standard deviations, to 5 %: the heavy head of the power law makes them noisy.
    np.testing.assert_allclose(parts[:, 2].std(), 0.5, rtol=0.05)
    np.testing.assert_allclose(np.std(effects), 0.8, rtol=0.05)
    np.testing.assert_allclose(np.std(interaction), 1.2, rtol=0.05)
    # Given one key, the interactions have mean zero: no table alone can tell them (five standard errors).
    for bag in bags[:4]:
        common = bag[:, 0] == bag[:, 0].min()
        assert abs(np.mean(interaction[common])) < 5 * np.std(interaction[common]) / np.sqrt(common.sum())


def test_labels_are_drawn_with_the_teachers_probability(seed: int) -> None:
    """In each tenth by probability, and in all: within five standard errors."""
    teacher = Teacher(SMALL, 2, seed, 2, Strengths())
    words, parts = np.empty((100_000, teacher.row_words), np.int32), np.empty((100_000, 3))
    teacher.label(0, words, parts)
    probability = 1 / (1 + np.exp(-parts[:, 0]))
    order = np.argsort(probability)
    for tenth in np.split(order, 10):
        expected = probability[tenth].mean()
        assert abs(words[tenth, 0].mean() - expected) < 5 * np.sqrt(expected * (1 - expected) / tenth.size)
    assert abs(words[:, 0].mean() - BASE_RATE) < 0.02


def test_bytes_depend_on_the_seed_and_not_on_the_threads(tmp_path: Path, seed: int) -> None:
    threads = numba.get_num_threads()
    splits = {"train": 0.7, "test": 0.3}
    try:
        numba.set_num_threads(1)
        one = digest(generate(tmp_path / "one", rows=5000, tables=SMALL, seed=seed, splits=splits))
    finally:
        numba.set_num_threads(threads)
    again = digest(generate(tmp_path / "again", rows=5000, tables=SMALL, seed=seed, splits=splits))
    other = digest(generate(tmp_path / "other", rows=5000, tables=SMALL, seed=seed + 1, splits=splits))
    assert one == again != other


def read(folder: Path, split: str) -> tuple[Any, Any, Any]:
    batch = load_dataset(folder).split(split).read(slice(None))
    return batch.labels, batch.dense, batch.keys.keys.reshape(batch.keys.num_tables, -1).T


def test_additive_ceiling_is_what_an_additive_model_reaches(tmp_path: Path, seed: int) -> None:
    """scikit-learn's logistic regression on one-hot keys, trained on labels, comes close from below."""
    made = synthesize(tmp_path / "s", rows=120_000, tables=SMALL, num_dense=2, seed=seed, latent_dim=2)
    assert made.ceilings is not None
    dataset = load_dataset(tmp_path / "s")
    dataset.verify()
    assert dataset.manifest.ceilings == made.ceilings
    assert dataset.manifest.splits.keys() == {"train", "validation", "test"}
    assert (made.rows, sum(split.rows for split in dataset.splits.values())) == (120_000, 120_000)
    assert made.rows_per_s > 0
    train, test = read(tmp_path / "s", "train"), read(tmp_path / "s", "test")
    encoder = OneHotEncoder(handle_unknown="ignore", sparse_output=False, dtype=np.float32).fit(train[2])

    def features(part: tuple[Any, Any, Any]) -> Any:
        return np.concatenate([part[1], np.abs(part[1]), encoder.transform(part[2])], axis=1)

    model = LogisticRegression(max_iter=200).fit(features(train), train[0])
    reached = roc_auc_score(test[0], model.decision_function(features(test)))
    # The model sees 108,000 labels for about 60 parameters, the test split has 6,000 rows.
    assert made.ceilings.best_additive - 0.01 < reached < made.ceilings.best_additive + 0.005
    assert made.ceilings.best - made.ceilings.best_additive >= 0.03
    assert made.ceilings.dense_only < made.ceilings.best_additive


def test_ceilings_are_aucs_of_the_teacher_on_the_test_split(tmp_path: Path, seed: int) -> None:
    made = synthesize(tmp_path / "s", rows=20_000, tables=SMALL, seed=seed, splits={"train": 0.5, "test": 0.5})
    assert made.ceilings is not None
    labels, _, keys = read(tmp_path / "s", "test")
    teacher = Teacher(SMALL, 13, seed, 2, Strengths())
    words, parts = np.empty((10_000, teacher.row_words), np.int32), np.empty((10_000, 3))
    teacher.label(10_000, words, parts)
    np.testing.assert_array_equal(words[:, 0], labels)
    np.testing.assert_array_equal(words[:, 14:], keys)
    np.testing.assert_allclose(made.ceilings.best, roc_auc_score(labels, parts[:, 0]), rtol=1e-12)
    np.testing.assert_allclose(made.ceilings.dense_only, roc_auc_score(labels, parts[:, 2]), rtol=1e-12)


def test_control_permutes_the_keys_and_nothing_else(tmp_path: Path, seed: int) -> None:
    options: dict[str, Any] = {"rows": 9_001, "tables": SMALL, "num_dense": 2, "seed": seed}
    splits = {"all": 1.0}
    generate(tmp_path / "s", **options, splits=splits)
    generate(tmp_path / "c", **options, splits=splits, control=True)
    labels, dense, keys = read(tmp_path / "s", "all")
    control_labels, control_dense, control_keys = read(tmp_path / "c", "all")
    np.testing.assert_array_equal(labels, control_labels)
    np.testing.assert_array_equal(dense, control_dense)
    np.testing.assert_array_equal(np.roll(keys, -4500, axis=0), control_keys)
    ceilings = synthesize(tmp_path / "d", **options, control=True).ceilings
    assert ceilings is not None
    assert ceilings.best == ceilings.best_additive == ceilings.dense_only


@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 40), shares=st.lists(st.floats(0.1, 1), min_size=1, max_size=4))
def test_splits_share_out_all_rows(tmp_path_factory: Any, rows: int, shares: list[float]) -> None:
    splits = {f"s{index}": share for index, share in enumerate(shares)}
    folder = generate(tmp_path_factory.mktemp("s") / "x", rows=rows, tables=SMALL[:2], num_dense=1, splits=splits)
    assert sum(split.rows for split in load_dataset(folder).splits.values()) == rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tables": SMALL[:1]}, "1 tables; interactions need two"),
        ({"tables": (*SMALL, SyntheticTable(rows=0))}, "table 5 has 0 rows"),
        ({"tables": (*SMALL, SyntheticTable(rows=3, exponent=float("nan")))}, "exponent nan"),
        ({"tables": (*SMALL, SyntheticTable(rows=3, hotness=0))}, "hotness 0"),
        ({"rows": 0}, "0 rows in splits"),
        ({"splits": {"train": -1.0, "test": 2.0}}, "needs rows and shares above 0"),
        ({"num_dense": -1}, "-1 dense columns"),
        ({"latent_dim": 0}, "0 latent dimensions"),
        ({"seed": -1}, "seed -1"),
        ({"strengths": Strengths(dense=float("inf"))}, "strengths"),
    ],
)
def test_arguments_out_of_range_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generate(tmp_path / "s", **{"rows": 10, "tables": SMALL, **change})
    assert not (tmp_path / "s").exists()


def test_a_set_is_replaced_only_when_asked(tmp_path: Path) -> None:
    generate(tmp_path, rows=10, tables=SMALL)
    with pytest.raises(DataError, match="holds a data set already"):
        generate(tmp_path, rows=10, tables=SMALL)
    generate(tmp_path, rows=20, tables=SMALL, overwrite=True)
    assert load_dataset(tmp_path).splits["train"].rows == 18
