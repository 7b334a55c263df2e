"""The REST interface: what it accepts, refuses and shows."""

import json
import subprocess
import sys

import pytest

from dlrm.config import parse_run_config


def refusal(bench, **changes):
    body = json.dumps({**bench.body(), **changes})  # the client's own encoder refuses halves of surrogate pairs
    answer = bench.call("POST", "/v1/jobs", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 422, answer.text
    assert bench.call("GET", "/v1/jobs").json()["total"] == 0
    return answer.json()["detail"]


def test_submitting_answers_with_the_job_and_where_it_is(bench):
    answer = bench.call("POST", "/v1/jobs", json=bench.body("first", ranks=2, gpus=0))
    job = answer.json()
    assert answer.status_code == 201
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert (job["state"], job["name"], job["ranks"], job["progress"]) == ("queued", "first", 2, {})
    shown = bench.call("GET", answer.headers["location"]).json()
    config = shown.pop("config")
    assert shown == {key: value for key, value in job.items() if key != "config"}
    assert parse_run_config(config).run.directory == str(bench.settings.jobs / job["id"])


def test_a_data_set_goes_by_name_by_path_or_by_the_config(bench):
    tiny = str(bench.settings.data / "tiny")
    config = {"name": "run", "data": {"batch_size": 64}}
    for body in (
        {"config": config, "dataset": "tiny"},
        {"config": config, "dataset": tiny},
        {"config": {**config, "data": {"path": "tiny"}}},
        {"config": {**config, "data": {"path": "elsewhere"}}, "dataset": "tiny"},
        {"config": {}, "dataset": "tiny"},
    ):
        answer = bench.call("POST", "/v1/jobs", json=body)
        assert answer.status_code == 201, answer.text
        assert answer.json()["dataset"] == tiny


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"optimizer": {"lr": -1}}, "optimizer.lr"),
        ({"optimizer": {"rate": 1}}, "optimizer.rate"),
        ({"train": {"epochs": "many"}}, "train.epochs"),
        ({"data": []}, "data"),
        ({"model": {"top_mlp": [4, 2]}}, "model.top_mlp"),
        ({"run": {"init": "/nowhere/weights.npz"}}, "run.init"),
        ({"run": {"init": "/" + "long" * 1000}}, "run.init"),
        ({"run": {"directory": "/tmp/nul\0"}}, "run.directory"),
        ({"name": "half \ud800"}, "name"),
        ({"embedding": {"tables": {"half \udfff": {}}}}, "embedding.tables"),
    ],
)
def test_a_wrong_config_is_refused_with_the_path_of_the_field(bench, config, field):
    base = {"data": {"path": str(bench.settings.data / "tiny")}}
    detail = refusal(bench, config={**base, **config})
    assert field in detail
    assert "\n" not in detail


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ranks": 0}, ["ranks"]),
        ({"ranks": "2"}, ["ranks"]),
        ({"ranks": 5}, ["ranks", "4"]),
        ({"ranks": 2, "threads_per_rank": 3}, ["6 cores", "4"]),
        ({"gpus": 1}, ["gpus", "0"]),
        ({"dataset": "none-such"}, ["data.path", "none-such"]),
        ({"dataset": "../data/tiny"}, ["data.path", ".."]),
        ({"dataset": "/nowhere"}, ["data.path", "/nowhere"]),
        ({"rank": 2}, ["rank"]),
        ({"config": None}, ["config"]),
        ({"dataset": "long" * 1000}, ["data.path"]),
        ({"dataset": "nul\0"}, ["data.path", "NUL"]),
        ({"name": ""}, ["name"]),
        ({"name": "nul\0"}, ["name", "NUL"]),
    ],
)
def test_what_can_never_run_is_refused(bench, changes, words):
    detail = refusal(bench, **changes)
    assert all(word in detail for word in words)


@pytest.mark.parametrize(
    ("config", "changes", "words"),
    [
        ({"device": "cuda"}, {}, ["gpus: 0", "device is cuda"]),
        ({"precision": "bf16"}, {}, ["gpus: 0", "bf16"]),
        ({"embedding": {"table_precision": "fp16"}}, {}, ["gpus: 0", "fp16"]),
        ({"device": "cpu"}, {"gpus": 1}, ["gpus: 1", "device is cpu"]),
        ({"precision": "fp64"}, {"gpus": 1}, ["gpus: 1", "fp64"]),
        ({"device": "cuda", "precision": "fp64"}, {"gpus": 1}, ["fp64", "CPU"]),
        ({"device": "cuda"}, {"gpus": 2}, ["gpus: 2", "1 rank"]),
    ],
)
def test_a_job_gets_the_gpus_that_its_config_uses(make_bench, config, changes, words):
    bench = make_bench(gpus=("0", "1"))
    own = {"data": {"path": str(bench.settings.data / "tiny")}, **config}
    detail = refusal(bench, config=own, **changes)
    assert all(word in detail for word in words)
    accepted = {"auto": (0, 1, 2), "cuda": (1, 2), "cpu": (0,)}
    for device, counts in accepted.items():
        for gpus in counts:
            body = bench.body(ranks=2, gpus=gpus)
            body["config"]["device"] = device
            assert bench.call("POST", "/v1/jobs", json=body).status_code == 201, (device, gpus)


def test_a_refusal_does_not_repeat_a_long_value(bench):
    config = {"data": {"path": "tiny", "batch_size": "many " * 10_000}}
    assert len(refusal(bench, config=config)) < 400


def test_a_run_directory_that_cannot_be_one_fails_its_job_and_hides_no_other(bench, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / ("long" * 100), tmp_path / "file" / "below"):
        body = bench.body()
        body["config"]["run"] = {"directory": str(folder)}
        answer = bench.call("POST", "/v1/jobs", json=body)
        assert answer.status_code == 201, answer.text
        job_id = answer.json()["id"]
        bench.tick_until(job_id, "failed")
        assert f"folder {folder}: cannot be used" in bench.call("GET", f"/v1/jobs/{job_id}").json()["error"]
        assert bench.call("GET", f"/v1/jobs/{job_id}/progress").json()["complete"] is True
        assert bench.call("GET", f"/v1/jobs/{job_id}/report").status_code == 404
    assert len(bench.call("GET", "/v1/jobs").json()["jobs"]) == 3


def test_one_folder_takes_one_job_however_it_is_spelled(bench, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    body = bench.body()
    answers = []
    for folder in ("run", "link/run", "other/../run", "elsewhere"):
        body["config"]["run"] = {"directory": f"{tmp_path}/{folder}"}
        answers.append(bench.call("POST", "/v1/jobs", json=body).status_code)
    assert answers == [201, 409, 409, 201]


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/nope", 404), ("DELETE", "/v1/jobs", 405)])
def test_a_request_that_does_not_exist_is_told_where_to_look(bench, method, path, status):
    answer = bench.call(method, path, headers={"content-type": "application/json"})
    assert answer.status_code == status
    assert path in answer.json()["detail"]
    assert "/openapi.json" in answer.json()["detail"]


def test_a_batch_smaller_than_the_ranks_is_refused(bench):
    config = {"data": {"path": "tiny", "batch_size": 2}}
    assert "data.batch_size: 2" in refusal(bench, config=config, ranks=3)
    assert bench.call("POST", "/v1/jobs", json=bench.body(config=config, ranks=2)).status_code == 201


def test_a_body_that_is_not_json_is_refused(bench):
    headers = {"content-type": "application/json"}
    answer = bench.call("POST", "/v1/jobs", content=b"{", headers=headers)
    assert (answer.status_code, answer.json()) == (422, {"detail": "body: not JSON"})
    assert bench.call("POST", "/v1/jobs", content=b"[1]", headers=headers).status_code == 422


def test_jobs_are_listed_newest_first_in_pages_and_by_state(bench):
    ids = [bench.submit(f"number {number}") for number in range(5)]
    bench.call("POST", f"/v1/jobs/{ids[1]}/cancel", json={})
    page = bench.call("GET", "/v1/jobs?limit=2&offset=1").json()
    assert [job["id"] for job in page["jobs"]] == [ids[3], ids[2]]
    assert (page["total"], page["limit"], page["offset"]) == (5, 2, 1)
    cancelled = bench.call("GET", "/v1/jobs?state=cancelled").json()
    assert ([job["id"] for job in cancelled["jobs"]], cancelled["total"]) == ([ids[1]], 1)
    assert bench.call("GET", "/v1/jobs?state=odd").status_code == 422
    assert bench.call("GET", "/v1/jobs?limit=0").status_code == 422


@pytest.mark.parametrize("path", ["", "/logs", "/progress", "/report"])
def test_an_unknown_job_is_not_found(bench, path):
    answer = bench.call("GET", f"/v1/jobs/abc123{path}")
    assert answer.status_code == 404
    assert "abc123" in answer.json()["detail"]
    assert bench.call("POST", "/v1/jobs/abc123/cancel", json={}).status_code == 404


def test_logs_come_in_pages_and_by_their_tail(bench):
    job_id = bench.submit()
    assert bench.call("GET", f"/v1/jobs/{job_id}/logs").text == ""
    directory = bench.settings.jobs / job_id
    directory.mkdir()
    lines = [f"line {number} \N{GREEK SMALL LETTER ALPHA}\n" for number in range(20_000)]
    (directory / "output.log").write_text("".join(lines) + "half", encoding="utf-8")
    url = f"/v1/jobs/{job_id}/logs"
    pages, offset = [], 0
    while True:
        answer = bench.call("GET", f"{url}?offset={offset}&limit=50000")
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"
        if not answer.content:
            break
        assert len(answer.content) <= 50_000
        pages.append(answer.content.decode())  # no character is ever torn
        offset = int(answer.headers["x-next-offset"])
    assert len(pages) > 5
    assert "".join(pages) == "".join(lines) + "half"
    assert bench.call("GET", f"{url}?tail=3").text == "".join(lines[-2:]) + "half"
    assert bench.call("GET", f"{url}?tail=15000").text == "".join(lines[-14_999:]) + "half"
    assert bench.call("GET", f"{url}?tail=0").text == ""
    assert bench.call("GET", f"{url}?tail=-1").status_code == 422


def test_progress_goes_on_from_an_offset(bench):
    job_id = bench.submit()
    bench.tick_until(job_id, "succeeded")
    url = f"/v1/jobs/{job_id}/progress"
    everything = bench.call("GET", url).json()
    assert everything["complete"] is True
    assert [record["type"] for record in everything["records"]] == ["start", *["step"] * 3, "eval", "end"]
    records, page = [], {"complete": False, "offset": 0}
    while not page["complete"]:
        page = bench.call("GET", f"{url}?limit=4&offset={page['offset']}").json()
        records += page["records"]
    assert records == everything["records"]


def test_a_line_that_is_still_being_written_is_left_for_later(bench):
    job_id = bench.submit()
    directory = bench.settings.jobs / job_id
    directory.mkdir()
    whole = json.dumps({"type": "step", "step": 1}) + "\n"
    (directory / "progress.jsonl").write_text(whole + '{"type": "st')
    page = bench.call("GET", f"/v1/jobs/{job_id}/progress").json()
    assert (page["records"], page["offset"]) == ([{"type": "step", "step": 1}], len(whole))
    (directory / "progress.jsonl").write_text(whole * 2)
    assert len(bench.call("GET", f"/v1/jobs/{job_id}/progress?offset={len(whole)}").json()["records"]) == 1


def test_the_report_comes_as_page_or_as_json(bench):
    job_id = bench.submit()
    url = f"/v1/jobs/{job_id}/report"
    early = bench.call("GET", url)
    assert early.status_code == 409
    assert "queued" in early.json()["detail"]
    bench.tick_until(job_id, "succeeded")
    page = bench.call("GET", url)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "sandbox" in page.headers["content-security-policy"]
    assert page.text.startswith("<!doctype html>")
    for options in (
        {"headers": {"accept": "application/json"}},
        {"params": {"format": "json"}},
        {"headers": {"accept": "text/html;q=0.5, application/json"}},
        {"params": {"format": "json"}, "headers": {"accept": "text/html"}},
    ):
        answer = bench.call("GET", url, **options)
        assert answer.headers["content-type"] == "application/json"
        assert answer.json()["auc"] == 0.75
    browser = {"accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
    assert bench.call("GET", url, headers=browser).text == page.text
    assert bench.call("GET", url, params={"format": "pdf"}).status_code == 422


def test_a_failed_job_has_no_report_even_where_an_old_one_lies(bench, tmp_path):
    import os

    body = bench.body("fail")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "report.html").write_text("of another run")
    os.utime(mine / "report.html", (1_000_000, 1_000_000))
    body["config"]["run"] = {"directory": str(mine)}
    job_id = bench.call("POST", "/v1/jobs", json=body).json()["id"]
    bench.tick_until(job_id, "failed")
    answer = bench.call("GET", f"/v1/jobs/{job_id}/report")
    assert answer.status_code == 404
    assert "failed" in answer.json()["detail"]


def test_the_description_of_the_interface_is_complete(bench):
    paths = bench.call("GET", "/openapi.json").json()["paths"]
    assert {(path, method) for path, methods in paths.items() for method in methods} == {
        ("/healthz", "get"),
        ("/v1/jobs", "get"),
        ("/v1/jobs", "post"),
        ("/v1/jobs/{job_id}", "get"),
        ("/v1/jobs/{job_id}/cancel", "post"),
        ("/v1/jobs/{job_id}/logs", "get"),
        ("/v1/jobs/{job_id}/progress", "get"),
        ("/v1/jobs/{job_id}/report", "get"),
    }


def test_the_server_loads_no_arrays_and_no_mpi(tmp_path):
    program = (
        "import sys; from pathlib import Path; from service.app import create_app; "
        "from service.settings import Settings; "
        f"app = create_app(Settings(home=Path({str(tmp_path)!r}), cores=1)); app.state.service.store.close(); "
        "print(*{'numpy', 'numba', 'mpi4py', 'cupy', 'polars'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout.split() == []
