"""Launch of the synthetic rows' CUDA kernel; reference in ``generator.py``, whose rows it gives bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dlrm.nvrtc import Defines, load
from pipeline.generator import BYTES_MEAN, BYTES_SCALE, EXP2_SERIES, LATENT_DIM, LOG2_E, STREAM, UNIT

SOURCE = Path(__file__).with_name("generator.cu")
THREADS = 128


def constants() -> Defines:
    """The macros of the source: float32 numbers exactly, in hexadecimal."""
    named = {"BYTES_SCALE": BYTES_SCALE, "LOG2_E": LOG2_E, "UNIT": UNIT}
    named |= {f"EXP2_{power}": coefficient for power, coefficient in enumerate(EXP2_SERIES)}
    floats = tuple((name, f"{float(value).hex()}f") for name, value in named.items())
    return (("LATENT", LATENT_DIM), ("STREAM", f"{STREAM}u"), ("BYTES_MEAN", BYTES_MEAN), *floats)


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
    """See ``generator.generate_records``; arrays are the GPU's, ``seed`` and ``bias`` are NumPy scalars."""
    num_rows, row_words = records.shape
    shape = (np.int64(num_rows), np.int32(linear.size), np.int32(hotness.size), np.int32(row_words))
    tables = (hotness, law_starts, limits, aliases, firsts, sizes, salts, means, scales, linear)
    kernel = load(SOURCE, "generate_records", constants())
    kernel(-(-num_rows // THREADS), THREADS, numbers, seed, *tables, bias, *shape, records, logits)
