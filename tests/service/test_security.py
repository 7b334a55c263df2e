"""Who may talk to the service: addresses, tokens, Host, Origin, content type, size."""

import pytest

from dlrm.errors import ConfigError
from service.settings import Settings, available_gpus, client_address, load_settings

TOKEN = "open-sesame-0123456789"


@pytest.fixture
def guarded(make_bench):
    """A service that other machines reach."""
    return make_bench(host="192.0.2.1", token=TOKEN, allowed_hosts=("train.example",))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "train.example"])  # noqa: S104
def test_another_address_is_refused_without_a_token(tmp_path, host):
    with pytest.raises(ConfigError, match="no token"):
        Settings(home=tmp_path, cores=1, host=host)
    assert Settings(home=tmp_path, cores=1, host=host, token=TOKEN).token == TOKEN


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.53", "::1", "localhost"])
def test_loopback_needs_no_token(tmp_path, host):
    assert Settings(home=tmp_path, cores=1, host=host).token is None


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/jobs/abc/report", "/openapi.json"])
def test_everything_but_health_needs_the_token(guarded, path):
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {TOKEN}"}):
        answer = guarded.call("GET", path, headers=headers)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
    assert guarded.call("GET", path, headers={"authorization": f"Bearer {TOKEN}"}).status_code != 401
    assert guarded.call("GET", "/healthz").status_code == 200


def test_a_submission_without_the_token_changes_nothing(guarded):
    assert guarded.call("POST", "/v1/jobs", json=guarded.body()).status_code == 401
    assert guarded.store.page()[1] == 0
    headers = {"authorization": f"Bearer {TOKEN}"}
    assert guarded.call("POST", "/v1/jobs", json=guarded.body(), headers=headers).status_code == 201


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "192.0.2.7:8470", "", "[::1", "a b"])
def test_a_foreign_host_is_refused_on_loopback(bench, host):
    for method, path in (("GET", "/v1/jobs"), ("POST", "/v1/jobs"), ("GET", "/healthz")):
        assert bench.call(method, path, headers={"host": host}, json={}).status_code == 421


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:9999", "localhost:8470", "LOCALHOST", "[::1]:8470"])
def test_our_own_names_are_accepted(bench, host):
    assert bench.call("GET", "/v1/jobs", headers={"host": host}).status_code == 200


def test_an_open_service_takes_its_names_and_bare_addresses(guarded):
    def status(host):
        return guarded.call("GET", "/v1/jobs", headers={"host": host, "authorization": f"Bearer {TOKEN}"}).status_code

    assert [status(host) for host in ("train.example", "192.0.2.7:8470", "evil.example")] == [200, 200, 421]


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonx"])
def test_changing_methods_need_the_json_content_type(bench, method, content_type):
    headers = {} if content_type is None else {"content-type": content_type}
    job_id = bench.submit()
    for path in ("/v1/jobs", f"/v1/jobs/{job_id}", f"/v1/jobs/{job_id}/cancel"):
        assert bench.call(method, path, headers=headers, content=b"{}").status_code == 415
    assert bench.state(job_id) == "queued"


def test_the_content_type_may_carry_parameters(bench):
    job_id = bench.submit()
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert bench.call("POST", f"/v1/jobs/{job_id}/cancel", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9999"},
        {"origin": "http://localhost:8470"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
@pytest.mark.parametrize("method", ["POST", "DELETE"])
def test_foreign_pages_may_not_change_anything(bench, headers, method):
    answer = bench.call(method, "/v1/jobs", headers={"content-type": "application/json", **headers}, json=bench.body())
    assert answer.status_code == 403
    assert bench.store.page()[1] == 0


def test_our_own_pages_may(bench):
    headers = {"origin": "http://127.0.0.1:8470", "sec-fetch-site": "same-origin"}
    assert bench.call("POST", "/v1/jobs", headers=headers, json=bench.body()).status_code == 201


def test_a_body_has_a_limit_whether_or_not_it_tells_its_length(bench):
    headers = {"content-type": "application/json"}
    assert bench.call("POST", "/v1/jobs", headers=headers, content=b" " * 1_048_577).status_code == 413

    async def parts():
        for _ in range(20):
            yield b" " * 100_000

    assert bench.call("POST", "/v1/jobs", headers=headers, content=parts()).status_code == 413


def test_settings_come_from_the_command_line_then_the_environment(tmp_path):
    environ = {
        "CROSSLANE_PORT": "9001",
        "CROSSLANE_HOME": str(tmp_path),
        "CROSSLANE_GPUS": "0, 2",
        "CROSSLANE_CORES": "7",
    }
    settings = load_settings(environ=environ)
    assert (settings.port, settings.home, settings.gpus, settings.cores) == (9001, tmp_path, ("0", "2"), 7)
    assert load_settings(port=0, environ=environ).port == 0
    with pytest.raises(ConfigError, match="CROSSLANE_PORT"):
        load_settings(environ={"CROSSLANE_PORT": "http"})
    with pytest.raises(ConfigError, match="70000"):
        load_settings(port=70000, environ={})


def test_the_token_file_goes_before_the_environment(tmp_path):
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    environ = {"CROSSLANE_TOKEN": "from-the-environment", "CROSSLANE_HOME": str(tmp_path)}
    assert load_settings(token_file=file, environ=environ).token == TOKEN
    assert load_settings(environ=environ).token == "from-the-environment"
    file.write_text("\n")
    with pytest.raises(ConfigError, match="empty"):
        load_settings(token_file=file, environ=environ)
    with pytest.raises(ConfigError, match="No such file"):
        load_settings(token_file=tmp_path / "none", environ=environ)
    with pytest.raises(ConfigError, match="token"):
        load_settings(environ={**environ, "CROSSLANE_TOKEN": "two words"})


def test_gpus_are_found_without_asking_a_driver(tmp_path):
    for name in ("nvidia10", "nvidia2", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    assert available_gpus({}, tmp_path) == ("2", "10")
    assert available_gpus({"CUDA_VISIBLE_DEVICES": "2"}, tmp_path) == ("2",)
    assert available_gpus({"CUDA_VISIBLE_DEVICES": "0,-1,2"}, tmp_path) == ("0",)
    assert available_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == ()


def test_clients_look_where_the_service_binds():
    assert client_address({}) == "http://127.0.0.1:8470"
    assert client_address({"CROSSLANE_HOST": "::", "CROSSLANE_PORT": "81"}) == "http://[::1]:81"
    assert client_address({"CROSSLANE_HOST": "::1"}) == "http://[::1]:8470"
    assert client_address({"CROSSLANE_URL": "https://train.example/"}) == "https://train.example"


def test_every_answer_tells_browsers_what_they_may_do_with_it(guarded):
    headers = {"authorization": f"Bearer {TOKEN}", "content-type": "application/json"}
    for method, path, given in (
        ("GET", "/healthz", {}),
        ("GET", "/v1/jobs", headers),
        ("GET", "/v1/jobs", {}),  # refused before the application
        ("GET", "/v1/jobs/none", headers),
        ("POST", "/v1/jobs", {**headers, "origin": "http://evil.example"}),
    ):
        answer = guarded.call(method, path, headers=given)
        assert answer.headers.get_list("x-content-type-options") == ["nosniff"], path
        assert answer.headers["x-frame-options"] == "SAMEORIGIN"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"
