"""The compiled halves of Criteo's preparation against their references, on fresh random inputs."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.etl import criteo_text, criteo_text_numba, lookup, lookup_numba, tally, tally_numba

ALPHABET = np.frombuffer(b"0123456789abcdefABCDEF\t\n\r-g\x1a\xb5:@G`", np.uint8)


def random_text(rng: np.random.Generator, rows: int, first: int) -> bytes:
    """Rows of which some are odd in one place."""
    lines = []
    for _ in range(rows):
        fields = [b"%d" % rng.integers(2)][first:]
        fields += [b"" if rng.random() < 0.2 else b"%d" % rng.integers(-(10**18) + 1, 10**18) for _ in range(13)]
        fields += [b"" if rng.random() < 0.2 else b"%08x" % rng.integers(2**32) for _ in range(26)]
        lines.append(b"\t".join(fields) + (b"\r" if rng.random() < 0.2 else b""))
    return b"\n".join(lines) + (b"\n" if rng.random() < 0.5 else b"")


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("odd", [False, True])
def test_parse_equals_its_reference(rng: np.random.Generator, first: int, odd: bool) -> None:
    for _ in range(40):
        text = np.frombuffer(random_text(rng, int(rng.integers(1, 12)), first), np.uint8).copy()
        if odd:
            text[rng.integers(len(text))] = rng.choice(ALPHABET)
        rows = criteo_text_numba.count_lines(text)
        assert rows == len(bytes(text).split(b"\n")) - bytes(text).endswith(b"\n")
        found, wanted = ((np.full(rows, 7, np.int32), np.full((rows, 13), 7), np.full((26, rows), 7)) for _ in range(2))
        outcome = criteo_text_numba.parse(text, first, *found)
        assert outcome == criteo_text.parse(text, first, *wanted)
        whole = outcome[1]
        assert odd or (outcome[0], whole) == (criteo_text.OK, rows)
        for one, other in ((found[0], wanted[0]), (found[1], wanted[1]), (found[2].T, wanted[2].T)):
            np.testing.assert_array_equal(one[:whole], other[:whole])


def test_values_equal_their_references(rng: np.random.Generator) -> None:
    integers = np.concatenate([rng.integers(-5, 6000, (200, 13)), rng.integers(-(10**18), 10**18, (50, 13))])
    integers[rng.random(integers.shape) < 0.1] = criteo_text.MISSING_INTEGER
    for floor, fill in ((0, 0), (-2, -2), (-2, 0), (-2, 9000)):
        found, wanted = np.empty(integers.shape, np.float32), np.empty(integers.shape, np.float32)
        criteo_text_numba.transform_dense(integers, floor, fill, found)
        criteo_text.transform_dense(integers, floor, fill, wanted)
        np.testing.assert_array_almost_equal_nulp(found, wanted, nulp=1)
    categories = rng.integers(-1, 2**32, (26, 50))
    found, wanted = categories.copy(), categories.copy()
    modulo = int(rng.integers(1, 2**20))
    criteo_text_numba.take_modulo(found, modulo)
    criteo_text.take_modulo(wanted, modulo)
    np.testing.assert_array_equal(found, wanted)
    assert ((found == -1) == (categories == -1)).all()


@pytest.mark.parametrize("missing_as", [-1, 0])
def test_counting_equals_its_reference_while_the_table_grows(rng: np.random.Generator, missing_as: int) -> None:
    values = rng.integers(-1, 700, 3000) * 6_135_667
    tables = []
    for module in (tally, tally_numba):
        entries, used, missing, done = np.zeros(64, np.uint64), 0, 0, 0
        while done < len(values):
            counted, used, more = module.count(values[done:], missing_as, entries, used)
            done, missing = done + counted, missing + more
            if done < len(values):
                larger = np.zeros(2 * len(entries), np.uint64)
                module.rehash(entries, larger)
                entries = larger
        kept = module.pack(entries)
        tables.append((np.sort(entries[:kept]), used, missing))
    np.testing.assert_array_equal(tables[0][0], tables[1][0])
    assert tables[0][1:] == tables[1][1:]
    given = np.where(values < 0, 0, values) if missing_as == 0 else values[values >= 0]
    found, counts = np.unique(given, return_counts=True)
    np.testing.assert_array_equal(tables[1][0], (found.astype(np.uint64) << np.uint64(32)) | counts.astype(np.uint64))
    assert tables[1][2] == (0 if missing_as == 0 else int((values < 0).sum()))


def test_adding_up_and_ordering_equal_their_references(rng: np.random.Generator) -> None:
    entries = np.sort(
        rng.integers(0, 300, 900).astype(np.uint64) << np.uint64(32) | rng.integers(1, 5, 900).astype(np.uint64)
    )
    for least in (1, 4, 10**6):
        results = []
        for module in (tally, tally_numba):
            values, counts = np.zeros(900, np.uint32), np.zeros(900, np.int64)
            kept = module.add_up(entries, least, values, counts)
            results.append((kept, values, counts))
        assert results[0][0] == results[1][0]
        for one, other in zip(results[0][1:], results[1][1:], strict=True):
            np.testing.assert_array_equal(one, other)
        kept, values, counts = results[0][0], results[0][1][: results[0][0]], results[0][2][: results[0][0]]
        if not kept:
            continue
        steps, sizes = np.unique(counts, return_counts=True)
        steps, starts = steps[::-1].copy(), np.cumsum([0, *sizes[::-1]])[:-1]
        ordered = []
        for module in (tally, tally_numba):
            out = np.zeros(kept, np.uint32)
            module.order_by_count(values, counts, steps, starts.copy(), out)
            ordered.append(out)
        np.testing.assert_array_equal(ordered[0], ordered[1])
        np.testing.assert_array_equal(ordered[0], values[np.lexsort((values, -counts))])


def test_lookups_equal_their_references(rng: np.random.Generator) -> None:
    values = rng.choice(2**20, 500, replace=False).astype(np.uint32)
    sought = np.concatenate([rng.permutation(values.astype(np.int64)), rng.integers(-1, 2**32, 300), [-1]])
    missing = int(rng.integers(1, 501))
    results = []
    for module in (lookup, lookup_numba):
        entries, out = np.zeros(835, np.uint64), np.empty(len(sought), np.int32)
        module.fill(values, 1, missing, entries)
        module.find(sought, entries, missing, -7, out)
        results.append((entries, out))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])
    numbers = {int(value): place for place, value in enumerate(values, 1) if place != missing} | {-1: missing}
    assert results[0][1].tolist() == [numbers.get(value, -7) for value in sought.tolist()]
