"""Compiled half of ``pipeline.etl.criteo_text``: lines to columns, integers to dense values.

Every function releases the GIL and is started from a thread pool, one piece of a file a call; none uses numba's own
threads, so that preparing beside a running trainer is safe.

A row of the usual form goes through ``_usual_row``, which looks at eight hexadecimal digits at once; whatever that
one does not understand is looked at again, field by field, by ``_any_row``, which also says what is wrong.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from pipeline.etl.criteo_text import (
    BAD_HEX,
    BAD_INTEGER,
    BAD_LABEL,
    MAX_DIGITS,
    MISSING,
    MISSING_INTEGER,
    NUM_CATEGORICAL,
    NUM_COLUMNS,
    NUM_DENSE,
    OK,
    TOO_FEW,
    TOO_MANY,
)

_TAB, _NEWLINE, _RETURN, _MINUS, _ZERO, _NINE = (ord(c) for c in "\t\n\r-09")
_U = np.uint64
_ONES = _U(0x0101010101010101)
_LONGEST_USUAL_ROW = 2 + NUM_DENSE * (MAX_DIGITS + 2) + NUM_CATEGORICAL * 9 + 2
_SMALL = np.log1p(np.arange(4096, dtype=np.float64)).astype(np.float32)
"""log(1 + k) of the integers that nearly all dense values are."""


@njit(nogil=True, cache=True)
def count_lines(text: Any) -> int:
    """Lines in ``text`` [bytes] uint8; a last line needs no line end."""
    lines = 0
    for byte in text:
        lines += byte == _NEWLINE
    if len(text) > 0 and text[len(text) - 1] != _NEWLINE:
        lines += 1
    return lines


@njit(inline="always")
def _eight_bytes(text: Any, at: Any) -> Any:
    """Eight bytes as one little-endian word; LLVM makes one load of it."""
    return (
        _U(text[at])
        | _U(text[at + _U(1)]) << _U(8)
        | _U(text[at + _U(2)]) << _U(16)
        | _U(text[at + _U(3)]) << _U(24)
        | _U(text[at + _U(4)]) << _U(32)
        | _U(text[at + _U(5)]) << _U(40)
        | _U(text[at + _U(6)]) << _U(48)
        | _U(text[at + _U(7)]) << _U(56)
    )


@njit(inline="always")
def _hex_word(word: Any) -> tuple[bool, Any]:
    """Whether eight characters are hexadecimal digits, and their value.

    Each byte's digit is taken as if it were one; writing that digit again must give the byte back (in lower case),
    or it was none.
    """
    letter = (word >> _U(6)) & _ONES
    digit = (word & _U(0x0F0F0F0F0F0F0F0F)) + letter * _U(9)
    above_nine = ((digit + _ONES * _U(6)) >> _U(4)) & _ONES
    again = digit + _ONES * _U(_ZERO) + above_nine * _U(0x27)
    good = again == (word | letter << _U(5)) and (digit & _U(0xF0F0F0F0F0F0F0F0)) == _U(0)
    pairs = (digit << _U(4) | digit >> _U(8)) & _U(0x00FF00FF00FF00FF)
    fours = (pairs & _U(0x000000FF000000FF)) << _U(8) | (pairs >> _U(16)) & _U(0x000000FF000000FF)
    return good, (fours & _U(0xFFFF)) << _U(16) | (fours >> _U(32)) & _U(0xFFFF)


@njit(inline="always")
def _usual_categories(text: Any, at: Any, row: int, categories: Any) -> Any:
    """The rest of ``_usual_row``, from the first category on."""
    for column in range(NUM_CATEGORICAL):
        last = column == NUM_CATEGORICAL - 1
        if text[at] == _TAB or (last and (text[at] == _NEWLINE or text[at] == _RETURN)):
            categories[column, row] = MISSING
        else:
            good, value = _hex_word(_eight_bytes(text, at))
            if not good:
                return _U(0)
            categories[column, row] = np.int64(value)
            at += _U(8)
        if last:
            if text[at] == _RETURN:
                at += _U(1)
            return at + _U(1) if text[at] == _NEWLINE else _U(0)
        if text[at] != _TAB:
            return _U(0)
        at += _U(1)
    return _U(0)


@njit(inline="always")
def _usual_integer(text: Any, at: Any) -> tuple[Any, Any]:
    """An integer and the place of the tab behind it; place 0 if anything is odd."""
    negative = text[at] == _MINUS
    if negative:
        at += _U(1)
    start = at
    value = np.int64(0)
    while True:
        digit = np.int64(text[at]) - _ZERO
        if digit < 0 or digit > 9 or at - start > _U(MAX_DIGITS):
            break
        value = value * 10 + digit
        at += _U(1)
    if at == start or at - start > _U(MAX_DIGITS) or text[at] != _TAB:
        return value, _U(0)
    return -value if negative else value, at


@njit(nogil=True, cache=True)
def _usual_row(text: Any, at: Any, first: int, row: int, labels: Any, integers: Any, categories: Any) -> Any:
    """Parse one row without looking for the text's end; returns where the next row starts, 0 if anything is odd."""
    labels[row] = 0
    if first == 0:
        label = text[at] - _ZERO
        if label < 0 or label > 1 or text[at + _U(1)] != _TAB:
            return _U(0)
        labels[row] = label
        at += _U(2)
    for column in range(NUM_DENSE):
        if text[at] == _TAB:
            integers[row, column] = MISSING_INTEGER
        else:
            integers[row, column], at = _usual_integer(text, at)
            if at == _U(0):
                return at
        at += _U(1)
    return _usual_categories(text, at, row, categories)


@njit(nogil=True, cache=True)
def _integer(text: Any, start: int, end: int) -> tuple[bool, int]:
    """Whether ``text[start:end]`` is a decimal integer, and its value."""
    negative = start < end and text[start] == _MINUS
    if negative:
        start += 1
    if start == end or end - start > MAX_DIGITS:
        return False, 0
    value = 0
    for place in range(start, end):
        digit = text[place]
        if digit < _ZERO or digit > _NINE:
            return False, 0
        value = value * 10 + (digit - _ZERO)
    return True, -value if negative else value


@njit(nogil=True, cache=True)
def _hex8(text: Any, start: int, end: int) -> Any:
    """The value of eight hexadecimal digits, -1 if it is anything else."""
    if end - start != 8:
        return np.int64(-1)
    good, value = _hex_word(_eight_bytes(text, _U(start)))
    return np.int64(value) if good else np.int64(-1)


@njit(nogil=True, cache=True)
def _field(text: Any, start: int, end: int, column: int, row: int, labels: Any, integers: Any, categories: Any) -> int:
    """Store one field of a row; returns the outcome."""
    if column == 0:
        if end - start != 1 or (text[start] != _ZERO and text[start] != _ZERO + 1):
            return BAD_LABEL
        labels[row] = text[start] - _ZERO
    elif column <= NUM_DENSE:
        integers[row, column - 1] = MISSING_INTEGER
        if start < end:
            good, value = _integer(text, start, end)
            if not good:
                return BAD_INTEGER
            integers[row, column - 1] = value
    elif column < NUM_COLUMNS:
        categories[column - 1 - NUM_DENSE, row] = MISSING
        if start < end:
            value = _hex8(text, start, end)
            if value < 0:
                return BAD_HEX
            categories[column - 1 - NUM_DENSE, row] = value
    else:
        return TOO_MANY
    return OK


@njit(nogil=True, cache=True)
def _any_row(
    text: Any, place: int, first: int, row: int, labels: Any, integers: Any, categories: Any
) -> tuple[int, int, int, int, int]:
    """Parse one row field by field; returns outcome, where the next row starts, column, start and end of a fault."""
    size = len(text)
    column, start = first, place
    labels[row] = 0
    while True:
        while place < size and text[place] != _TAB and text[place] != _NEWLINE:
            place += 1
        line_ends = place == size or text[place] == _NEWLINE
        end = place
        if line_ends and end > start and text[end - 1] == _RETURN:
            end -= 1
        outcome = _field(text, start, end, column, row, labels, integers, categories)
        if outcome != OK:
            return outcome, place, column, start, end
        place += 1
        start = place
        column += 1
        if line_ends:
            break
    if column != NUM_COLUMNS:
        return TOO_FEW, place, column, end, end
    return OK, place, 0, 0, 0


@njit(nogil=True, cache=True)
def parse(text: Any, first: int, labels: Any, integers: Any, categories: Any) -> tuple[int, int, int, int, int]:
    """See ``criteo_text.parse``."""
    place: Any = 0
    row, size = 0, len(text)
    while place < size:
        if size - place > _LONGEST_USUAL_ROW:
            next_row: Any = np.int64(_usual_row(text, _U(place), first, row, labels, integers, categories))
            if next_row > 0:
                place = next_row
                row += 1
                continue
        outcome, next_row, column, start, end = _any_row(text, place, first, row, labels, integers, categories)
        if outcome != OK:
            return outcome, row, column, start, end
        place = next_row
        row += 1
    return OK, row, 0, 0, 0


@njit(nogil=True, cache=True)
def take_modulo(categories: Any, modulo: int) -> None:
    """See ``criteo_text.take_modulo``."""
    for column in range(categories.shape[0]):
        for row in range(categories.shape[1]):
            value = categories[column, row]
            if value >= modulo:
                categories[column, row] = value % modulo


@njit(nogil=True, cache=True)
def transform_dense(integers: Any, floor: int, fill: int, out: Any) -> None:
    """See ``criteo_text.transform_dense``."""
    for row in range(integers.shape[0]):
        for column in range(integers.shape[1]):
            value = integers[row, column]
            if value == MISSING_INTEGER:
                value = fill
            above = max(value - floor, 0)
            if above < len(_SMALL):
                out[row, column] = _SMALL[above]
            else:
                out[row, column] = np.float32(np.log1p(np.float64(above)))
