"""Threads are settled before NumPy and numba load, and random inputs are fresh but can be had again."""

from __future__ import annotations

from pipeline.threads import settle_threads

settle_threads()

import os  # noqa: E402
import secrets  # noqa: E402
from collections.abc import Iterator  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402

try:
    from hypothesis import settings
except ImportError:  # the Python that runs the tests on a GPU may lack it
    pass
else:
    # By default an example that takes 200 ms fails, which a busy machine or a compilation makes of any.
    settings.register_profile("crosslane", deadline=None)
    settings.load_profile("crosslane")

_SEED_KEY = pytest.StashKey[int]()


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A fresh 32-bit seed; ``CROSSLANE_TEST_SEED`` repeats one. A failing test's report names it."""
    value = int(os.environ.get("CROSSLANE_TEST_SEED") or secrets.randbits(32))
    request.node.stash[_SEED_KEY] = value
    return value


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    """A generator seeded by ``seed``."""
    return np.random.default_rng(seed)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Add the seed to a failing test's report."""
    report = yield
    if report.failed and _SEED_KEY in item.stash:
        report.sections.append(("seed", f"repeat with CROSSLANE_TEST_SEED={item.stash[_SEED_KEY]}"))
    return report
