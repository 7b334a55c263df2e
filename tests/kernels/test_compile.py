"""Every CUDA source compiles for every architecture that is supported, without a GPU."""

from __future__ import annotations

import importlib.util
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest

from dlrm.errors import DeviceError
from dlrm.nvrtc import Defines, branch_arch, cache_folder, compile_cubin, native_arch

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
SOURCES = sorted(
    str(path.relative_to(ROOT))
    for package in ("dlrm", "embedding", "pipeline")
    for path in (ROOT / package).glob("*.cu")
)


def _variants() -> dict[str, tuple[Defines, ...]]:
    spec = importlib.util.spec_from_file_location("variants", Path(__file__).with_name("variants.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    variants: dict[str, tuple[Defines, ...]] = module.VARIANTS
    return variants


VARIANTS = _variants()


@pytest.fixture
def nvrtc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, so that everything is compiled."""
    pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC has wheels for x86-64 Linux alone")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CROSSLANE_FORCE_ARCH", raising=False)
    return tmp_path


def test_the_variants_are_of_sources_that_exist() -> None:
    assert set(VARIANTS) <= set(SOURCES)


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_compiles(source: str, nvrtc: Path) -> None:
    def start(defines_and_arch: tuple[Defines, str]) -> bytes:
        return compile_cubin(ROOT / source, defines_and_arch[1], defines_and_arch[0])[:4]

    jobs = list(product(VARIANTS.get(source, ((),)), ARCHITECTURES))
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the compiler runs on as many cores as it is called on
        assert list(pool.map(start, jobs)) == [b"\x7fELF"] * len(jobs)


def test_a_source_is_compiled_once(nvrtc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, defines = ROOT / "dlrm/interaction_plain.cu", VARIANTS["dlrm/interaction_plain.cu"][0]
    first = compile_cubin(source, "80", defines)
    (kept,) = cache_folder().iterdir()
    kept.write_bytes(b"kept")
    assert compile_cubin(source, "80", defines) == b"kept"
    monkeypatch.setenv("CROSSLANE_FORCE_ARCH", "80")
    assert compile_cubin(source, "80", defines) == b"kept"
    assert compile_cubin(source, "90a", defines) not in (b"kept", first)
    assert len(list(cache_folder().iterdir())) == 2


def test_a_source_that_does_not_compile_says_why(nvrtc: Path, tmp_path: Path) -> None:
    source = tmp_path / "broken.cu"
    source.write_text("KERNEL void broken() { int x = y; }")
    with pytest.raises(DeviceError, match=r"(?s)broken\.cu.*sm_80.*y"):
        compile_cubin(source, "80")


def test_the_branch_can_be_forced_down_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CROSSLANE_FORCE_ARCH", raising=False)
    assert branch_arch(native_arch("90")) == 90
    monkeypatch.setenv("CROSSLANE_FORCE_ARCH", "80")
    assert branch_arch("90a") == 80
    monkeypatch.setenv("CROSSLANE_FORCE_ARCH", "120")
    assert branch_arch("90a") == 90
    for wrong in ("sm_80", "70"):
        monkeypatch.setenv("CROSSLANE_FORCE_ARCH", wrong)
        with pytest.raises(DeviceError, match=wrong):
            branch_arch("90a")


def test_an_old_gpu_is_refused() -> None:
    with pytest.raises(DeviceError, match=r"7\.5"):
        native_arch("75")
