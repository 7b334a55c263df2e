"""Queue, slots, ends, stops, and what a restarted service finds, with a stand-in for the engine."""

import os
import signal
import time
from pathlib import Path

import pytest

from service.jobs import JobState
from service.launchers.base import Process
from service.launchers.wrapper import EXIT, READY


def wait_until_true(condition, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.02)


def test_a_job_runs_to_its_end(bench):
    job_id = bench.submit("plain")
    job = bench.tick_until(job_id, "succeeded", "failed")
    assert (job.state, job.exit_code, job.reason, job.error) == ("succeeded", 0, "finished", None)
    assert job.created_at <= job.started_at <= job.finished_at
    view = bench.call("GET", f"/v1/jobs/{job_id}").json()
    assert view["progress"]["step"] == 3
    assert view["progress"]["steps"] == 3
    assert view["progress"]["metrics"] == {"auc": 0.75, "log_loss": 0.5}
    assert view["progress"]["samples_per_s"] == 1e4
    assert bench.processes(job_id) == []


def test_the_queue_is_first_in_first_out_and_cores_are_never_exceeded(bench, tmp_path):
    go = tmp_path / "go"
    first = bench.submit(f"free:{go}", threads_per_rank=3)
    wide = bench.submit(f"free:{go}", threads_per_rank=2)
    narrow = bench.submit(f"free:{go}", threads_per_rank=1)
    for _ in range(3):
        bench.supervisor.tick()
        # `narrow` would fit beside `first`, but may not overtake `wide`.
        assert [bench.state(job) for job in (first, wide, narrow)] == ["running", "queued", "queued"]
    health = bench.call("GET", "/healthz").json()
    assert (health["queued"], health["running"], health["cores"]) == (2, 1, {"total": 4, "free": 1})
    go.touch()
    ended = [bench.tick_until(job, "succeeded") for job in (first, wide, narrow)]
    assert [job.number for job in ended] == sorted(job.number for job in ended)
    assert ended[0].finished_at <= ended[1].started_at <= ended[2].started_at
    assert ended[2].started_at < ended[1].finished_at  # those two fit together
    assert bench.call("GET", "/healthz").json()["cores"] == {"total": 4, "free": 4}


def test_running_jobs_never_share_a_gpu(make_bench, tmp_path):
    go = tmp_path / "go"
    bench = make_bench(gpus=("3", "5", "6"), cores=8)
    two, one, none = (
        bench.submit(f"free:{go}", gpus=2, ranks=2),
        bench.submit(f"free:{go}", gpus=1),
        bench.submit(f"free:{go}"),
    )
    late = bench.submit("plain", gpus=1)
    bench.supervisor.tick()
    assert [bench.state(job) for job in (two, one, none, late)] == ["running", "running", "running", "queued"]
    assert bench.call("GET", "/healthz").json()["gpus"] == {"total": 3, "free": 0}
    go.touch()
    for job in (two, one, none, late):
        bench.tick_until(job, "succeeded")
    seen = [bench.call("GET", f"/v1/jobs/{job}/logs").text for job in (two, one, none)]
    assert ["gpus '3,5'" in seen[0], "gpus '6'" in seen[1], "gpus ''" in seen[2]] == [True, True, True]


def test_a_failure_brings_exit_code_and_error_line(bench):
    job = bench.tick_until(bench.submit("fail"), "failed", "succeeded")
    assert (job.state, job.exit_code) == ("failed", 3)
    assert job.error == "table 'C1': key 9 is beyond its 5 rows"
    assert bench.call("GET", f"/v1/jobs/{job.id}").json()["error"] == job.error


def test_an_engine_killed_from_outside_fails_with_the_launchers_code(bench):
    job = bench.tick_until(bench.submit("crash"), "failed", "succeeded", "lost")
    assert (job.state, job.exit_code) == ("failed", 7)


def test_an_engine_that_cannot_be_started_fails_with_a_sentence(make_bench):
    bench = make_bench(engine=("-m", "service.no_such_module"))
    job = bench.tick_until(bench.submit(), "failed")
    assert job.exit_code != 0
    assert "no_such_module" in job.error


def test_cancelling_a_queued_job_ends_it_at_once(bench):
    job_id = bench.submit()
    answer = bench.call("POST", f"/v1/jobs/{job_id}/cancel", json={})
    assert (answer.status_code, answer.json()["state"]) == (200, "cancelled")
    bench.supervisor.tick()
    assert bench.state(job_id) == "cancelled"
    assert not Path(bench.store.get(job_id).directory).exists()
    assert bench.call("POST", f"/v1/jobs/{job_id}/cancel", json={}).status_code == 200


def test_cancelling_a_running_job_lets_it_write_a_checkpoint(bench):
    job_id = bench.submit("hold")
    bench.tick_until(job_id, "running")
    wait_until_true(lambda: len(bench.records(job_id)) > 2)
    assert bench.call("POST", f"/v1/jobs/{job_id}/cancel", json={}).status_code == 202
    assert bench.call("GET", f"/v1/jobs/{job_id}").json()["cancel_requested"] is True
    job = bench.tick_until(job_id, "cancelled", "failed")
    assert (job.state, job.exit_code) == ("cancelled", 75)
    assert job.reason == "cancelled on request; a checkpoint was written"
    assert bench.records(job_id)[-1]["reason"] == "stopped"
    assert bench.processes(job_id) == []


def test_cancelling_before_the_first_record_does_not_wait_for_a_checkpoint(bench):
    job_id = bench.submit("mute")
    bench.tick_until(job_id, "running")
    bench.call("POST", f"/v1/jobs/{job_id}/cancel", json={})
    job = bench.tick_until(job_id, "cancelled", "failed", seconds=4.0)
    assert (job.state, job.exit_code) == ("cancelled", 128 + signal.SIGTERM)


def test_a_deaf_job_is_killed_in_the_end(make_bench):
    bench = make_bench(stop_seconds=0.3, kill_seconds=0.3)
    job_id = bench.submit("hold deaf")
    bench.tick_until(job_id, "running")
    wait_until_true(lambda: bench.records(job_id))
    bench.call("POST", f"/v1/jobs/{job_id}/cancel", json={})
    job = bench.tick_until(job_id, "cancelled", "failed")
    assert job.state == "cancelled"
    assert job.reason.endswith("ended without a checkpoint")
    assert bench.processes(job_id) == []


def test_an_ended_job_cannot_be_cancelled(bench):
    job_id = bench.submit()
    bench.tick_until(job_id, "succeeded")
    answer = bench.call("POST", f"/v1/jobs/{job_id}/cancel", json={})
    assert answer.status_code == 409
    assert "succeeded" in answer.json()["detail"]


def test_a_restarted_service_finds_the_running_job_and_its_end(bench, tmp_path):
    go = tmp_path / "go"
    job_id = bench.submit(f"free:{go}")
    before = bench.tick_until(job_id, "running")
    bench.close()
    bench.open()  # the new launcher has no children
    bench.supervisor.tick()
    assert bench.state(job_id) == "running"
    assert bench.store.get(job_id).pid == before.pid
    go.touch()
    assert bench.tick_until(job_id, "succeeded", "lost").state == "succeeded"


def test_a_restarted_service_reads_the_exit_code_of_a_job_that_ended_meanwhile(bench, tmp_path):
    go = tmp_path / "go"
    job_id = bench.submit(f"fail free:{go}")
    bench.supervisor.tick()
    bench.close()
    directory = bench.settings.jobs / job_id
    wait_until_true((directory / EXIT).exists)
    bench.open()
    job = bench.tick_until(job_id, "failed", "lost")
    assert (job.state, job.exit_code) == ("failed", 3)


def test_a_restarted_service_carries_on_with_a_stop(bench):
    job_id = bench.submit("hold")
    bench.tick_until(job_id, "running")
    wait_until_true(lambda: bench.records(job_id))
    bench.store.ask_to_cancel(job_id, "cancelled on request")
    bench.close()
    bench.open()
    assert bench.tick_until(job_id, "cancelled", "failed").exit_code == 75


def test_a_job_whose_process_was_not_noted_is_found_by_its_command(bench):
    job_id = bench.submit("hold")
    bench.tick_until(job_id, "running")
    pid = bench.store.get(job_id).pid
    bench.store.note(job_id, pid=None, pid_created=None)
    bench.close()
    bench.open()
    bench.supervisor.tick()
    assert (bench.state(job_id), bench.store.get(job_id).pid) == ("running", pid)


def test_a_job_that_was_claimed_but_never_started_is_lost_with_a_reason(bench):
    job_id = bench.submit()
    bench.store.transition(job_id, JobState.QUEUED, JobState.RUNNING, started_at=time.time())
    bench.supervisor.tick()
    job = bench.store.get(job_id)
    assert job.state == "lost"
    assert "while it was starting the job" in job.reason


def test_a_killed_wrapper_leaves_a_lost_job_and_no_strays(bench):
    job_id = bench.submit("hold deaf")
    job = bench.tick_until(job_id, "running")
    wait_until_true(lambda: bench.records(job_id))
    os.kill(job.pid, signal.SIGKILL)
    job = bench.tick_until(job_id, "lost", "failed")
    assert job.state == "lost"
    assert "no exit code" in job.reason
    wait_until_true(lambda: bench.processes(job_id) == [], 5.0)


def test_a_later_process_with_the_same_id_is_not_taken_for_the_job(bench):
    job_id = bench.submit()
    bench.store.transition(job_id, JobState.QUEUED, JobState.RUNNING, started_at=time.time())
    # Our own id, but another start: the job's process has ended and its number was given anew.
    bench.store.note(job_id, pid=os.getpid(), pid_created=time.time() - 1000)
    bench.supervisor.tick()
    assert bench.state(job_id) == "lost"


def test_a_stop_is_not_sent_before_the_wrapper_listens(bench):
    job_id = bench.submit("hold")
    bench.tick_until(job_id, "running")
    task_directory = bench.settings.jobs / job_id
    wait_until_true((task_directory / READY).exists)
    wait_until_true(lambda: bench.records(job_id))
    ready = (task_directory / READY).rename(task_directory / "aside.json")
    bench.call("POST", f"/v1/jobs/{job_id}/cancel", json={})
    for _ in range(5):
        bench.supervisor.tick()
    assert bench.state(job_id) == "running"
    ready.rename(task_directory / READY)
    assert bench.tick_until(job_id, "cancelled").exit_code == 75


def test_jobs_that_the_shrunk_machine_can_no_longer_hold_do_not_block_the_queue(make_bench):
    bench = make_bench()
    wide, narrow = bench.submit(threads_per_rank=4), bench.submit()
    bench.close()
    smaller = make_bench(cores=2)
    assert smaller.tick_until(narrow, "succeeded").state == "succeeded"
    job = smaller.store.get(wide)
    assert job.state == "cancelled"
    assert "needs 4 cores" in job.reason


def test_stopping_the_service_with_its_jobs_stops_them_and_keeps_the_queue(bench):
    running, queued = bench.submit("hold", threads_per_rank=4), bench.submit()
    bench.tick_until(running, "running")
    wait_until_true(lambda: bench.records(running))
    bench.supervisor.stop(stop_jobs=True)
    job = bench.store.get(running)
    assert (job.state, job.exit_code) == ("cancelled", 75)
    assert job.reason.startswith("the service was stopped")
    assert bench.state(queued) == "queued"


def test_a_run_directory_named_by_the_config_is_kept_and_its_old_records_are_not_shown(bench, tmp_path):
    body = bench.body("plain")
    body["config"]["run"] = {"directory": str(tmp_path / "mine")}
    ids = []
    for _ in range(2):
        ids.append(bench.call("POST", "/v1/jobs", json=body).json()["id"])
        bench.tick_until(ids[-1], "succeeded")
    assert len(bench.records(ids[1])) == 6
    assert (tmp_path / "mine" / "report.json").exists()


def test_one_folder_takes_one_job_at_a_time(bench, tmp_path):
    body = bench.body("hold")
    body["config"]["run"] = {"directory": str(tmp_path / "mine")}
    first = bench.call("POST", "/v1/jobs", json=body)
    assert first.status_code == 201
    second = bench.call("POST", "/v1/jobs", json=body)
    assert second.status_code == 409
    assert first.json()["id"] in second.json()["detail"]
    assert bench.call("GET", "/v1/jobs").json()["total"] == 1


@pytest.mark.parametrize("missing", [True, False])
def test_a_process_that_is_gone_is_not_signalled(bench, missing):
    job_id = bench.submit("hold")
    job = bench.tick_until(job_id, "running")
    task_directory = Path(job.directory)
    wait_until_true((task_directory / READY).exists)
    stranger = Process(2**22 + 7, job.pid_created) if missing else Process(os.getpid(), time.time() - 1000)
    from service.supervisor import _task

    assert bench.launcher.stop(_task(job), stranger) is True  # we are still here
    assert bench.state(job_id) == "running"
