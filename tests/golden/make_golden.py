"""Makes the golden fixtures under ``tests/golden/cases`` (needs PyTorch and PyYAML, nothing of the project).

    python tests/golden/make_golden.py            # every case
    python tests/golden/make_golden.py adam_lazy  # some

A case is a folder:

``config.yaml``   the run's config; ``data.path`` and ``run.directory`` are for the test to set
``data.npz``      ``label`` [n] int32, ``dense`` [n, N] float32, and for each table ``<name>.keys`` int32,
                  ``<name>.offsets`` [n + 1] int64 and, with weights, ``<name>.weights`` float32
``tables.yaml``   table rows by name in manifest order, and whether the data's layout is ``raw`` or ``jagged``
``init.npz``      initial weights by name, absent where the run starts from its seed
``expected.npz``  ``losses`` [50] and ``weight.<name>``: float64, after 50 steps
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml
from reference_dlrm import Architecture, Bags, Batch, Trainer, check_optimizers, check_philox, initial_values

CASES_FOLDER = Path(__file__).resolve().parent / "cases"
STEPS = 50


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration: the config's sections and how its data is drawn."""

    tables: dict[str, int]
    """Rows by table."""
    hotness: tuple[tuple[int, int], ...]
    """Fewest and most keys of a bag, by table."""
    optimizer: dict
    dim: int = 8
    bottom: tuple[int, ...] = (12, 8)
    top: tuple[int, ...] = (16, 1)
    num_dense: int = 5
    num_rows: int = 200
    batch_size: int = 40
    drop_last: bool = False
    embedding: dict = field(default_factory=dict)
    learning_rate: dict = field(default_factory=dict)
    weighted: bool = False
    from_seed: bool = False
    layout: str = "raw"

    def architecture(self) -> Architecture:
        """The parameters' shapes."""
        exceptions, default = self.embedding.get("tables", {}), self.embedding.get("pooling", "sum")
        pooling = {name: exceptions.get(name, {}).get("pooling", default) for name in self.tables}
        most = {name: keys for name, (_, keys) in zip(self.tables, self.hotness, strict=True)}
        return Architecture(
            num_dense=self.num_dense,
            tables=self.tables,
            dim=self.dim,
            bottom=self.bottom,
            top=self.top,
            concat={name: keys for name, keys in most.items() if pooling[name] == "concat"},
        )

    def config(self, name: str, seed: int) -> dict:
        """The run's config as plain values."""
        values = {
            "name": f"golden {name}",
            "seed": seed,
            "precision": "fp64",
            "data": {
                "path": "set by the test",
                "batch_size": self.batch_size,
                "shuffle": False,
                "drop_last": self.drop_last,
            },
            "model": {
                "embedding_dim": self.dim,
                "bottom_mlp": list(self.bottom),
                "top_mlp": list(self.top),
            },
            "embedding": self.embedding,
            "optimizer": self.optimizer,
            "learning_rate": self.learning_rate,
            "train": {"epochs": None, "max_steps": STEPS, "progress_every": 1},
        }
        return {key: value for key, value in values.items() if value != {}}


_THREE = {"user": 30, "item": 50, "place": 7}
_ONE_HOT = ((1, 1), (1, 1), (1, 1))
_BAGS = ((0, 5), (1, 4), (0, 2))

CASES: dict[str, Case] = {
    "one_hot_sgd": Case(tables=_THREE, hotness=_ONE_HOT, optimizer={"kind": "sgd", "lr": 0.7}),
    "multi_hot_sum_momentum": Case(
        tables={"user": 30, "item": 60, "tag": 12},
        hotness=((1, 1), (3, 3), (5, 5)),
        optimizer={"kind": "momentum", "lr": 0.02, "momentum": 0.8},
        embedding={"pooling": "sum"},
    ),
    "multi_hot_mean_adagrad": Case(
        tables=_THREE,
        hotness=_BAGS,
        optimizer={"kind": "adagrad", "lr": 0.05},
        embedding={"pooling": "mean"},
        layout="jagged",
    ),
    "rowwise_adagrad_mixed_pooling": Case(
        tables=_THREE,
        hotness=_BAGS,
        optimizer={"kind": "adagrad", "lr": 0.04, "initial_accumulator": 0.01},
        embedding={
            "pooling": "sum",
            "tables": {"item": {"pooling": "mean"}},
            "optimizer": {"kind": "rowwise_adagrad", "lr": 0.1, "eps": 1.0e-6},
        },
        dim=12,
        bottom=(12,),
    ),
    "adam_lazy": Case(
        tables=_THREE,
        hotness=((1, 1), (0, 3), (1, 1)),
        optimizer={"kind": "adam", "lr": 0.01, "beta1": 0.8, "beta2": 0.99},
        num_rows=160,
        layout="jagged",
    ),
    "ftrl_tables": Case(
        tables=_THREE,
        hotness=_ONE_HOT,
        optimizer={"kind": "adagrad", "lr": 0.1},
        embedding={"optimizer": {"kind": "ftrl", "lr": 0.5, "ftrl_beta": 0.1, "l1": 0.001, "l2": 0.003}},
    ),
    "warmup_plateau_decay": Case(
        tables=_THREE,
        hotness=_ONE_HOT,
        optimizer={"kind": "sgd", "lr": 0.5},
        learning_rate={
            "warmup_steps": 8,
            "decay_start": 20,
            "decay_steps": 20,
            "decay_power": 2.0,
            "end_lr": 0.02,
        },
    ),
    "uneven_last_of_three_adagrad": Case(
        tables=_THREE,
        hotness=((1, 1), (2, 2), (1, 1)),
        optimizer={"kind": "adagrad", "lr": 0.05, "initial_accumulator": 0.1},
        num_rows=37 * 4 + 3,
        batch_size=37,
    ),
    "uneven_last_of_two_adam": Case(
        tables={"user": 20, "item": 40},
        hotness=((0, 4), (1, 1)),
        optimizer={"kind": "adam", "lr": 0.01},
        embedding={"pooling": "mean"},
        num_rows=37 * 3 + 2,
        batch_size=37,
        layout="jagged",
    ),
    "dropped_last_deep": Case(
        tables=_THREE,
        hotness=_ONE_HOT,
        optimizer={"kind": "sgd", "lr": 0.3},
        dim=16,
        bottom=(20, 24, 16),
        top=(24, 16, 8, 1),
        num_rows=37 * 4 + 5,
        batch_size=37,
        drop_last=True,
    ),
    "no_dense_columns": Case(
        tables={"user": 20, "item": 40, "place": 7, "hour": 5},
        hotness=((1, 1), (1, 3), (1, 1), (1, 1)),
        optimizer={"kind": "sgd", "lr": 0.7},
        num_dense=0,
    ),
    "ftrl_everywhere_one_table": Case(
        tables={"item": 25},
        hotness=((2, 2),),
        optimizer={"kind": "ftrl", "lr": 1.0, "l1": 0.0005},
        dim=4,
        bottom=(4,),
        top=(1,),
        num_dense=3,
        num_rows=96,
        batch_size=16,
    ),
    "weighted_keys": Case(
        tables={"user": 30, "tag": 15},
        hotness=((1, 3), (0, 4)),
        optimizer={"kind": "adagrad", "lr": 0.05},
        weighted=True,
        layout="jagged",
    ),
    "from_seed": Case(
        # Widths that are no multiple of four use part of a Philox block.
        tables={"user": 30, "item": 50},
        hotness=((1, 1), (1, 1)),
        optimizer={"kind": "momentum", "lr": 0.05},
        dim=6,
        bottom=(7, 6),
        top=(11, 1),
        from_seed=True,
    ),
    "concat_beside_mean_adam": Case(
        tables={"user": 30, "tag": 12, "item": 40},
        hotness=((1, 1), (3, 3), (2, 2)),
        optimizer={"kind": "adam", "lr": 0.01},
        embedding={"tables": {"tag": {"pooling": "concat"}, "item": {"pooling": "mean"}}},
        num_rows=37 * 3 + 2,
        batch_size=37,
    ),
    "concat_weighted_rowwise_adagrad": Case(
        tables={"user": 30, "tag": 12, "item": 40},
        hotness=((2, 2), (0, 4), (3, 3)),
        optimizer={"kind": "adagrad", "lr": 0.05},
        embedding={
            "pooling": "concat",
            "tables": {"tag": {"pooling": "sum"}},
            "optimizer": {"kind": "rowwise_adagrad", "lr": 0.1},
        },
        weighted=True,
        layout="jagged",
        num_dense=0,
    ),
}


def make_data(case: Case, random: np.random.Generator) -> dict[str, np.ndarray]:
    """Rows whose labels depend on the dense columns and on the keys."""
    n = case.num_rows
    arrays: dict[str, np.ndarray] = {}
    score = np.zeros(n)
    if case.num_dense:
        arrays["dense"] = random.normal(size=(n, case.num_dense)).astype(np.float32)
        score += arrays["dense"] @ random.normal(size=case.num_dense)
    for (table, rows), (fewest, most) in zip(case.tables.items(), case.hotness, strict=True):
        counts = random.integers(fewest, most + 1, size=n)
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        # Squaring a uniform draw makes low rows frequent: duplicates in a bag and a batch, rows never seen.
        keys = (random.random(offsets[-1]) ** 2 * rows).astype(np.int32)
        effect = random.normal(size=rows)
        np.add.at(score, np.repeat(np.arange(n), counts), effect[keys])
        arrays[f"{table}.keys"], arrays[f"{table}.offsets"] = keys, offsets
        if case.weighted:
            arrays[f"{table}.weights"] = random.uniform(0.2, 1.5, size=len(keys)).astype(np.float32)
    arrays["label"] = (score + random.normal(size=n) > np.median(score)).astype(np.int32)
    return arrays


def make_init(architecture: Architecture, random: np.random.Generator) -> dict[str, np.ndarray]:
    """Initial weights, exact in float32 so that both precisions start from the same numbers."""
    values = {}
    for name, inputs, outputs in architecture.layers():
        values[f"{name}.weight"] = random.normal(size=(outputs, inputs)) * np.sqrt(2.0 / (inputs + outputs))
        values[f"{name}.bias"] = random.normal(size=outputs) * 0.2
    for table, rows in architecture.tables.items():
        values[f"table.{table}"] = random.uniform(-0.5, 0.5, size=(rows, architecture.dim))
    return {name: value.astype(np.float32) for name, value in values.items()}


def batch_of(case: Case, arrays: dict[str, np.ndarray], start: int, stop: int) -> Batch:
    """Rows ``start .. stop`` as one global batch in float64."""
    n = stop - start
    dense = arrays["dense"][start:stop] if case.num_dense else np.zeros((n, 0), dtype=np.float32)
    tables = {}
    for table in case.tables:
        offsets = arrays[f"{table}.offsets"]
        part = slice(offsets[start], offsets[stop])
        weights = arrays.get(f"{table}.weights")
        tables[table] = Bags(
            keys=torch.tensor(arrays[f"{table}.keys"][part].astype(np.int64)),
            bag=torch.tensor(np.repeat(np.arange(n), np.diff(offsets[start : stop + 1]))),
            weights=None if weights is None else torch.tensor(weights[part].astype(np.float64)),
        )
    return Batch(
        labels=torch.tensor(arrays["label"][start:stop].astype(np.float64)),
        dense=torch.tensor(dense.astype(np.float64)),
        tables=tables,
    )


def batch_bounds(case: Case) -> list[tuple[int, int]]:
    """Row ranges of the 50 steps: file order, epoch after epoch."""
    starts = range(0, case.num_rows, case.batch_size)
    epoch = [(start, min(start + case.batch_size, case.num_rows)) for start in starts]
    if case.drop_last:
        epoch = [(start, stop) for start, stop in epoch if stop - start == case.batch_size]
    return (epoch * STEPS)[:STEPS]


def run_case(name: str, case: Case, draw: int) -> tuple[dict, dict, Trainer, list[float]]:
    """Draw data and initial values, and train; the arrays, the initial values, the trainer, the losses."""
    seed = seed_of(name)
    random = np.random.default_rng([seed, draw])
    architecture = case.architecture()
    arrays = make_data(case, random)
    initial = initial_values(architecture, seed) if case.from_seed else make_init(architecture, random)
    trainer = Trainer(architecture, initial, case.config(name, seed))
    losses = [trainer.train_step(batch_of(case, arrays, *bounds)) for bounds in batch_bounds(case)]
    return arrays, initial, trainer, losses


def seed_of(name: str) -> int:
    """The seed of a case."""
    return 1000 + list(CASES).index(name)


def why_unfit(initial: dict[str, np.ndarray], trainer: Trainer) -> str | None:
    """Why a draw cannot judge an engine to the stated tolerances, or ``None`` where it can.

    A pre-activation within float32's rounding of a ReLU's kink may fall on the other side of it and then
    changes the trajectory by a jump; a scalar that ends near zero has no relative error worth the name.
    """
    if min(trainer.kinks, default=1.0) < 3e-6:
        return "a pre-activation lies on a ReLU's kink"
    for name, final in trainer.weights().items():
        if np.abs(final - initial[name]).max() < 0.01:
            return f"{name} hardly moves"
        if np.sqrt(np.mean(final**2)) < 0.03:
            return f"{name} ends near zero"
    return None


def make_case(name: str, case: Case) -> None:
    """Draw until the draw is fit, train, and write one folder."""
    for draw in range(100):
        arrays, initial, trainer, losses = run_case(name, case, draw)
        if not (reason := why_unfit(initial, trainer)):
            break
    else:
        raise AssertionError(f"{name}: no fit draw; the last one: {reason}")
    folder = CASES_FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    layout = {"layout": case.layout, "tables": case.tables}
    config = case.config(name, seed_of(name))
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    (folder / "tables.yaml").write_text(yaml.safe_dump(layout, sort_keys=False), encoding="utf-8")
    np.savez_compressed(folder / "data.npz", **arrays)
    if not case.from_seed:
        np.savez_compressed(folder / "init.npz", **initial)
    expected = {f"weight.{key}": value for key, value in trainer.weights().items()}
    np.savez_compressed(folder / "expected.npz", losses=np.array(losses), **expected)
    first, last = np.mean(losses[:5]), np.mean(losses[-5:])
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{name:32} draw {draw:2}  loss {first:.4f} -> {last:.4f}  {size / 1024:6.1f} KiB")


def main() -> None:
    """Make the cases named on the command line, or all."""
    torch.set_num_threads(1)
    check_philox()
    check_optimizers()
    for name in sys.argv[1:] or CASES:
        make_case(name, CASES[name])


if __name__ == "__main__":
    main()
