"""The report: its keys, a page that needs nothing else, and every undefined case."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from dlrm.errors import CrosslaneError
from embedding.comm import SingleComm
from pipeline.metrics import evaluate_scores
from pipeline.report import (
    MAX_STEP_RECORDS,
    build_report,
    dataset_rows,
    duration,
    render_html,
    run_rows,
    stage_rows,
    write_report,
)

PROMISED = {
    *("auc", "log_loss", "normalized_entropy", "calibration", "accuracy", "base_rate", "samples", "positives"),
    *("samples_per_s", "seconds", "config", "dataset", "curves", "history", "run"),
}
VOID = {"meta", "link", "br", "hr", "img", "input"}


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


def step_records(count):
    return [
        {"type": "step", "step": 10 * i, "epoch": 0, "samples": 320 * i, "samples_per_s": 1e4, "loss": 0.5, "lr": 0.1}
        for i in range(1, count + 1)
    ]


def full_report(rng, **changes):
    logits = rng.normal(-1, 1, 3_000).astype(np.float32)
    labels = rng.random(3_000) < 1 / (1 + np.exp(-logits))
    metrics, curves = evaluate_scores(logits, labels, SingleComm())
    values = {
        "metrics": metrics,
        "curves": curves,
        "seconds": 61.5,
        "samples_per_s": 12_345.6,
        "config": {"name": "trial", "optimizer": {"lr": 0.5}},
        "dataset_summary": {"name": "clicks", "num_dense": 13, "splits": {"test": 3_000}, "notes": ["a note"]},
        "history": [
            *step_records(40),
            {"type": "eval", "step": 200, "split": "validation", "metrics": {"auc": 0.7}},
            {"type": "eval", "step": 400, "split": "validation", "metrics": {"auc": 0.75}},
        ],
        "run_info": {
            "split": "test",
            "ranks": 2,
            "reason": "finished",
            "stages_ms": {"lookup": 2.0, "loss": 0.5},
            "plan": [{"table": "C1", "rows": 1_000, "rank": 0}],
        },
        **changes,
    }
    return build_report(**values)


def nothing_evaluated(logits, labels, **values):
    metrics, curves = evaluate_scores(np.array(logits, np.float32), labels, SingleComm())
    return build_report(metrics=metrics, curves=curves, seconds=0.1, config={}, dataset_summary={}, **values)


def test_json_holds_what_is_promised(rng, tmp_path) -> None:
    report = full_report(rng)
    json_file, html_file = write_report(tmp_path / "new" / "run", report)
    assert (json_file.name, html_file.name) == ("report.json", "report.html")
    stored = json.loads(json_file.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(name))
    assert set(stored) >= PROMISED
    assert stored == report
    assert set(stored["curves"]) == {"roc", "precision_recall", "average_precision", "calibration", "histogram"}
    assert sorted(path.name for path in json_file.parent.iterdir()) == ["report.html", "report.json"]


def test_the_page_needs_nothing_else(rng) -> None:
    text = render_html(full_report(rng))
    page = Page(text)
    assert not page.all("script")
    assert not page.all("link")
    assert not page.all("img")
    for _, attributes in page.tags:
        assert not {"src", "href", "srcset", "xlink:href"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"https?://|@import|url\((?!#)", text)


def test_the_page_shows_every_chart_accessibly(rng) -> None:
    page = Page(render_html(full_report(rng)))
    charts = page.all("svg")
    assert len(charts) == 6
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    for chart in charts:
        assert chart["role"] == "img"
        assert set((chart["aria-labelledby"] or "").split()) <= set(identifiers)
    for word in ("False positive rate", "Recall", "Mean prediction", "Log loss", "AUC during training", "C1", "lookup"):
        assert word in page.text


def test_the_page_shows_the_numbers(rng) -> None:
    report = full_report(rng)
    page = Page(render_html(report))
    for number in (
        f"{report['auc']:.5f}",
        f"{report['log_loss']:.5f}",
        f"{report['calibration']:.4f}",
        "12,346",
        "61.5 s",
    ):
        assert number in page.text
    assert "lr: 0.5" in page.text


def test_chart_points_stand_where_the_numbers_say(rng) -> None:
    report = full_report(rng)
    text = render_html(report)
    roc = text[text.index('aria-labelledby="roc-curve') :]
    line = re.search(r'class="line tone-a" d="M([^"]+)"', roc)
    assert line
    points = np.array([[float(n) for n in point.split()] for point in line[1].split("L")])
    # The frame spans x 58 .. 544 and y 324 .. 34.
    expected_x = 58 + np.array(report["curves"]["roc"]["false_positive_rate"]) * 486
    expected_y = 324 - np.array(report["curves"]["roc"]["true_positive_rate"]) * 290
    np.testing.assert_allclose(points[:, 0], expected_x, atol=0.051)
    np.testing.assert_allclose(points[:, 1], expected_y, atol=0.051)


def test_text_from_outside_is_escaped(rng) -> None:
    evil = "<script>alert(1)</script>"
    report = full_report(
        rng,
        config={"name": evil, "note": evil},
        dataset_summary={"name": evil, "notes": [evil], "source": evil, "licence": evil},
        history=[{"type": "eval", "step": 1, "split": evil, "metrics": {"auc": 0.5}}],
        run_info={"split": evil, evil: evil, "plan": [{evil: evil}], "stages_ms": {evil: 1.0}},
    )
    text = render_html(report)
    assert "<script" not in text
    assert Page(text).text.count(evil) >= 10


def test_what_is_said_of_the_data_stands_apart_from_the_tables(rng) -> None:
    values = {"num_dense": 0, "dense_dtype": "float32", "dense_transform": "as_is", "key_dtype": "int64"}
    licence = "For research use only.\nNo redistribution."
    report = full_report(
        rng, dataset_summary={**values, "licence": licence, "source": "somewhere", "notes": ["a note"]}
    )
    labels = [label for label, _ in dataset_rows(report["dataset"])]
    assert labels == ["Dense columns", "Key type"]  # nothing of columns that are not there
    text = Page(render_html(report)).text
    assert all(words in text for words in (licence, "somewhere", "a note", "How it was prepared (1)"))


@pytest.mark.parametrize(("longest", "shown"), [(0.25, ["0.250", "0.004"]), (12.0, ["12.00", "0.00"])])
def test_short_stages_are_told_to_a_microsecond(longest, shown) -> None:
    assert [row["ms"] for row in stage_rows({"lookup": longest, "loss": 0.004})] == shown


def test_no_rows_still_make_a_page() -> None:
    report = nothing_evaluated([], [])
    assert report["auc"] is None
    page = Page(render_html(report))
    assert "not defined: no rows" in page.text
    assert page.all("svg") == []


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_still_makes_a_page(label) -> None:
    page = Page(render_html(nothing_evaluated([0.5, 1.0, -40.0], [label] * 3)))
    assert "one class only" in page.text
    assert len(page.all("svg")) == 2
    assert "nan" not in page.text.lower()


@pytest.mark.parametrize("logits", [[3e38, -3e38], [0.0, 0.0], [80.0, 90.0], [-100.0, 100.0]])
def test_extreme_scores_still_make_a_page(logits) -> None:
    text = render_html(nothing_evaluated(logits, [0, 1]))
    Page(text)
    assert not re.search(r'd="[^"]*(nan|inf)', text)


@pytest.mark.parametrize(
    "history",
    [
        [{"type": "step", "step": 1, "loss": None}, {"type": "step", "step": 2, "loss": math.nan}],
        [{"type": "step", "step": 1, "loss": 0.5}, {"type": "step", "step": 2, "loss": 0.5}],
        [{"type": "eval", "step": 0, "split": "test", "metrics": {"auc": None}}],
        [{"type": "eval", "step": 0, "split": "test", "metrics": {"auc": 0.5}}],
    ],
    ids=["no loss", "flat loss", "no auc", "one auc at step 0"],
)
def test_any_history_makes_a_page(rng, history) -> None:
    text = render_html(full_report(rng, history=history))
    Page(text)
    assert not re.search(r'="[^"]*(nan|inf)[^a-z]', text)


def test_numbers_that_are_not_finite_become_null(rng) -> None:
    report = full_report(rng, config={"a": math.nan, "b": [math.inf, 1.0]}, seconds=2.0)
    assert report["config"] == {"a": None, "b": [None, 1.0]}


def test_long_histories_are_thinned_to_the_last(rng) -> None:
    records = step_records(3 * MAX_STEP_RECORDS + 1)
    evaluation = {"type": "eval", "step": 5, "split": "test", "metrics": {"auc": 0.5}}
    history = full_report(rng, history=[*records, evaluation])["history"]
    steps = [record["step"] for record in history if record["type"] == "step"]
    assert MAX_STEP_RECORDS / 2 < len(steps) <= MAX_STEP_RECORDS + 1
    assert steps[-1] == records[-1]["step"]
    assert evaluation in history


def test_a_report_replaces_an_older_one_whole(rng, tmp_path) -> None:
    write_report(tmp_path, full_report(rng))
    second = full_report(rng)
    write_report(tmp_path, second)
    assert json.loads((tmp_path / "report.json").read_text())["auc"] == second["auc"]


def test_a_folder_that_cannot_be_written_is_named(rng, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CrosslaneError, match=r"report .*file.*name a folder that can be written"):
        write_report(tmp_path / "file", full_report(rng))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0123, "12 ms"), (61.5, "61.5 s"), (125, "2 min 05 s"), (7265, "2 h 01 min"), (None, "\N{EN DASH}")],
)
def test_durations_read_well(seconds, text) -> None:
    assert duration(seconds) == text


def test_the_table_of_the_run_tells_device_precision_and_skipped_steps(rng) -> None:
    config = {"name": "trial", "precision": "fp16", "loss_scale": "dynamic", "embedding": {"table_precision": "fp16"}}
    run = {"split": "test", "device": "Some GPU", "skipped_steps": 7, "carrier": "nccl", "overflows": 0}
    rows = dict(run_rows(full_report(rng, config=config, run_info=run)))
    assert rows["Device"] == "Some GPU"
    assert rows["Precision"] == "fp16, loss scale dynamic"
    assert rows["Steps skipped"] == "7"
    assert (rows["Exchange between GPUs"], rows["Batches run again"]) == ("nccl", "0")
    narrow = {**config, "embedding": {"table_precision": "bf16"}, "loss_scale": 1024.0}
    rows = dict(run_rows(full_report(rng, config=narrow, run_info={"split": "test"})))
    assert rows["Precision"] == "fp16, tables bf16, loss scale 1024.0"
    assert not {"Device", "Steps skipped", "Exchange between GPUs", "Batches run again"} & set(rows)
