"""Public data sets by name: list them, fetch them into the user's cache, prepare them.

A set that is on disk already needs none of this; see ``crosslane prepare`` and ``crosslane data adopt``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dlrm.errors import ConfigError, DataError

# The array libraries load only once a set is prepared: listing and fetching start at once without them.
if TYPE_CHECKING:
    import polars as pl

_DOWNLOAD_TIMEOUT_S = 300

ProgressCallback = Callable[[str, int, int], None]
"""Called with a phase, how much of it is done and how much it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceInfo:
    """A data set that can be fetched.

    Attributes:
        name: what ``fetch`` and ``prepare_source`` call it.
        title: what it is.
        rows: samples.
        download_bytes: size of the download.
        origin: where it is fetched from.
        use: what one may do with it, in a few words.
        licence: the terms; to be shown to whoever fetches it.
    """

    name: str
    title: str
    rows: int
    download_bytes: int
    origin: str
    use: str
    licence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wheel:
    """Files inside a wheel of the package index, each pinned by its SHA-256."""

    requirement: str
    file_name: str
    sha256: str
    members: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    info: SourceInfo
    wheel: _Wheel
    prepare: Callable[[Path, Path, int, bool, ProgressCallback | None], Path]


def list_sources() -> list[SourceInfo]:
    """The data sets that can be fetched."""
    return [source.info for source in _sources().values()]


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/crosslane``, or ``~/.cache/crosslane``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "crosslane"


def fetch(name: str, cache_dir: Path | None = None) -> Path:
    """Fetch a data set, unless the cache holds it intact.

    The download is a wheel of the package index, got by pip without its dependencies; nothing of it is
    installed or run. Where there is no network, the wheel may be put into the cache folder by hand.

    Args:
        name: of the data set.
        cache_dir: where fetched sets lie; ``None``: ``default_cache()``.

    Returns:
        Folder of its files, below ``cache_dir``.

    Raises:
        ConfigError: there is no data set of that name.
        DataError: it cannot be fetched, or what came is not what was pinned.
    """
    source = _source(name)
    cache = cache_dir or default_cache()
    folder = cache / name
    if _intact(folder, source.wheel):
        return folder
    by_hand = cache / source.wheel.file_name
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=cache) as temporary:
            wheel = by_hand if by_hand.exists() else _download(source.wheel, Path(temporary), cache)
            unpacked = Path(temporary) / name
            _unpack(wheel, source.wheel, unpacked)
            (unpacked / "LICENCE.txt").write_text(source.info.licence + "\n", encoding="utf-8")
            if folder.exists():
                shutil.rmtree(folder)
            unpacked.rename(folder)
    except OSError as error:
        raise DataError(
            f"data set {name!r}: cannot be stored in {cache} ({error}); name another cache folder"
        ) from None
    return folder


def prepare_source(
    name: str,
    out: Path,
    *,
    cache_dir: Path | None = None,
    seed: int = 1,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
) -> Path:
    """Fetch a data set if need be, and prepare it.

    Args:
        name: of the data set.
        out: folder of the prepared data set.
        cache_dir: where fetched sets lie; ``None``: ``default_cache()``.
        seed: of the random split.
        overwrite: replace a data set that is in ``out``.
        progress: called now and then.

    Returns:
        ``out``.

    Raises:
        ConfigError: there is no data set of that name.
        DataError: it cannot be fetched or prepared.
    """
    source = _source(name)
    return source.prepare(fetch(name, cache_dir), out, seed, overwrite, progress)


def _source(name: str) -> _Source:
    sources = _sources()
    if name not in sources:
        raise ConfigError(f"data set {name!r}: unknown; `crosslane data list` knows {', '.join(sources)}")
    return sources[name]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _intact(folder: Path, wheel: _Wheel) -> bool:
    files = {folder / Path(member).name: digest for member, digest in wheel.members.items()}
    return all(path.is_file() and _sha256(path) == digest for path, digest in files.items())


def _download(wheel: _Wheel, folder: Path, cache: Path) -> Path:
    by_hand = f"get {wheel.file_name} elsewhere and put it into {cache}"
    if importlib.util.find_spec("pip") is None:
        raise DataError(
            f"{wheel.requirement}: cannot be downloaded, since {sys.executable} has no pip; run "
            f"`{sys.executable} -m ensurepip`, or {by_hand}"
        )
    # A wheel only: building from a source archive would run the package's own code.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), wheel.requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise DataError(
            f"{wheel.requirement}: pip did not download it within {_DOWNLOAD_TIMEOUT_S} s; try again, or {by_hand}"
        ) from None
    path = folder / wheel.file_name
    if done.returncode or not path.is_file():
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1].removeprefix("ERROR: ") if lines else f"exit code {done.returncode}"
        raise DataError(f"{wheel.requirement}: pip could not download it ({reason}); check the network, or {by_hand}")
    return path


def _unpack(path: Path, wheel: _Wheel, folder: Path) -> None:
    """Copy the pinned members out of the wheel, if both are what was pinned."""
    digest = _sha256(path)
    if digest != wheel.sha256:
        raise DataError(
            f"{path.name}: SHA-256 {digest}, but {wheel.sha256} was expected; the file is damaged or not the "
            "original, remove it and fetch again"
        )
    folder.mkdir()
    with zipfile.ZipFile(path) as archive:
        for member, expected in wheel.members.items():
            content = archive.read(member)
            if hashlib.sha256(content).hexdigest() != expected:
                raise DataError(f"{path.name}: {member} is not the file that was expected; remove it and fetch again")
            (folder / Path(member).name).write_bytes(content)


_MOVIELENS_LICENCE = """\
MovieLens 100K, collected by the GroupLens Research Project at the University of Minnesota. For research use only:
no statement or hint of endorsement by the University of Minnesota or GroupLens; publications must acknowledge it;
no redistribution without separate permission; no commercial or revenue-bearing use without permission from a
faculty member of the GroupLens Research Project. No guarantee of correctness or suitability.
Cite: F. Maxwell Harper and Joseph A. Konstan. 2015. The MovieLens Datasets: History and Context. ACM Transactions
on Interactive Intelligent Systems 5, 4, Article 19. https://doi.org/10.1145/2827872
Terms: https://files.grouplens.org/datasets/movielens/ml-100k-README.txt"""


def _prepare_movielens(folder: Path, out: Path, seed: int, overwrite: bool, progress: ProgressCallback | None) -> Path:
    from pipeline.etl.schema import load_schema
    from pipeline.etl.table import prepare_table

    schema = load_schema(Path(__file__).with_name("etl") / "movielens_schema.yaml")
    info = _source("movielens").info
    schema = replace(
        schema, split=replace(schema.split, seed=seed), licence=info.licence, source=f"{info.title}; {info.origin}"
    )
    return prepare_table(schema, {"all": movielens_frame(folder)}, out, overwrite=overwrite, progress=progress)


def movielens_frame(folder: Path) -> pl.DataFrame:
    """The ratings in file order, each with its user's and its film's fields, all as text.

    A release year that is no number of four digits is null.
    """
    import polars as pl

    def read(suffix: str, **names: str) -> pl.DataFrame:
        frame = pl.read_csv(folder / f"ml-100k.{suffix}", separator="\t", quote_char=None, infer_schema=False)
        return frame.select(pl.col(column).alias(name) for name, column in names.items())

    ratings = read("inter", user="user_id:token", item="item_id:token", rating="rating:float", time="timestamp:float")
    users = read(
        "user", user="user_id:token", age="age:token", gender="gender:token", occupation="occupation:token",
        zip="zip_code:token",
    )  # fmt: skip
    items = read("item", item="item_id:token", release_year="release_year:token", genres="class:token_seq")
    year = pl.col("release_year")
    items = items.with_columns(pl.when(year.str.contains(r"^\d{4}$")).then(year).alias("release_year"))
    joined = ratings.join(users, on="user", how="left", maintain_order="left")
    return joined.join(items, on="item", how="left", maintain_order="left")


def _sources() -> dict[str, _Source]:
    folder = "recbole/dataset_example/ml-100k"
    movielens = _Source(
        info=SourceInfo(
            name="movielens",
            title="MovieLens 100K: 100,000 ratings of 1,682 films by 943 users, 1997-1998",
            rows=100_000,
            download_bytes=2_130_151,
            origin=f"PyPI, recbole 1.2.1, {folder}",
            use="research only",
            licence=_MOVIELENS_LICENCE,
        ),
        wheel=_Wheel(
            requirement="recbole==1.2.1",
            file_name="recbole-1.2.1-py3-none-any.whl",
            sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
            members={
                f"{folder}/ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
                f"{folder}/ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
                f"{folder}/ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
            },
        ),
        prepare=_prepare_movielens,
    )
    return {source.info.name: source for source in (movielens,)}
