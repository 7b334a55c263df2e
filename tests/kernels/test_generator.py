"""The CUDA source of the synthetic rows, run by a C++ compiler thread after thread: the rows of the CPU's generator.

What it does on a GPU is tests/gpu/test_generator.py's to show.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import generator_cuda
from pipeline.dataset import load_dataset
from pipeline.generator import Generator

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENTRY = """
#include "emulation.h"
#include "{source}"
extern "C" void emulate(
    unsigned blocks, unsigned threads, const int64* numbers, uint64 seed, const int64* hotness, const int64* starts,
    const uint64* limits, const int64* aliases, const uint64* firsts, const uint64* sizes, const uint64* salts,
    const float* means, const float* scales, const float* linear, float bias, int64 rows, int dense, int tables,
    int words, uint32* records, float* logits) {{
  launch(blocks, threads, generate_records, numbers, seed, hotness, starts, limits, aliases, firsts, sizes, salts,
         means, scales, linear, bias, rows, dense, tables, words, records, logits);
}}
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Any:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler to run the CUDA source with")
    folder = tmp_path_factory.mktemp("emulated")
    (folder / "entry.cpp").write_text(ENTRY.format(source=generator_cuda.SOURCE))
    macros = [f"-D{name}={value}" for name, value in generator_cuda.constants()]
    command = [compiler, "-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-w", f"-I{HERE}", f"-I{ROOT}"]
    subprocess.run(
        [*command, *macros, str(folder / "entry.cpp"), "-o", str(folder / "emulated.so")], check=True, timeout=300
    )
    library = ctypes.CDLL(str(folder / "emulated.so"))

    def call(blocks: int, threads: int, *arguments: Any) -> None:
        types = {
            np.uint64: ctypes.c_uint64,
            np.int64: ctypes.c_int64,
            np.int32: ctypes.c_int,
            np.float32: ctypes.c_float,
        }
        library.emulate(
            ctypes.c_uint(blocks),
            ctypes.c_uint(threads),
            *(
                ctypes.c_void_p(argument.ctypes.data)
                if isinstance(argument, np.ndarray)
                else types[type(argument)](argument.item())
                for argument in arguments
            ),
        )

    return call


@pytest.mark.parametrize("num_dense", [0, 5, 13])
def test_the_cuda_source_makes_the_cpus_rows(
    kernel: Any, num_dense: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generator_cuda, "load", lambda *_: kernel)
    sizes = [1, 2, 64, 65, 1000, 40_000_000, 2**31, *rng.integers(1, 10**6, 5).tolist()]
    hotness = rng.integers(1, 4, len(sizes)).tolist()
    generator = Generator(sizes, hotness, rng.uniform(0, 2, len(sizes)).tolist(), num_dense, int(rng.integers(2**63)))
    for numbers in (rng.integers(0, 2**62, 1000), np.arange(129), np.empty(0, np.int64)):
        expected = np.empty((numbers.size, generator.row_words), np.uint32)
        logits = generator.write(numbers, expected)
        records, found = np.full_like(expected, 0xFFFFFFFF), np.full_like(logits, np.nan)
        generator_cuda.generate_records(numbers, *generator.constants, records, found)
        np.testing.assert_array_equal(records, expected)
        np.testing.assert_array_equal(found.view(np.uint32), logits.view(np.uint32))


def test_the_cuda_source_makes_criteos_rows(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator_cuda, "load", lambda *_: kernel)
    split = load_dataset("synthetic:criteo-terabyte?rows=3000&exponent=1.45").split("train")
    batch = split.read(slice(100, 1100))
    records, logits = np.empty((1000, 40), np.uint32), np.empty(1000, np.float32)
    generator = split.made().generator
    generator_cuda.generate_records(np.arange(100, 1100), *generator.constants, records, logits)
    np.testing.assert_array_equal(records[:, 0], batch.labels)
    np.testing.assert_array_equal(records[:, 1:14].view(np.float32), batch.dense)
    np.testing.assert_array_equal(records[:, 14:].T.reshape(-1).view(np.int32), batch.keys.keys)
