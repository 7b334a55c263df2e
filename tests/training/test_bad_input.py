"""Bad input, as its user meets it: one clear sentence, the right exit code, no traceback, nothing lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from pipeline.checkpoint import open_checkpoint

WORDS_PER_ROW = 1 + 2 + 4  # label, two dense columns, four key columns


def crosslane(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "service.cli", *map(str, arguments)], capture_output=True, text=True, timeout=240
    )
    return done.returncode, done.stderr


def refused(code, fragments, *arguments):
    """The command fails with this code and one sentence that holds all fragments."""
    found, errors = crosslane(*arguments)
    messages = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert found == code, errors
    assert "Traceback" not in errors
    assert len(messages) == 1, errors
    for fragment in fragments:
        assert fragment in messages[0], messages[0]


@pytest.fixture
def config(tmp_path):
    def write(values):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


@pytest.fixture
def trained(tiny_dataset, run_values, config):
    """A run of three steps: its config file, values and data."""
    data = tiny_dataset()
    values = run_values(data, train={"max_steps": 3})
    path = config(values)
    code, errors = crosslane("train", path)
    assert code == 0, errors
    return path, values, data


def rows_of(data, split="train"):
    return np.memmap(next(data.glob(f"{split}*")), dtype="<i4", mode="r+").reshape(-1, WORDS_PER_ROW)


def test_damaged_data_is_refused_with_its_place(tiny_dataset, run_values, config):
    data = tiny_dataset()
    path = config(run_values(data, data={"shuffle": False}))
    file = next(data.glob("train*"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    refused(3, [file.name, str(len(whole)), str(len(whole) - 10)], "train", path)
    file.write_bytes(whole + b"1234")
    refused(3, [file.name, str(len(whole)), str(len(whole) + 4)], "train", path)
    file.write_bytes(whole)
    rows_of(data)[7, 6] = 300
    refused(3, [file.name, "row 7", "item", "300"], "train", path)
    file.write_bytes(whole)
    rows_of(data).view("<f4")[9, 2] = np.nan
    refused(3, [file.name, "row 9", "year", "nan"], "train", path)
    file.write_bytes(whole)
    rows_of(data)[11, 0] = 2
    refused(3, [file.name, "row 11", "label", "2"], "train", path)
    refused(3, [file.name, "XXH128"], "train", path, "--set", "data.verify=true")
    file.unlink()
    refused(3, [file.name], "train", path)
    refused(3, ["nowhere"], "train", path, "--set", "data.path=nowhere")


@pytest.mark.ranks
@pytest.mark.parametrize(("row", "rank", "counted"), [(3, 0, False), (21, 1, False), (21, 0, True)])
def test_a_key_out_of_range_on_one_rank_ends_all_and_names_it(tiny_dataset, run_values, config, row, rank, counted):
    data = tiny_dataset()
    # Where all is forced, nobody counts rows before the ranks read their own: 0 to 15 and 16 to 31. Else rank 0 does.
    embedding = {} if counted else {"placement": "row_wise", "deduplicate": True, "all_to_all": "flat"}
    path = config(run_values(data, data={"shuffle": False}, embedding=embedding))
    rows_of(data)[row, 6] = 300
    refused(3, [f"rank {rank}: ", f"row {row}", "item", "key 300"], "train", path, "--ranks", "2")


@pytest.mark.ranks
def test_ranks_with_different_configs_are_named_before_anything_is_read(tiny_dataset, run_values, run_engine):
    script = 'exec "$0" -m mpi4py -m pipeline.train "$1" --set optimizer.lr=0.$((OMPI_COMM_WORLD_RANK % 2 + 1))'
    values = run_values(tiny_dataset())
    code, errors = run_engine(values, ranks=3, command=["sh", "-c", script, sys.executable])
    assert code == 2, errors
    sentence = (
        "optimizer.lr: the ranks disagree: 0.1 on rank 0, 2; 0.2 on rank 1; start every rank with the same config"
    )
    assert f"error: {sentence}" in errors.splitlines()
    assert not list((Path(values["run"]["directory"]) / "checkpoints").glob("*"))


def test_concat_of_bags_with_missing_keys_is_refused(tiny_dataset, run_values, config):
    path = config(run_values(tiny_dataset(), embedding={"tables": {"tags": {"pooling": "concat"}}}))
    refused(3, ["'tags'", "holds 1 keys", "2", "use pooling sum or mean"], "train", path)


def test_wrong_configs_are_refused_with_the_path_of_the_field(tiny_dataset, run_values, config, tmp_path):
    values = run_values(tiny_dataset())
    path = config(values)
    refused(2, ["optimizer.rate", "unknown"], "train", path, "--set", "optimizer.rate=1")
    refused(2, ["optimizer.lr", "-1"], "train", path, "--set", "optimizer.lr=-1")
    refused(2, ["data.batch_size"], "train", path, "--set", "data.batch_size=many")
    refused(2, ["model.bottom_mlp", "8"], "train", path, "--set", "model.bottom_mlp=[16, 4]")
    refused(2, ["field.path=value"], "train", path, "--set", "optimizer.lr")
    refused(2, ["absent.yaml"], "train", tmp_path / "absent.yaml")
    path.write_text("data: [")
    refused(2, ["config.yaml"], "train", path)


@pytest.mark.ranks
def test_a_global_batch_below_the_ranks_is_refused(tiny_dataset, run_values, config):
    path = config(run_values(tiny_dataset(), data={"batch_size": 1}))
    refused(2, ["data.batch_size", "1", "2 ranks"], "train", path, "--ranks", "2")


def test_damaged_and_foreign_checkpoints_are_refused_and_kept(trained):
    path, values, _ = trained
    checkpoint = next((Path(values["run"]["directory"]) / "checkpoints").glob("step-*"))
    refused(6, ["top_mlp"], "train", path, "--set", "model.top_mlp=[8, 1]")
    file = checkpoint / open_checkpoint(checkpoint).entry("table.item").file
    whole = file.read_bytes()
    for place in (len(whole) // 2, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        file.write_bytes(damaged)
        refused(6, [file.name], "evaluate", path, "--checkpoint", checkpoint)
    file.write_bytes(whole)
    assert crosslane("evaluate", path, "--checkpoint", checkpoint)[0] == 0
    refused(6, ["nothing-here"], "evaluate", path, "--checkpoint", "nothing-here")


def test_places_that_cannot_be_written_are_told_in_one_sentence(trained, tmp_path):
    path, values, _ = trained
    checkpoint = next((Path(values["run"]["directory"]) / "checkpoints").glob("step-*"))
    (tmp_path / "file").touch()
    (tmp_path / "taken" / "progress.jsonl").mkdir(parents=True)
    refused(1, ["run.directory", "file"], "train", path, "--set", f"run.directory={tmp_path / 'file'}")
    refused(1, ["progress.jsonl", "directory"], "train", path, "--set", f"run.directory={tmp_path / 'taken'}")
    refused(1, [str(tmp_path)], "evaluate", path, "--checkpoint", checkpoint, "--scores", tmp_path)


def test_what_cannot_be_gone_on_with_is_refused(trained, tmp_path):
    path, values, _ = trained
    checkpoint = next((Path(values["run"]["directory"]) / "checkpoints").glob("step-*"))
    weights = tmp_path / "weights.npz"
    assert crosslane("checkpoint", "export", checkpoint, weights)[0] == 0
    refused(6, ["run.init", "weights.npz", "seed", "run.directory"], "train", path, "--init", weights)
    imported = tmp_path / "imported"
    assert crosslane("checkpoint", "import", weights, imported / "checkpoints" / "step-000000000000")[0] == 0
    refused(6, ["weights only", "--init"], "train", path, "--set", f"run.directory={imported}")


def test_weights_that_do_not_fit_are_refused(trained, tmp_path):
    path, _, _ = trained
    np.savez(tmp_path / "weights.npz", **{"bottom.0.weight": np.zeros((3, 2), np.float32)})
    fresh = ["--set", f"run.directory={tmp_path / 'fresh'}"]
    refused(6, ["bottom.0.weight", "[3, 2]", "[16, 2]"], "train", path, *fresh, "--init", tmp_path / "weights.npz")


def test_rows_of_a_text_file_with_too_few_columns_are_refused(tmp_path):
    row = "\t".join(["1", *["3"] * 13, *["68fd1e64"] * 26])
    (tmp_path / "train.tsv").write_text(f"{row}\n{row[: row.rindex(chr(9))]}\n")
    (tmp_path / "test.tsv").write_text(f"{row}\n")
    arguments = ["--train", tmp_path / "train.tsv", "--test", tmp_path / "test.tsv", "--out", tmp_path / "out"]
    refused(3, ["train.tsv", "line 2", "39", "40"], "prepare", "criteo", *arguments)
    refused(3, ["absent.tsv"], "prepare", "criteo", "--train", "absent.tsv", *arguments[2:])


def test_debug_shows_the_traceback(tiny_dataset, run_values, config):
    path = config(run_values(tiny_dataset()))
    code, errors = crosslane("--debug", "train", path, "--set", "data.path=nowhere")
    assert code == 3
    assert "Traceback" in errors
