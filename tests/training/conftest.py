"""A small data set and runs over it, in this process or under mpirun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from pipeline.manifest import TableInfo
from pipeline.writer import DatasetWriter
from service.launchers.session import MPI_FOLDER

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tiny_dataset(tmp_path, rng):
    """Writes a learnable set with a one-hot, a multi-hot and a longer one-hot table; returns its folder."""
    tables = [
        TableInfo(name="user", rows=50),
        TableInfo(name="tags", rows=20, hotness=2),
        TableInfo(name="item", rows=300),
    ]

    def columns(rows):
        limits = ((0, 50), (0, 20), (-1, 20), (0, 300))
        return np.stack([rng.integers(*limit, rows) for limit in limits], axis=1)

    def write(name="tiny", train=403, test=90, validation=64):
        folder = tmp_path / name
        with DatasetWriter(folder, name=name, dense_names=["age", "year"], tables=tables) as writer:
            for split, rows in (("train", train), ("validation", validation), ("test", test)):
                keys = columns(rows)
                dense = rng.normal(size=(rows, 2)).astype(np.float32)
                logits = dense[:, 0] + np.where(keys[:, 0] % 2, 1.5, -1.5)
                labels = (rng.random(rows) < 1 / (1 + np.exp(-logits))).astype(np.int32)
                writer.write(split, labels, dense, keys)
            writer.finish()
        return folder

    return write


@pytest.fixture
def run_values(tmp_path):
    """Plain values of a quick config."""

    def values(dataset, directory="run", **sections):
        base = {
            "data": {"path": str(dataset), "batch_size": 32},
            "model": {"embedding_dim": 8, "bottom_mlp": [16, 8], "top_mlp": [16, 1]},
            "optimizer": {"kind": "adam", "lr": 0.01},
            "train": {"epochs": 2, "progress_every": 1},
            "run": {"directory": str(tmp_path / directory)},
        }
        for section, fields in sections.items():
            base[section] = {**base.get(section, {}), **fields} if isinstance(fields, dict) else fields
        return base

    return values


def mpirun(ranks, *command):
    """Arguments that start ``command`` on ``ranks`` ranks of this machine, more than its cores if need be."""
    options = ("--map-by", ":OVERSUBSCRIBE", "--bind-to", "none", "--mca", "mpi_yield_when_idle", "1")
    return [str(Path(sys.executable).with_name("mpirun")), "-np", str(ranks), *options, *map(str, command)]


@pytest.fixture
def start_engine(tmp_path):
    """Starts ``python -m pipeline.train`` on some ranks; what still runs at the test's end is killed."""
    started = []
    environment = {
        **os.environ,
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PYTHONPATH": str(ROOT),
        MPI_FOLDER: str(tmp_path),
    }

    def start(values, *arguments, ranks=1, plain=False, command=None):
        config = tmp_path / f"config-{len(started)}.yaml"
        config.write_text(yaml.safe_dump(values))
        module = ["-m", "pipeline.train"] if plain else ["-m", "mpi4py", "-m", "pipeline.train"]
        engine = [*(command or [sys.executable, *module]), config, *arguments]
        process = subprocess.Popen(
            mpirun(ranks, *engine) if ranks > 1 else list(map(str, engine)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=tmp_path,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, 9)
            process.communicate()


@pytest.fixture
def run_engine(start_engine):
    """As ``start_engine``, waits and returns (exit code, standard error)."""

    def run(values, *arguments, timeout=240, **options):
        process = start_engine(values, *arguments, **options)
        _, errors = process.communicate(timeout=timeout)
        return process.returncode, errors

    return run


@pytest.fixture
def records():
    """Reads a run's progress records, of one type if named."""

    def read(directory, kind=None):
        lines = (Path(directory) / "progress.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        return [record for record in found if kind in (None, record["type"])]

    return read
