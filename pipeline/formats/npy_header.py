"""The header of a .npy file."""

from __future__ import annotations

import tokenize
from typing import IO, Any, cast

from numpy.lib import format as npy


def read_npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, Any]:
    """Shape, whether it is stored column by column, and type; the file then stands at the first value.

    Raises:
        ValueError: it is none, whatever NumPy makes of it: a header is a Python expression, and a damaged one fails in
            as many ways.
    """
    try:
        version = npy.read_magic(file)
        header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        return cast("tuple[tuple[int, ...], bool, Any]", header(file))
    except (SyntaxError, tokenize.TokenError, RecursionError) as error:
        raise ValueError(f"the header is no Python expression ({error})") from None
