"""The same model, trained from any format that loses nothing, has the same losses and weights to the bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dlrm.config import parse_run_config
from pipeline.adopt_parquet import adopt_parquet
from pipeline.checkpoint import open_checkpoint
from pipeline.convert import convert
from pipeline.dataset import load_dataset
from pipeline.formats.interchange import WriteOptions
from pipeline.manifest import TableInfo
from pipeline.train import train
from pipeline.writer import DatasetWriter

ONE_HOT = ((50, 1), (20, 1), (300, 1))
MULTI_HOT = ((50, 1), (20, 3), (300, 2))
CRITEO = ((50, 1),) * 26

RAW_OF_HUGECTR = WriteOptions(label_dtype="float32", key_dtype="int64")
FRAMED = WriteOptions(check_sum=True, rows_per_file=97)
EVERYWHERE = [("raw", RAW_OF_HUGECTR), ("jagged", None), ("norm", None), ("norm", FRAMED), ("parquet", FRAMED)]


@pytest.fixture
def source(tmp_path, rng):
    """Writes a set of random rows; returns its folder."""

    def write(shape, num_dense=3, dense_dtype="float32", missing=False):
        tables = [TableInfo(name=f"t{t}", rows=rows, hotness=count) for t, (rows, count) in enumerate(shape)]
        names = [f"d{n}" for n in range(num_dense)]
        with DatasetWriter(
            tmp_path / "source", name="x", dense_names=names, tables=tables, dense_dtype=dense_dtype
        ) as writer:
            for split, count in (("train", 203), ("test", 40)):
                keys = [
                    rng.integers(-1 if missing and hotness > 1 else 0, rows, (count, hotness))
                    for rows, hotness in shape
                ]
                dense = rng.normal(size=(count, num_dense)).astype(np.float32)
                if dense_dtype == "int32":
                    dense = rng.integers(0, 5000, (count, num_dense))
                writer.write(split, rng.integers(0, 2, count), dense, np.concatenate(keys, axis=1))
            writer.finish()
        return tmp_path / "source"

    return write


@pytest.fixture
def trained(run_values, records):
    """Trains on a folder; returns the loss of every step, the final metrics and all weights."""

    def run(folder, directory):
        values = run_values(folder, directory, train={"epochs": 1, "progress_every": 1}, optimizer={"kind": "adagrad"})
        result = train(parse_run_config(values))
        where = Path(values["run"]["directory"])
        checkpoint = open_checkpoint(max((where / "checkpoints").glob("step-*")))
        losses = [record["loss"] for record in records(where, "step")]
        assert len(losses) == 7
        assert np.isfinite(losses).all()
        return losses, result.report["auc"], {name: checkpoint.read(name) for name in checkpoint.names}

    return run


def assert_alike(one, other):
    assert one[:2] == other[:2]
    assert one[2].keys() == other[2].keys()
    for name, values in one[2].items():
        np.testing.assert_array_equal(values, other[2][name], err_msg=name)


def through(source, folder, name, write, **options):
    """A folder to train on: of the format itself where that is read directly, else converted back."""
    convert(source, folder, to=name, write=write, **options)
    if name in ("raw", "jagged"):
        return folder
    convert(folder, folder.with_name(folder.name + "-back"), to="raw")
    return folder.with_name(folder.name + "-back")


@pytest.mark.parametrize("missing", [False, True])
def test_float_sets(source, trained, tmp_path, missing):
    """Multi-hot with and without bags that lack keys; TorchRec's arrays hold full bags alone."""
    folder = source(MULTI_HOT, missing=missing)
    wanted = trained(folder, "source-run")
    formats = EVERYWHERE if missing else [*EVERYWHERE, ("torchrec-npy", None)]
    for place, (name, write) in enumerate(formats):
        assert_alike(wanted, trained(through(folder, tmp_path / f"f{place}", name, write), f"run-{place}"))


def test_parquet_files_as_they_are(source, trained, tmp_path):
    """One file, as the order of an epoch depends on where files end; its lists are read bag by bag."""
    pytest.importorskip("pyarrow", reason="pyarrow is not installed: make install")
    folder = source(MULTI_HOT, missing=True)
    convert(folder, tmp_path / "files", to="parquet")
    adopted = adopt_parquet({"train": [tmp_path / "files"]}, out=tmp_path / "adopted")
    assert_alike(trained(folder, "source-run"), trained(adopted, "parquet-run"))


def test_sets_of_counts(source, trained, tmp_path):
    """Formats of counts as they are, formats of floats with what training reads of the counts."""
    folder = source(CRITEO, num_dense=13, dense_dtype="int32")
    wanted = trained(folder, "source-run")
    exact = [("jagged", None), ("facebook-npz", None), ("criteo-tsv", None)]
    taken = [("norm", None), ("parquet", None), ("torchrec-npy", None)]
    for place, (name, write) in enumerate(exact + taken):
        allow = frozenset({"log1p-dense"}) if (name, write) in taken else frozenset()
        assert_alike(wanted, trained(through(folder, tmp_path / f"f{place}", name, write, allow=allow), f"run-{place}"))


def test_split_binary_trains_as_values_rounded_to_16_bits(source, trained, tmp_path):
    folder = source(ONE_HOT)
    back = through(folder, tmp_path / "split", "split-binary", None, allow=frozenset({"fp16-dense"}))
    manifest = load_dataset(folder).manifest
    with DatasetWriter(
        tmp_path / "rounded", name="x", dense_names=manifest.dense.names, tables=manifest.tables
    ) as writer:
        for split in manifest.splits:
            batch = load_dataset(folder).split(split).read(slice(None))
            rounded = batch.dense.astype(np.float16).astype(np.float32)
            assert (rounded != batch.dense).any()
            writer.write(split, batch.labels.astype(np.int32), rounded, batch.keys)
        writer.finish()
    assert_alike(trained(tmp_path / "rounded", "rounded-run"), trained(back, "split-run"))
