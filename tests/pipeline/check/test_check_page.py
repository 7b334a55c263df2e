"""The page of a check: one file that needs nothing else, with every chart, whatever the set; also in a real browser."""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from dlrm.errors import CrosslaneError
from pipeline.check.dataset import check_dataset
from pipeline.check.page import MOST_CHARTS, render_check, write_check
from pipeline.manifest import TableInfo
from pipeline.writer import DatasetWriter

VOID = {"meta", "link", "br", "hr", "img", "input"}
EVIL = "<script>alert(1)</script>"


class Page(HTMLParser):
    """What a page holds; refuses tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def written(folder: Path, rng: np.random.Generator, *, name: str = "clicks", split: str = "test") -> Path:
    """A set of two dense columns and two tables, the first of which falls as a power law."""
    tables = [TableInfo(name=f"{name} T{t}", rows=rows) for t, rows in enumerate((40, 300))]
    with DatasetWriter(folder, name=name, dense_names=[f"{name} d0", "d-0", "d 0"], tables=tables) as writer:
        for part, count in (("train", 3000), (split, 500)):
            keys = np.stack([rng.choice(40, count, p=power(40)), rng.integers(0, 300, count)], axis=1)
            writer.write(part, rng.integers(0, 2, count), rng.normal(size=(count, 3)).astype(np.float32), keys)
        writer.finish()
    return folder


def power(rows: int) -> np.ndarray:
    shares = 1.0 / np.arange(1, rows + 1)
    return shares / shares.sum()


def test_the_page_needs_nothing_else_and_shows_every_chart(tmp_path: Path, rng: np.random.Generator) -> None:
    values = check_dataset(written(tmp_path / "set", rng))
    text = render_check(values)
    page = Page(text)
    assert not any(page.all(tag) for tag in ("script", "link", "img", "iframe"))
    for _, attributes in page.tags:
        assert not {"src", "href", "srcset", "xlink:href"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert len(page.all("svg")) == 3 + 2 + 1  # dense columns, tables, unseen look-ups
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))  # also of columns whose names differ by a hyphen
    assert not re.search(r'="[^"]*(nan|inf)[^a-z]', text)
    for word in (
        "checksums",
        "Sound",
        "3,500",
        "test",
        "Rank by frequency",
        f"exponent {values['tables'][0]['exponent']:.2f}",
    ):
        assert word in page.text


def test_the_points_of_a_frequency_curve_stand_where_the_counts_say(tmp_path: Path, rng: np.random.Generator) -> None:
    values = check_dataset(written(tmp_path / "set", rng))
    text = render_check(values)
    chart = text[text.index('aria-labelledby="table-0') :]
    line = re.search(r'class="line tone-a" d="M([^"]+)"', chart)
    assert line
    points = np.array([[float(number) for number in point.split()] for point in line[1].split("L")])
    curve = values["tables"][0]["curve"]
    ends = [math.ceil(math.log10(max(curve[part])) - 1e-9) for part in ("rank", "count")]
    # The frame spans x 58 .. 544 and y 324 .. 34.
    np.testing.assert_allclose(points[:, 0], 58 + np.log10(curve["rank"]) / ends[0] * 486, atol=0.051)
    np.testing.assert_allclose(points[:, 1], 324 - np.log10(curve["count"]) / ends[1] * 290, atol=0.051)


def test_text_from_outside_is_escaped(tmp_path: Path, rng: np.random.Generator) -> None:
    values = check_dataset(written(tmp_path / "set", rng, name=EVIL))
    values["checks"][0]["detail"] = EVIL
    text = render_check(values)
    assert "<script" not in text
    assert Page(text).text.count(EVIL) >= 8


@pytest.mark.parametrize("kind", ["no manifest", "empty split", "faulty", "one split", "no tables", "no dense columns"])
def test_any_set_makes_a_page(tmp_path: Path, rng: np.random.Generator, kind: str) -> None:
    folder = written(tmp_path / "set", rng)
    if kind == "no manifest":
        (folder / "dataset.json").write_text("{}")
    elif kind in ("faulty", "one split", "empty split"):
        if kind == "faulty":
            (folder / "test.bin").unlink()
            words = np.fromfile(folder / "train.bin", np.int32).reshape(3000, -1)
            words[:, 1], words[:, 4], words[:, 0] = np.float32(np.nan).view(np.int32), -5, 9
            words.tofile(folder / "train.bin")
        manifest = json.loads((folder / "dataset.json").read_text())
        if kind == "one split":
            del manifest["splits"]["test"]
        if kind == "empty split":
            (folder / "train.bin").write_bytes(b"")
            manifest["splits"]["train"] = {"rows": 0, "files": [{"path": "train.bin", "rows": 0, "bytes": 0}]}
        (folder / "dataset.json").write_text(json.dumps(manifest))
    else:
        names, tables = (["d"], []) if kind == "no tables" else ([], [TableInfo(name="T", rows=3)])
        with DatasetWriter(folder, name="x", dense_names=names, tables=tables, overwrite=True) as writer:
            keys = np.ones((5, len(tables)), np.int64)
            writer.write("train", np.ones(5), np.full((5, len(names)), 2.5, np.float32), keys)
            writer.finish()
    values = check_dataset(folder)
    json_file, html_file = write_check(tmp_path / "out", values)
    text = html_file.read_text(encoding="utf-8")
    Page(text)
    assert not re.search(r'="[^"]*(nan|inf)[^a-z]', text)
    stored = json.loads(json_file.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(name))
    assert stored["status"] == values["status"]
    assert (values["status"] == "failed") == (kind in ("no manifest", "faulty"))


def test_many_columns_leave_charts_out(tmp_path: Path, rng: np.random.Generator) -> None:
    values = check_dataset(written(tmp_path / "set", rng))
    values["tables"] = values["tables"][:1] * (MOST_CHARTS + 7)
    page = Page(render_check(values))
    assert len(page.all("svg")) == 3 + MOST_CHARTS + 1
    assert "7 more columns and tables have no chart here" in page.text


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, rng: np.random.Generator) -> None:
    values = check_dataset(written(tmp_path / "set", rng))
    (tmp_path / "file").write_text("")
    with pytest.raises(CrosslaneError, match=r"report .*file.*--no-report"):
        write_check(tmp_path / "file", values)


def test_a_browser_draws_the_page_within_its_width(tmp_path: Path, rng: np.random.Generator) -> None:
    browser = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )
    if browser is None:
        pytest.skip("no Chromium on this machine")
    _, page = write_check(tmp_path / "out", check_dataset(written(tmp_path / "set", rng)))
    probe = tmp_path / "probe.html"
    # A script of the test's own measures; the page itself has none.
    script = (
        "<script>addEventListener('load', () => { const r = document.documentElement; document.title = "
        "[r.scrollWidth <= r.clientWidth, [...document.querySelectorAll('svg')].every(s => s.getBoundingClientRect()"
        ".width > 200)].join() + document.querySelectorAll('svg').length })</script></body>"
    )
    probe.write_text(page.read_text(encoding="utf-8").replace("</body>", script), encoding="utf-8")
    common = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    for size in ("1280,900", "420,900"):
        done = subprocess.run(
            [*common, f"--window-size={size}", "--dump-dom", probe.as_uri()], capture_output=True, text=True, timeout=60
        )
        assert "<title>true,true6</title>" in done.stdout, done.stdout[:300]
    picture = tmp_path / "page.png"
    subprocess.run(
        [*common, "--window-size=1000,2000", f"--screenshot={picture}", page.as_uri()], capture_output=True, timeout=60
    )
    assert struct.unpack(">II", picture.read_bytes()[16:24]) == (1000, 2000)
