"""The parts of a run's config that tables and optimisers are built from; ``config.py`` joins them to a run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from dlrm.errors import ConfigError

PositiveInt = Annotated[int, Field(gt=0)]
CountInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]

Pooling = Literal["sum", "mean", "concat"]
PlacementKind = Literal["replicated", "table_wise", "row_wise", "column_wise", "hybrid"]

STRICT = ConfigDict(extra="forbid")


def _writable(text: str) -> str:
    """JSON can spell what neither a file name nor a file of text can hold."""
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise PydanticCustomError("text", "must hold no NUL and no half of a surrogate pair")
    return text


Text = Annotated[str, AfterValidator(_writable)]


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class OptimizerConfig:
    """One optimiser and its constants; fields that a kind does not use are ignored by it."""

    kind: Literal["sgd", "momentum", "adagrad", "rowwise_adagrad", "adam", "ftrl"] = "sgd"
    """``rowwise_adagrad`` is for tables only."""
    lr: PositiveFloat = 0.1
    """Base learning rate (FTRL: alpha)."""
    momentum: Fraction = 0.9
    eps: PositiveFloat = 1e-8
    """Added to the root in Adagrad, row-wise Adagrad and Adam."""
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    initial_accumulator: NonNegativeFloat | None = None
    """First value of the accumulator: 0 for (row-wise) Adagrad and 0.1 for FTRL unless set."""
    ftrl_beta: NonNegativeFloat = 0.0
    l1: NonNegativeFloat = 0.0
    l2: NonNegativeFloat = 0.0

    @property
    def accumulator_start(self) -> float:
        """First value of the accumulator, with the default of the kind."""
        if self.initial_accumulator is not None:
            return self.initial_accumulator
        return 0.1 if self.kind == "ftrl" else 0.0


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class TableConfig:
    """What one table does differently."""

    pooling: Pooling | None = None
    placement: PlacementKind | None = None
    """Where the rows lie; ``None``: as ``embedding.placement`` says."""
    threshold: CountInt | None = None
    """``hybrid``: rows below it are replicated; ``None``: the plan chooses. 0 is ``row_wise``, all ``replicated``."""
    deduplicate: bool | None = None
    """Send each distinct row once; ``None``: as ``embedding.deduplicate`` says."""

    def __post_init__(self) -> None:
        """Check that a threshold and a de-duplication have a placement that uses them.

        Raises:
            ConfigError: one has not.
        """
        if self.deduplicate and self.placement in ("column_wise", "replicated"):
            raise ConfigError(
                f"deduplicate: true, but placement is {self.placement}, which sends no rows; leave one of them out"
            )
        if self.threshold is not None and self.placement != "hybrid":
            raise ConfigError(
                f"threshold: {self.threshold}, but placement is {self.placement or 'not set'}; "
                "set placement to hybrid, or leave threshold out"
            )


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class EmbeddingConfig:
    """How looked-up rows are pooled and updated."""

    pooling: Pooling = "sum"
    """Of a bag's vectors; ``concat``: none, each is a feature of its own, and every bag holds the table's hotness."""
    tables: dict[Text, TableConfig] = Field(default_factory=dict)
    """Exceptions by table name."""
    optimizer: OptimizerConfig | None = None
    """``None``: the dense part's."""
    placement: Literal["auto"] | PlacementKind = "auto"
    """Where tables lie that ``tables`` does not place; ``auto``: each where it is predicted to be fastest."""
    deduplicate: Literal["auto"] | bool = "auto"
    """Send each distinct row once per pair of ranks and batch; ``auto``: where that is predicted to be faster."""
    table_precision: Literal["fp32", "fp16", "bf16"] | None = None
    """How rows are kept on a GPU; ``fp16`` and ``bf16`` are updated in fp32 and rounded at random, so that no small
    step is lost. ``None``: fp32, with the run's ``fp64`` that."""
    exchange_precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Of vectors and gradients between ranks; tables and sums keep the run's precision."""
    all_to_all: Literal["auto", "flat", "hierarchical"] = "auto"
    """Between several nodes: from every rank to every rank, or in two stages."""
    nodes: PositiveInt | None = None
    """Plan and exchange as if the ranks lay on so many nodes, contiguous ranks together: to try on one machine what
    several would do. ``None``: the machines that they are on."""
    memory_limit_mib: PositiveInt | None = None
    """Memory of tables and their optimiser state on each rank; ``None``: what the machine has free."""
    calibration_batches: PositiveInt = 32
    """Training batches whose keys are counted before a plan is made."""
    trial_steps: CountInt = 5
    """Where several kinds of plans are predicted to be about as fast, each is timed for so many steps at the start and
    the fastest is kept; 0: the prediction decides, as it does with ``deterministic``."""
