"""Streams of the CPU: order, real concurrency, failures, threads of the lanes."""

from __future__ import annotations

import threading

import numba
import pytest

from dlrm.device import HostDevice
from dlrm.host_streams import InlineStream, LaneThreads, host_streams, lane_threads

LONG_S = 30  # only a broken stream waits so long


def test_one_stream_runs_inline_and_several_are_threads():
    device = HostDevice()
    with device.streams(["main"]) as streams:
        assert isinstance(streams, InlineStream)
        seen = []
        event = streams.issue("main", lambda: seen.append(threading.current_thread()))
        assert event.done()
        assert seen == [threading.current_thread()]
    with device.streams(["a", "b"]) as streams:
        streams.join([streams.issue(name, lambda: seen.append(threading.current_thread())) for name in "ab"])
    assert len(set(seen)) == 3
    assert not any(thread.is_alive() for thread in seen[1:])


def test_two_streams_run_at_once_and_each_keeps_its_order():
    meeting = threading.Barrier(2, timeout=LONG_S)
    order: dict[str, list[int]] = {"a": [], "b": []}

    def work(name, number):
        meeting.wait()  # passes only while the other stream is here too
        order[name].append(number)

    with host_streams(["a", "b"], None) as streams:
        events = [streams.issue(name, lambda n=name, k=k: work(n, k)) for k in range(20) for name in "ab"]
        streams.join(events)
    assert order == {"a": list(range(20)), "b": list(range(20))}


def test_work_waits_for_the_events_it_is_given():
    gate = threading.Event()
    done = []
    with host_streams(["a", "b"], None) as streams:
        first = streams.issue("a", lambda: (gate.wait(LONG_S), done.append("first")))
        second = streams.issue("b", lambda: done.append("second"), [first])
        assert not second.done()
        gate.set()
        streams.join([second])
    assert done == ["first", "second"]


def test_a_failure_ends_all_streams_and_begins_nothing_more():
    begun, gate = [], threading.Event()

    def fail():
        raise KeyError("lookup")

    def issue_all():
        with host_streams(["a", "b"], None) as streams:
            stuck = streams.issue("b", lambda: gate.wait(LONG_S))  # as a rank that waits for one that has failed
            streams.issue("a", fail)
            later = [streams.issue("a", lambda: begun.append("a")), streams.issue("b", lambda: begun.append("b"))]
            try:
                streams.join([stuck, *later])
            finally:
                gate.set()

    with pytest.raises(KeyError, match="lookup"):
        issue_all()
    assert begun == []


def test_leaving_the_block_early_begins_nothing_more():
    begun, gate = [], threading.Event()

    def leave():
        with host_streams(["a", "b"], None) as streams:
            streams.issue("a", lambda: gate.wait(LONG_S))
            streams.issue("a", lambda: begun.append(1))
            threading.Timer(0.05, gate.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        leave()
    assert begun == []


@pytest.mark.parametrize(("threads", "dense", "embedding"), [(1, 1, 1), (2, 2, 2), (3, 3, 3), (4, 3, 1), (16, 12, 4)])
def test_threads_are_divided_from_four_on(threads, dense, embedding):
    assert lane_threads(threads) == LaneThreads(dense, embedding)


def test_each_worker_has_its_lanes_threads():
    most = numba.config.NUMBA_NUM_THREADS
    before = numba.get_num_threads()
    seen = {}
    with host_streams(["dense", "embedding"], LaneThreads(most, 1)) as streams:
        streams.join(
            [
                streams.issue(name, lambda name=name: seen.update({name: numba.get_num_threads()}))
                for name in ("dense", "embedding")
            ]
        )
    assert seen == {"dense": most, "embedding": 1}
    assert numba.get_num_threads() == before


def test_products_use_the_dense_lanes_threads():
    from threadpoolctl import threadpool_info

    def blas():
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    before = blas()
    with host_streams(["dense", "embedding"], LaneThreads(1, 2)):
        assert blas() == {1}
    assert blas() == before
