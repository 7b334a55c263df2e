"""Sums of a data set's files, which find damage: ``xxh128:<32 digits>``, or ``sha256:<64>`` of older sets.

A sum here is no defence against somebody who may change the files, for he may change the manifest too; what is fetched
from elsewhere is held against SHA-256 (``pipeline.sources``). XXH3 with 128 bits sums some 30 GB/s a core, SHA-256 two,
which is less than a disk writes, and no file's SHA-256 can be shared out among cores.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Protocol

from dlrm.errors import ConfigError, DataError

PATTERN = r"^(xxh128:[0-9a-f]{32}|sha256:[0-9a-f]{64})$"
_NAMES = {"xxh128": "XXH128", "sha256": "SHA-256"}
_BLOCK_BYTES = 1 << 20


class _Hash(Protocol):
    def update(self, data: Any, /) -> object: ...

    def hexdigest(self) -> str: ...


class Checksum:
    """A sum in the making.

    Attributes:
        algorithm: ``xxh128`` or ``sha256``.
    """

    def __init__(self, algorithm: str | None = None) -> None:
        """Start one.

        Args:
            algorithm: ``None``: ``xxh128``, or ``sha256`` where the package ``xxhash`` is missing.

        Raises:
            ConfigError: ``xxh128`` is asked for, but the package is missing.
        """
        self._hash: _Hash
        try:
            if algorithm != "sha256":
                from xxhash import xxh3_128  # not needed to train from files that nobody verifies

                self.algorithm, self._hash = "xxh128", xxh3_128()
                return
        except ImportError:
            if algorithm is not None:
                raise ConfigError(
                    "sums of kind xxh128 need the package xxhash; install it, or leave the check of sums out"
                ) from None
        self.algorithm, self._hash = "sha256", hashlib.sha256()

    def update(self, data: Any) -> None:
        """Add bytes; other threads run meanwhile."""
        self._hash.update(data)

    def text(self) -> str:
        """``<algorithm>:<hexadecimal digits>`` of what was added."""
        return f"{self.algorithm}:{self._hash.hexdigest()}"


def algorithm_of(checksum: str) -> str:
    """``xxh128`` or ``sha256``."""
    return checksum.partition(":")[0]


def checksum_fault(path: Path, found: str, wanted: str) -> str:
    """What to say of a file whose sum is another one of the same algorithm."""
    algorithm, _, digits = found.partition(":")
    return (
        f"{path}: {_NAMES[algorithm]} {digits}, but the manifest says {wanted.partition(':')[2]}; copy the file again "
        "or prepare the data set again"
    )


def file_checksum(path: Path, algorithm: str | None = None) -> str:
    """The sum of a file.

    Args:
        path: the file.
        algorithm: as for ``Checksum``.

    Raises:
        ConfigError: the algorithm needs a package that is missing.
        DataError: it cannot be read.
    """
    checksum = Checksum(algorithm)
    buffer = memoryview(bytearray(_BLOCK_BYTES))
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                checksum.update(buffer[:count])
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; restore the file") from None
    return checksum.text()
