"""The working folder of a preparation: gone on with, or discarded with a word about why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from embedding.comm import SingleComm
from pipeline.etl.criteo import CriteoInputs, prepare_criteo
from pipeline.etl.job import FOLDER, Job
from pipeline.etl.rules import Rules

DESCRIPTION = {"inputs": {"files": [("a", 1)], "fraction": 0.0}, "rules": {"cap": None, "count": "all"}, "name": "x"}
DISCARDED = "is discarded; this one starts from its beginning\n"


def begin(out: Path, **changes: Any) -> Job:
    job = Job(SingleComm(), out, {**DESCRIPTION, **changes}, overwrite=False)
    job.mark("lines.json", [1])
    return job


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"rules": {"cap": 7, "count": "train"}}, "rules.cap, rules.count"),
        ({"inputs": {"files": [("a", 2)], "fraction": 0.0}, "name": "y"}, "inputs.files, name"),
        ({"engine": "nvtabular"}, "engine"),
    ],
)
def test_another_preparation_is_discarded_with_what_is_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], names: str
) -> None:
    begin(tmp_path)
    assert begin(tmp_path).resumed
    assert capsys.readouterr().err == ""
    assert not begin(tmp_path, **changes).resumed
    folder = tmp_path / FOLDER
    told = f"warning: {folder}: an unfinished preparation begun with other {names} {DISCARDED}"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (json.dumps({"identity": "0" * 64, "made": []}), "of a release with marks of another form"),
        ("{", "whose job.json cannot be read"),
    ],
)
def test_marks_of_another_form_are_discarded_with_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, why: str
) -> None:
    begin(tmp_path)
    (tmp_path / FOLDER / "job.json").write_text(text)
    job = Job(SingleComm(), tmp_path, DESCRIPTION, overwrite=False)
    assert not job.resumed
    assert job.read("lines.json") is None
    assert capsys.readouterr().err == f"warning: {tmp_path / FOLDER}: an unfinished preparation {why} {DISCARDED}"


def test_a_folder_with_nothing_in_it_is_no_preparation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / FOLDER / "counts").mkdir(parents=True)
    assert not begin(tmp_path).resumed
    assert capsys.readouterr().err == ""


def test_criteo_begun_with_another_threshold_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "train.tsv"
    rows.write_text(("\t".join(["1", *["5"] * 13, *["0000000a"] * 26]) + "\n") * 5)

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.etl.criteo.publish", stopped)
        with pytest.raises(KeyboardInterrupt):
            prepare_criteo(CriteoInputs(train=[rows]), tmp_path / "out", rules=Rules(frequency_threshold=3))
    prepare_criteo(CriteoInputs(train=[rows]), tmp_path / "out", rules=Rules(frequency_threshold=1))
    assert "begun with other rules.frequency_threshold is discarded" in capsys.readouterr().err
