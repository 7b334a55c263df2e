"""Every run dataclass: the YAML or JSON file, the REST body and the engine's arguments are the same thing.

The classes are frozen pydantic dataclasses: unknown fields, wrong types and values out of range are
refused where they are constructed, with the path of the field. Constructors elsewhere take the part they
need, never the whole ``RunConfig``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from dlrm.config_device import CudaConfig as CudaConfig
from dlrm.config_embedding import STRICT, NonNegativeFloat, Pooling, PositiveFloat, Text
from dlrm.config_embedding import CountInt as CountInt
from dlrm.config_embedding import EmbeddingConfig as EmbeddingConfig
from dlrm.config_embedding import Fraction as Fraction
from dlrm.config_embedding import OptimizerConfig as OptimizerConfig
from dlrm.config_embedding import PositiveInt as PositiveInt
from dlrm.config_eval import EvalConfig as EvalConfig
from dlrm.errors import ConfigError

_LONGEST_ECHO = 120


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class DataConfig:
    """Where the prepared data set lies and how its rows become batches."""

    path: Text
    """Folder of a prepared data set (it holds ``dataset.json``)."""
    batch_size: PositiveInt = 2048
    """Rows of the global batch; every rank takes its share of them."""
    shuffle: bool = True
    """Draw the training rows of each epoch in a new order, fixed by ``seed``."""
    shuffle_window: PositiveInt = 8_388_608
    """Rows shuffled together; smaller than the split means a window shuffle."""
    shuffle_block: PositiveInt = 1
    """Rows that a shuffle leaves together, as they stand in the file; 1 shuffles single rows."""
    drop_last: bool = False
    """Leave out the last training batch of an epoch if it is incomplete."""
    prefetch: PositiveInt = 4
    """Batches that the loader reads ahead."""
    readers: PositiveInt = 2
    """Threads that read them."""
    verify: bool = False
    """Check the files' checksums before training."""
    on_device: bool = False
    """On a GPU: keep the training rows in its memory, read or made once before the first step."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class ModelConfig:
    """The DLRM: bottom MLP, dot interaction, top MLP."""

    embedding_dim: PositiveInt = 16
    """Columns of every embedding table."""
    bottom_mlp: tuple[PositiveInt, ...] = (64, 16)
    """Outputs of the bottom layers; the last one equals ``embedding_dim``. Unused without dense columns."""
    top_mlp: tuple[PositiveInt, ...] = (64, 1)
    """Outputs of the top layers; the last one is 1, the logit."""

    def __post_init__(self) -> None:
        """Check what joins the layers.

        Raises:
            ConfigError: the MLPs do not fit the embeddings or the label.
        """
        if not self.bottom_mlp or self.bottom_mlp[-1] != self.embedding_dim:
            raise ConfigError(
                f"model.bottom_mlp: ends in {self.bottom_mlp[-1:] or 'nothing'}, but must end in "
                f"model.embedding_dim = {self.embedding_dim}"
            )
        if not self.top_mlp or self.top_mlp[-1] != 1:
            raise ConfigError(f"model.top_mlp: ends in {self.top_mlp[-1:] or 'nothing'}, but must end in 1, the logit")


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class LearningRateConfig:
    """Linear warm-up from step 1, plateau, polynomial decay; multiplies nothing when left out."""

    warmup_steps: CountInt = 0
    decay_start: CountInt = 0
    """Last step of the plateau; 0: no decay."""
    decay_steps: CountInt = 0
    decay_power: PositiveFloat = 2.0
    end_lr: NonNegativeFloat = 0.0

    def __post_init__(self) -> None:
        """Check the order of the phases.

        Raises:
            ConfigError: the decay starts inside the warm-up or has no length.
        """
        if self.decay_start and self.decay_start < self.warmup_steps:
            raise ConfigError(
                f"learning_rate.decay_start: {self.decay_start} lies inside the warm-up "
                f"(learning_rate.warmup_steps = {self.warmup_steps}); start later"
            )
        if self.decay_start and not self.decay_steps:
            raise ConfigError(
                "learning_rate.decay_steps: 0, but learning_rate.decay_start asks for a decay; set it above 0"
            )


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class TargetConfig:
    """Training ends successfully once this metric of the evaluation split is reached."""

    metric: Literal["auc", "log_loss", "normalized_entropy", "accuracy"] = "auc"
    value: float


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class EarlyStopConfig:
    """Training ends once the metric has not improved for ``patience`` evaluations; the best weights are kept."""

    metric: Literal["auc", "log_loss", "normalized_entropy", "accuracy"] = "auc"
    patience: PositiveInt = 3


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class TrainConfig:
    """How long to train, and when to evaluate, save and report."""

    epochs: PositiveInt | None = 1
    """Passes over the training split; ``None``: only ``max_steps`` ends the run."""
    max_steps: PositiveInt | None = None
    eval_every: CountInt = 0
    """Steps between evaluations of ``eval.split``; 0: only at the end."""
    checkpoint_every: CountInt = 0
    """Steps between checkpoints; 0: only at the end and on a stop."""
    keep_checkpoints: PositiveInt = 2
    progress_every: PositiveInt = 50
    """Steps between progress records."""
    target: TargetConfig | None = None
    early_stop: EarlyStopConfig | None = None

    def __post_init__(self) -> None:
        """Check that training ends, and that what decides its end is measured.

        Raises:
            ConfigError: neither limit is set, or a stopping rule has no evaluations to look at.
        """
        if self.epochs is None and self.max_steps is None:
            raise ConfigError("train.epochs: null, and train.max_steps too; set one of them")
        if (self.target or self.early_stop) and not self.eval_every:
            rule = "train.target" if self.target else "train.early_stop"
            raise ConfigError(f"{rule}: needs evaluations during training; set train.eval_every above 0")


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class CheckpointConfig:
    """How checkpoints are written; ``train`` says when."""

    asynchronous: bool = True
    """Training stops for a copy only and goes on while the copy is written; ``False``: it waits for the disk."""
    incremental: bool = False
    """Of the tables, write the rows that changed since an earlier checkpoint, which stays beside it."""
    memory_limit_mib: PositiveInt | None = None
    """Of the copy, on each rank; where it would be larger, training waits for the disk. ``None``: half of what the
    machine has free at that moment, divided among its ranks."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class OverlapConfig:
    """Whether the dense lane and the embedding lane run beside each other."""

    train: bool | Literal["always"] = True
    """In training: ``true``, unless no gain is predicted; ``always``, even then."""
    eval: bool | Literal["always"] = True
    """In evaluation, likewise."""
    depth: Annotated[int, Field(ge=1, le=4)] = 3
    """Most batches in flight."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class TraceConfig:
    """What is looked at closely: stage by stage, in ``trace/`` of the run's folder and as a picture in the report."""

    steps: tuple[PositiveInt, ...] = ()
    """Training steps."""
    eval_batches: tuple[PositiveInt, ...] = ()
    """Batches of the evaluations, from 1; kept of the last one before the closing one."""
    nvtx: bool = False
    """Name stages for Nsight; on GPUs the chosen steps'."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class RunSection:
    """Where a run writes, and what it starts from."""

    directory: Text = "runs/default"
    """Gets ``progress.jsonl``, ``checkpoints/``, ``report.json`` and ``report.html``."""
    init: Text | None = None
    """Weights (.npz, names as ``bottom.0.weight`` and ``table.<name>``) to start from."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class RunConfig:
    """One training run."""

    data: DataConfig
    name: Text = "run"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto``: a GPU where this process sees one and CuPy is installed; each rank of a machine takes another."""
    precision: Literal["fp32", "fp64", "fp16", "bf16"] = "fp32"
    """Of activations and products; with ``fp16`` and ``bf16`` (GPU) the dense parameters stay fp32."""
    loss_scale: PositiveFloat | Literal["dynamic"] = 1024.0
    """``fp16``: factor of all gradients on their way; ``dynamic``: halved where a gradient is not finite, which skips
    the step, and doubled after ``loss_scale_growth`` good steps. Other precisions take none."""
    loss_scale_growth: PositiveInt = 2000
    cuda: CudaConfig = Field(default_factory=CudaConfig)
    deterministic: bool = False
    """Decide nothing by measured times, so that another run of this config on as many ranks gives the same bits."""
    model: ModelConfig = Field(default_factory=ModelConfig)
    embedding: EmbeddingConfig = Field(default_factory=EmbeddingConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    learning_rate: LearningRateConfig = Field(default_factory=LearningRateConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    overlap: OverlapConfig = Field(default_factory=OverlapConfig)
    trace: TraceConfig = Field(default_factory=TraceConfig)
    run: RunSection = Field(default_factory=RunSection)

    def __post_init__(self) -> None:
        """Check what spans sections.

        Raises:
            ConfigError: the dense part is given an optimiser that only tables have.
        """
        if self.device == "cuda" and self.precision == "fp64":
            raise ConfigError("precision: fp64 runs on CPUs alone; set device: cpu, or precision: fp32")
        if self.device == "cpu" and (half := {self.precision, self.table_precision} & {"fp16", "bf16"}):
            raise ConfigError(
                f"precision: {half.pop()} needs a GPU, but device is cpu; set precision and embedding.table_precision "
                "to fp32, or device: cuda"
            )
        if self.optimizer.kind == "rowwise_adagrad":
            raise ConfigError(
                "optimizer.kind: 'rowwise_adagrad' is for embedding tables; set it as embedding.optimizer.kind "
                "and give the dense part another one, such as 'adagrad'"
            )
        if self.table_optimizer.kind == "rowwise_adagrad":
            places: dict[str, str | None] = {"embedding.placement": self.embedding.placement}
            places |= {f"embedding.tables.{name}.placement": t.placement for name, t in self.embedding.tables.items()}
            for path, placement in places.items():
                if placement == "column_wise":
                    raise ConfigError(
                        f"{path}: column_wise does not go with 'rowwise_adagrad', whose step needs the mean over a "
                        "whole row, and no owner of columns sees one; use 'adagrad' or another placement"
                    )

    @property
    def table_optimizer(self) -> OptimizerConfig:
        """The optimiser of the embedding tables."""
        return self.embedding.optimizer or self.optimizer

    @property
    def table_precision(self) -> str:
        """How the tables' rows are kept."""
        wide = "fp64" if self.precision == "fp64" else "fp32"
        return self.embedding.table_precision or wide

    def pooling(self, table: str) -> Pooling:
        """Pooling of one table."""
        exception = self.embedding.tables.get(table)
        return (exception and exception.pooling) or self.embedding.pooling


_ADAPTER: TypeAdapter[RunConfig] = TypeAdapter(RunConfig)


def parse_run_config(values: Mapping[str, Any]) -> RunConfig:
    """Build a ``RunConfig`` from plain values.

    Raises:
        ConfigError: a field is unknown, missing or out of range; the message starts with its path.
    """
    try:
        return _ADAPTER.validate_python(dict(values))
    except ValidationError as error:
        raise ConfigError("; ".join(describe_validation(error))) from None


def describe_validation(error: ValidationError) -> list[str]:
    """One clause per fault: path of the field, what is wrong, the value."""
    clauses = []
    for fault in error.errors(include_url=False, include_context=False):
        path = ".".join(str(part) for part in fault["loc"]) or "config"
        if fault["type"] in {"unexpected_keyword_argument", "extra_forbidden"}:
            clauses.append(f"{path}: unknown field; `crosslane config schema` lists the known ones")
        elif fault["type"] in {"missing", "missing_argument"}:
            clauses.append(f"{path}: missing; it has no default")
        else:
            clauses.append(f"{path}: {fault['msg'][0].lower()}{fault['msg'][1:]}, not {_echo(fault['input'])}")
    return clauses


def _echo(value: object) -> str:
    """A wrong value as it was given, unless it is long."""
    text = repr(value)
    return text if len(text) <= _LONGEST_ECHO else f"{text[:_LONGEST_ECHO]}..."


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML or JSON config and apply ``field.path=value`` overrides.

    Args:
        path: file; JSON is read as the YAML that it is.
        overrides: such as ``optimizer.lr=0.1``; values are YAML scalars or flow collections.

    Raises:
        ConfigError: the file is missing or malformed, or a field is wrong.
    """
    return parse_run_config(apply_overrides(read_config_file(path), overrides))


def read_config_file(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file.

    Raises:
        ConfigError: the file is missing, malformed or not a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"config {path}: {error.strerror or error}; name an existing YAML or JSON file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"config {path}: not text; name a YAML or JSON file") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"config {path}: not YAML or JSON ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"config {path}: holds {type(values).__name__}, but must hold a mapping of fields")
    return values


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of ``values`` with each ``field.path=value`` set.

    Raises:
        ConfigError: an override has no ``=`` or a path through something that is no section.
    """
    result: dict[str, Any] = json.loads(json.dumps(values, default=str))
    for override in overrides:
        path, separator, text = override.partition("=")
        if not separator or not path:
            raise ConfigError(f"--set {override!r}: must have the form field.path=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"--set {override!r}: the value is not YAML; quote it") from None
        node = result
        *parents, leaf = path.split(".")
        for parent in parents:
            below = node.get(parent)
            if below is None:
                below = node[parent] = {}
            if not isinstance(below, dict):
                raise ConfigError(f"--set {override!r}: {parent!r} is not a section")
            node = below
        node[leaf] = value
    return result


def to_values(config: RunConfig) -> dict[str, Any]:
    """The config as plain JSON values, every field written out."""
    values: dict[str, Any] = _ADAPTER.dump_python(config, mode="json")
    return values


def json_schema() -> dict[str, Any]:
    """JSON Schema of ``RunConfig``."""
    return _ADAPTER.json_schema()
