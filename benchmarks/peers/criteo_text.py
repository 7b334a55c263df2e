"""Writes lines of Criteo's form: label, 13 integers, 26 categories of 8 hexadecimal digits, some of them missing.

    python benchmarks/peers/criteo_text.py ROWS FILE [WIDE]

Categories follow a power law over as many values as Criteo's Terabyte has in each column; in the first WIDE columns
every row has a value of its own. A row is a function of its number.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

DISTINCT = (
    *(227_605_432, 39_060, 17_295, 7_424, 20_265, 3, 7_122, 1_543, 63, 130_229_467, 3_067_956, 405_282, 10),
    *(2_209, 11_938, 155, 4, 976, 14, 292_775_614, 40_790_948, 187_188_510, 590_152, 12_973, 108, 36),
)
EXPONENT = 1.1
_U = np.uint64
_ROW_BYTES = 600
_BLOCK = 20_000
_DIGITS = np.frombuffer(b"0123456789abcdef", np.uint8)


@njit(inline="always")
def _mixed(word: Any) -> Any:
    word = (word ^ (word >> _U(30))) * _U(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> _U(27))) * _U(0x94D049BB133111EB)
    return word ^ (word >> _U(31))


@njit(cache=True)
def _integer(out: Any, at: int, value: int) -> int:
    if value < 0:
        out[at] = ord("-")
        at, value = at + 1, -value
    unit = 1
    while unit * 10 <= value:
        unit *= 10
    while unit > 0:
        out[at] = ord("0") + value // unit % 10
        at, unit = at + 1, unit // 10
    return at


@njit(cache=True)
def fill(first: int, rows: int, distinct: Any, exponent: float, wide: int, out: Any) -> int:
    """Fill ``out`` [bytes] uint8 with the rows from ``first`` on; returns the bytes."""
    at = 0
    for row in range(rows):
        number = _U(first + row)
        base = _mixed(number * _U(0x9E3779B97F4A7C15) + _U(1))
        out[at] = ord("0") + np.int64(base % _U(33) == _U(0))
        at += 1
        for column in range(13):
            out[at] = ord("\t")
            at += 1
            word = _mixed(base + _U(column + 1) * _U(0xD1B54A32D192ED03))
            if word % _U(100) < _U(15 + column):
                continue
            part = ((word >> _U(11)) + _U(1)) * (1.0 / 9007199254740993.0)
            value = int(min((part**-0.9 - 1.0) * (1 + 3 * column), 1e6)) - np.int64(word % _U(40) == _U(3))
            at = _integer(out, at, value)
        for column in range(26):
            out[at] = ord("\t")
            at += 1
            word = _mixed(base + _U(column + 101) * _U(0xD1B54A32D192ED03))
            if word % _U(64) < _U(column % 4):
                continue
            if column < wide:
                category = (number * _U(2_654_435_761) + _U(column) * _U(77_777)) & _U(0xFFFFFFFF)
            else:
                part = (word >> _U(11)) * (1.0 / 9007199254740992.0)
                power = 1.0 - exponent
                rank = (1.0 + part * ((distinct[column] + 1.0) ** power - 1.0)) ** (1.0 / power)
                category = _mixed(_U(int(rank) - 1) + _U(column) * _U(0x9E3779B97F4A7C15)) & _U(0xFFFFFFFF)
            for digit in range(8):
                out[at] = _DIGITS[np.int64((category >> _U(28 - 4 * digit)) & _U(15))]
                at += 1
        out[at] = ord("\n")
        at += 1
    return at


def write_rows(path: Path, rows: int, wide: int = 0) -> Path:
    """Write a file, unless it is there."""
    if path.exists():
        return path
    unfinished = path.with_suffix(".part")
    block = np.empty(_ROW_BYTES * _BLOCK, np.uint8)
    distinct = np.array(DISTINCT, np.float64)
    with unfinished.open("wb") as file:
        for first in range(0, rows, _BLOCK):
            size = fill(first, min(_BLOCK, rows - first), distinct, EXPONENT, wide, block)
            file.write(block[:size].data)
    return unfinished.rename(path)


if __name__ == "__main__":
    write_rows(Path(sys.argv[2]), int(sys.argv[1]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
