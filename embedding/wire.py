"""How vectors and gradients look while they travel: as they are, or rounded to 16 bits.

Rounding is to the nearest, ties to even. With ``s`` the sender's scale, a power of two, a finite x arrives as y with

- fp16: ``abs(y - x) <= 2^-11 abs(x) + 2^-25 / s`` while ``abs(x) s <= 65504``; what is larger arrives as
  ``+-65504 / s``, so that rounding never makes an infinity;
- bf16: ``abs(y - x) <= 2^-8 abs(x)`` for normal numbers of float32; s is 1: the exponent is float32's.

Infinities and NaN arrive as such. Tables in float64 are rounded to float32 on the way, which adds ``2^-24 abs(x)``.

Gradients carry the division by the global batch: a scale of that size brings fp16's smallest steps where they are
needed. Values travel as bytes, since carriers know no 16-bit numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dlrm.device import Array, Device
from dlrm.errors import ConfigError

Precision = Literal["fp32", "fp16", "bf16"]

_LARGEST_HALF = 65504.0


@dataclass(frozen=True, slots=True)
class Wire:
    """What rows of D numbers become between two ranks.

    Attributes:
        precision: ``fp32`` leaves rows in the tables' own dtype.
        dtype: of the tables.
        device: where the rows lie.
    """

    precision: Precision
    dtype: np.dtype[Any]
    device: Device

    def __post_init__(self) -> None:
        """Check the precision.

        Raises:
            ConfigError: it is unknown.
        """
        if self.precision not in ("fp32", "fp16", "bf16"):
            raise ConfigError(f"exchange_precision: {self.precision!r} is none of fp32, fp16, bf16")

    @property
    def plain(self) -> bool:
        """Whether rows travel as they are."""
        return self.precision == "fp32"

    def row_bytes(self, dim: int) -> int:
        """Bytes of one row on the way."""
        return dim * (self.dtype.itemsize if self.plain else 2)

    def scale_of(self, global_rows: int) -> float:
        """The factor of gradients: the largest power of two up to the global batch for fp16, else 1."""
        return float(1 << (global_rows.bit_length() - 1)) if self.precision == "fp16" and global_rows > 0 else 1.0

    def encode(self, rows: Array, out: Array, scale: float = 1.0) -> Array:
        """Round rows.

        Args:
            rows: [n, D] C-contiguous.
            out: [n or more, D] uint16.
            scale: factor before rounding, a power of two.

        Returns:
            [n, 2 D] uint8, a view of ``out``.
        """
        half = self.precision == "fp16"
        round_rows(rows.reshape(-1), scale, half, out[: len(rows)].reshape(-1), device=self.device)
        return out[: len(rows)].view(np.uint8)

    def decode(self, words: Array, out: Array, scale: float = 1.0) -> None:
        """Widen rows that were encoded with ``scale``: [n, D] uint16 into ``out`` [n, D]."""
        widen_rows(words.reshape(-1), 1.0 / scale, self.precision == "fp16", out.reshape(-1), device=self.device)


def round_rows(values: Array, scale: float, half: bool, out: Array, *, device: Device) -> None:
    """Round ``values * scale`` to fp16 (``half``) or bf16.

    Args:
        values: [n] float32 or float64.
        scale: a power of two.
        half: fp16, otherwise bf16.
        out: [n] uint16, the bits.
        device: where the arrays lie.
    """
    kernel = device.kernel(__name__, "round_rows")
    operation = kernel if kernel is not None else round_rows_reference
    operation(values, scale, half, out)


def round_rows_reference(values: Array, scale: float, half: bool, out: Array) -> None:
    """The plain form of ``round_rows``."""
    scaled = (values * values.dtype.type(scale)).astype(np.float32)
    if half:
        limited = np.where(np.isinf(scaled), scaled, np.clip(scaled, -_LARGEST_HALF, _LARGEST_HALF))
        out[:] = limited.astype(np.float16).view(np.uint16)
        return
    bits = scaled.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    out[:] = np.where(np.isnan(scaled), (bits >> np.uint32(16)) | np.uint32(0x40), rounded)


def widen_rows(words: Array, factor: float, half: bool, out: Array, *, device: Device) -> None:
    """``out = factor *`` the value of each 16-bit word.

    Args:
        words: [n] uint16, fp16 (``half``) or bf16.
        factor: a power of two.
        half: fp16, otherwise bf16.
        out: [n] float32 or float64.
        device: where the arrays lie.
    """
    kernel = device.kernel(__name__, "widen_rows")
    operation = kernel if kernel is not None else widen_rows_reference
    operation(words, factor, half, out)


def widen_rows_reference(words: Array, factor: float, half: bool, out: Array) -> None:
    """The plain form of ``widen_rows``."""
    values = words.view(np.float16) if half else (words.astype(np.uint32) << np.uint32(16)).view(np.float32)
    out[:] = values.astype(out.dtype) * out.dtype.type(factor)
