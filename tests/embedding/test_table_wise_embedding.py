"""The collection: exchanges for any shape of batch and any number of ranks, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import embedding_cases as ec
import numpy as np
import pytest
import rank_threads
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm.config import OptimizerConfig
from dlrm.device import HostDevice
from dlrm.errors import CommError, ConfigError, DataError
from dlrm.philox import uniform_rows
from embedding.collection import TableWiseEmbedding
from embedding.comm import SingleComm
from embedding.jagged import Jagged
from embedding.plan import TableSpec, plan_table_wise
from embedding.sparse_optim import KINDS
from embedding.topology import share_of


@settings(max_examples=40, deadline=None)
@given(
    ranks=st.integers(1, 5),
    case=st.builds(
        ec.Case,
        seed=st.integers(0, 2**32 - 1),
        rows=st.lists(st.integers(1, 40), min_size=1, max_size=6).map(tuple),
        batches=st.lists(st.integers(1, 14), min_size=1, max_size=3).map(tuple),
        dim=st.integers(1, 5),
        hotness=st.integers(1, 4),
        weighted=st.booleans(),
        kind=st.sampled_from(KINDS),
        dtype=st.sampled_from(["float32", "float64"]),
        key_dtype=st.sampled_from(["int32", "int64"]),
        first=st.integers(0, 1),
        compiled=st.just(False),  # the references: the kernels run over ranks in tests/ranks
    ),
)
def test_any_batch_on_any_number_of_ranks_equals_one_rank(ranks: int, case: ec.Case) -> None:
    results = rank_threads.run_ranks(ranks, lambda comm: ec.check(case, comm))
    owned = [name for tables in results for name in tables if "." not in name]
    assert sorted(owned) == [f"t{i}" for i in range(len(case.rows))]


def test_compiled_and_reference_collections_agree(seed: int) -> None:
    for case in ec.CASES:
        compiled = ec.train(replace(case, seed=seed), SingleComm())
        plain = ec.train(replace(case, seed=seed, compiled=False), SingleComm())
        tolerance = 1e-12 if case.dtype == "float64" else 2e-5
        for mine, other in zip(compiled[0], plain[0], strict=True):
            np.testing.assert_allclose(mine, other, rtol=tolerance, atol=tolerance)
        for name, array in compiled[1].items():
            np.testing.assert_allclose(array, plain[1][name], rtol=tolerance, atol=tolerance, err_msg=name)


def test_bytes_sent_are_those_that_leave_a_rank(seed: int) -> None:
    case = ec.Case(seed=seed, rows=(9, 9, 9), batches=(10,), dim=4)
    sent = [bytes_of for _, _, bytes_of in rank_threads.run_ranks(2, lambda comm: ec.train(case, comm))]
    owned = [2, 1]  # equal tables: the first and the third, the second
    for rank, bytes_of in enumerate(sent):
        other = 1 - rank
        assert bytes_of == {
            "input_dist": 5 * 8 + 5 * owned[other] * 4,
            "output_dist": 5 * owned[rank] * 4 * 4,
            "grad_dist": 5 * owned[other] * 4 * 4,
        }
    assert set(ec.train(case, SingleComm())[2].values()) == {0}


def test_tables_start_from_their_names_whatever_the_ranks(seed: int) -> None:
    case = ec.Case(seed=seed, rows=(30, 5, 70))

    def weights(comm: object) -> dict[str, np.ndarray]:
        return {table.spec.name: table.weight.copy() for table in ec.build(case, comm).tables}

    alone = weights(SingleComm())
    for name, rows in zip(("t0", "t1", "t2"), case.rows, strict=True):
        expected = uniform_rows(seed, f"table.{name}", rows, case.dim, np.float32) / np.sqrt(rows)
        np.testing.assert_allclose(alone[name], expected, rtol=1e-6)
        assert np.abs(alone[name]).max() <= 1 / np.sqrt(rows)
    for tables in rank_threads.run_ranks(3, weights):
        for name, array in tables.items():
            np.testing.assert_array_equal(array, alone[name])


def test_a_table_is_written_in_place_only(seed: int) -> None:
    table = ec.build(ec.Case(seed=seed), SingleComm()).tables[1]
    with pytest.raises(AttributeError):
        table.weight = np.zeros(3)  # type: ignore[misc]
    assert set(table.state) == {"m", "v"}


def one_table(rows: int = 10, ranks: int = 1) -> TableWiseEmbedding:
    specs = [TableSpec(name="first", rows=4, dim=2), TableSpec(name="colour", rows=rows, dim=2)]
    return TableWiseEmbedding(
        specs=specs,
        plan=plan_table_wise(specs, ranks),
        comm=SingleComm(),
        device=HostDevice(1),
        optimizer=OptimizerConfig(),
        dtype=np.float32,
        seed=1,
        first=0,
    )


def keys_of(*keys: int, rows: int, dtype: str = "int32") -> Jagged:
    return Jagged(np.array(keys, dtype), None, None, 2, rows)


@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize("key", [10, -1, 2**31 - 1])
def test_a_key_outside_its_table_is_named(key: int, dtype: str) -> None:
    embedding = one_table()
    buffers = embedding.buffers(3, np.zeros((3, 2, 2), np.float32))
    with pytest.raises(DataError, match=rf"table 'colour': key {key} lies outside its 10 rows"):
        embedding.input_dist(keys_of(0, 1, 2, 3, key, 9, rows=3, dtype=dtype), buffers, 3)


@pytest.mark.parametrize(
    ("keys", "error", "sentence"),
    [
        (keys_of(0, 0, rows=1), CommError, "given 1 of 2 rows, but its share is 2"),
        (Jagged(np.zeros(2, np.int32), None, None, 1, 2), DataError, "keys of 1 tables, but the model has 2"),
        (keys_of(0, 0, 0, rows=2), DataError, "offsets of its bags do not fit 3 keys"),
        (Jagged(np.zeros(4, np.int32), np.arange(4), None, 2, 2), DataError, "4 offsets, but 4 bags need 5"),
        (Jagged(np.zeros(4, np.int32), None, np.ones(3, np.float32), 2, 2), DataError, "3 weights, but 4 keys"),
        (Jagged(np.zeros(4, np.int32), np.array([0, 3, 2, 3, 4]), None, 2, 2), DataError, "table 'first': the offsets"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(keys: Jagged, error: type[Exception], sentence: str) -> None:
    embedding = one_table()
    buffers = embedding.buffers(2, np.zeros((2, 2, 2), np.float32))
    with pytest.raises(error, match=sentence):
        embedding.input_dist(keys, buffers, 2)


def test_more_rows_than_the_buffers_hold_are_refused() -> None:
    embedding = one_table()
    buffers = embedding.buffers(1, np.zeros((1, 2, 2), np.float32))
    with pytest.raises(DataError, match="2 rows, but the buffers hold 1"):
        embedding.input_dist(keys_of(0, 0, 0, 0, rows=2), buffers, 2)


def test_ranks_that_disagree_about_the_batch_find_out(seed: int) -> None:
    case = ec.Case(seed=seed, rows=(9, 9))

    def work(comm: rank_threads.ThreadComm) -> None:
        embedding = ec.build(case, comm)
        total = 4 if comm.rank == 0 else 5
        rows = share_of(total, 2, comm.rank)
        buffers = embedding.buffers(5, np.zeros((5, 3, case.dim), np.float32))
        embedding.input_dist(Jagged(np.zeros(2 * rows, np.int32), None, None, 2, rows), buffers, total)

    with pytest.raises(CommError, match="rows of this batch"):
        rank_threads.run_ranks(2, work)


def test_arrays_of_another_shape_are_refused() -> None:
    embedding = one_table()
    for wrong in (np.zeros((3, 3, 2), np.float32), np.zeros((2, 2, 2), np.float32), np.zeros((3, 2, 2))):
        with pytest.raises(ConfigError, match="vectors: "):
            embedding.buffers(3, wrong)
    with pytest.raises(ConfigError, match="grad_vectors: "):
        embedding.buffers(3, np.zeros((3, 2, 2), np.float32), np.zeros((3, 2, 4), np.float32)[:, :, ::2])


def test_stages_out_of_order_are_refused() -> None:
    embedding = one_table()
    buffers = embedding.buffers(3, np.zeros((3, 2, 2), np.float32))
    with pytest.raises(ConfigError, match="input_dist has not been called"):
        embedding.lookup(buffers)
    embedding.input_dist(keys_of(0, 0, rows=1), buffers, 1)
    with pytest.raises(ConfigError, match="grad_vectors: None"):
        embedding.grad_dist(buffers)


def test_a_plan_for_other_ranks_is_refused() -> None:
    with pytest.raises(ConfigError, match="made for 2 ranks"):
        one_table(ranks=2)
