"""Whole runs on a GPU, emulated where there is none."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from replays import may_allocate, replays

from dlrm.config import parse_run_config
from dlrm.device import HostDevice
from embedding.comm import SingleComm
from pipeline.train import train
from pipeline.trainer import TrainResult

SMALL = "synthetic:criteo-terabyte?rows=60000&scale=20000"
STEPS = 50
NOT_EMULATED = ("dlrm.gemm", "pipeline.generator")


class EmulatedDevice(HostDevice):
    """A GPU whose kernels run emulated: it pads, results are looked at late, and what it would replay may be replayed.

    Attributes:
        recordings: see ``replays.Replays``.
    """

    column_multiple = 8
    fuses_relu = True
    steps_behind = 2

    def __init__(self) -> None:
        super().__init__(1, compiled=False)
        self.recordings: Counter[str] = Counter()

    def empty(self, shape: Any, dtype: Any) -> Any:
        assert may_allocate(), "what is captured allocates nothing"
        return super().empty(shape, dtype)

    def zeros(self, shape: Any, dtype: Any) -> Any:
        assert may_allocate(), "what is captured allocates nothing"
        return super().zeros(shape, dtype)

    def pinned_empty(self, shape: Any, dtype: Any) -> Any:
        """What stands for NCCL here may ask for it at any time."""
        return HostDevice.empty(self, shape, dtype)

    def streams(self, names: Sequence[str]) -> Any:
        """Those of the host, looked at."""
        return replays(super().streams(names), self.recordings)

    def kernel(self, module: str, name: str) -> Any:
        """The launch of that name."""
        if (module, name) == ("dlrm.gemm", "linear_weight_backward"):
            return weight_and_bias_backward
        beside = f"{module}_cuda"
        if module in NOT_EMULATED or importlib.util.find_spec(beside) is None:
            return None
        return getattr(importlib.import_module(beside), name, None)


def values(directory: Path, device: str, machine: Any, **changes: Any) -> dict[str, Any]:
    batch = 64 if machine.emulated else 512
    return {
        "data": {"path": SMALL, "batch_size": batch, "shuffle": True, **changes.pop("data", {})},
        "device": device,
        "model": {"embedding_dim": 16, "bottom_mlp": (27, 16), "top_mlp": (41, 9, 1)},
        "optimizer": {"kind": "sgd", "lr": 0.5},
        "train": {"max_steps": STEPS, "epochs": None, "progress_every": 1, **changes.pop("train", {})},
        "eval": {"batch_size": 400, "final_split": None},
        "run": {"directory": str(directory)},
        "seed": 5,
        **changes,
    }


def weight_and_bias_backward(grad: np.ndarray, x: np.ndarray, grad_weight: np.ndarray, grad_bias: np.ndarray) -> None:
    """Sums over the rows come with the weights' gradients, as from cublasLt."""
    outputs, inputs = grad_weight.shape
    np.matmul(grad[:, :outputs].T, x[:, :inputs], out=grad_weight)
    grad[:, :outputs].sum(0, dtype=grad_bias.dtype, out=grad_bias)


def emulate(machine: Any, monkeypatch: pytest.MonkeyPatch) -> list[EmulatedDevice]:
    """Where there is no GPU, have ``device: cuda`` mean an emulated one; those that have been made since."""
    made: list[EmulatedDevice] = []
    if not machine.emulated:
        return made
    host = importlib.import_module("pipeline.devices").make_device

    def make(config: Any, *rest: Any) -> Any:
        if config.device != "cuda":
            return host(config, *rest)
        made.append(EmulatedDevice())
        return made[-1]

    monkeypatch.setattr("pipeline.engine.make_device", make)
    return made


def run(values: dict[str, Any], on_ranks: Callable[[Any], Any] = lambda work: work(SingleComm())) -> TrainResult:
    """Train by a config; ``on_ranks`` gives every rank its communicator."""
    config = parse_run_config(values)
    result: TrainResult = on_ranks(lambda comm: train(config, comm=comm, threads=1))
    return result


def records(directory: Path, kind: str) -> list[dict[str, Any]]:
    lines = (directory / "progress.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["type"] == kind]


def losses(directory: Path) -> np.ndarray:
    return np.array([record["loss"] for record in records(directory, "step")])
