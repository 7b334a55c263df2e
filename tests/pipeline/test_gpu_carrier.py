"""What brings arrays from GPU to GPU, and that nobody gets the slow way without being told."""

from __future__ import annotations

import importlib.util
import types
from pathlib import Path

import pytest

from dlrm.config import parse_run_config
from dlrm.errors import DeviceError
from pipeline.engine_cuda import make_carrier

SPEC = importlib.util.spec_from_file_location("thread_ranks", Path(__file__).parent / "thread_ranks.py")
thread_ranks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(thread_ranks)


def carriers(wish, gpus_of):
    """Of ranks that have these GPUs, as (node, bus)."""
    config = parse_run_config({"data": {"path": "nowhere"}, "cuda": {"carrier": wish}})

    def work(comm):
        comm.split = lambda color, key: comm
        node, bus = gpus_of[comm.rank]
        return make_carrier(config, comm, types.SimpleNamespace(node=node), types.SimpleNamespace(bus_id=bus))

    return thread_ranks.run_ranks(len(gpus_of), work)


@pytest.mark.parametrize(
    ("gpus_of", "told"),
    [
        ([(0, "a"), (0, "b"), (0, "a"), (0, "b")], "4 ranks have 2 GPUs, ", ),
        ([(0, "a"), (0, "a")], "2 ranks have 1 GPU, "),
        ([(0, "a"), (1, "a"), (1, "a")], "3 ranks have 2 GPUs, "),
    ],
)  # fmt: skip
def test_ranks_that_share_a_gpu_are_warned_once(capfd, gpus_of, told):
    found = carriers("auto", gpus_of)
    assert [carrier.name for carrier in found] == ["staged"] * len(gpus_of)
    assert [carrier.sharing for carrier in found] == [gpus_of.count(gpu) for gpu in gpus_of]
    errors = capfd.readouterr().err
    assert errors.count("\n") == 1
    assert errors.startswith(f"warning: {told}")
    assert "cuda.carrier: staged" in errors


def test_whoever_asks_for_it_is_not(capfd):
    assert carriers("staged", [(0, "a"), (0, "a")])[0].name == "staged"
    assert capfd.readouterr().err == ""


def test_a_single_rank_needs_none(capfd):
    assert carriers("auto", [(0, "a")])[0].name == "none"
    assert capfd.readouterr().err == ""


def test_nccl_is_refused_to_ranks_that_share(capfd):
    for error in carriers("nccl", [(0, "a"), (0, "a")]):
        assert isinstance(error, DeviceError)
        assert "2 ranks have 1 GPUs" in str(error)
    assert capfd.readouterr().err == ""
