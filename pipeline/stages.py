"""What each stage of a step does. A stage reads and writes the Flight it is handed and keeps only weights.

The order, the streams and the overlap are not here but in ``pipeline.schedule``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, TypeVar

from dlrm.config import LearningRateConfig
from dlrm.device import Device
from dlrm.learning_rate import learning_rate
from dlrm.loss import bce_with_logits
from dlrm.model import DenseModel
from dlrm.optim import DenseOptimizer
from embedding.comm import Comm
from embedding.hybrid import HybridEmbedding
from pipeline.flight import Flight
from pipeline.loader import LoadedBatch


class S(StrEnum):
    """Names of the stages, as schedules and progress records spell them."""

    upload = "upload"
    input_dist = "input_dist"
    lookup = "lookup"
    output_dist = "output_dist"
    bottom_forward = "bottom_forward"
    top_forward = "top_forward"
    loss = "loss"
    top_backward = "top_backward"
    sum_replicated = "sum_replicated"
    grad_dist = "grad_dist"
    reduce_replicated = "reduce_replicated"
    top_weight_backward = "top_weight_backward"
    reduce_top = "reduce_top"
    bottom_backward = "bottom_backward"
    reduce_bottom = "reduce_bottom"
    sparse_update = "sparse_update"
    dense_update = "dense_update"


StageFunction = TypeVar("StageFunction", bound=Callable[..., None])

FIELDS: dict[S, tuple[frozenset[str], frozenset[str]]] = {}
"""Per stage the fields that it reads and those that it writes; ``tests/pipeline/test_order.py`` proves by them that
a schedule lets no stage read too early or overwrite too soon. Fields of ``SHARED`` are the stages' own, of all batches;
all others belong to the batch's Flight (``vectors``, ``grad_vectors``, ``activations``, ``logits`` and ``scratch`` to
its workspace; place 0 of the vectors is ``bottom``)."""

SHARED = ("weights", "gradients", "embedding.replicated", "exchange")
"""``exchange.pool`` and ``embedding.replicated`` are room that one batch uses at a time."""


def uses(reads: str, writes: str) -> Callable[[StageFunction], StageFunction]:
    """Declare the fields (blank-separated) that a stage reads and writes."""

    def declare(function: StageFunction) -> StageFunction:
        FIELDS[S(function.__name__)] = (frozenset(reads.split()), frozenset(writes.split()))
        return function

    return declare


class Outcome(Protocol):
    """What came of a step."""

    def loss(self) -> float:
        """This rank's part of the mean loss; waits for it.

        Raises:
            DataError: the device found a row of the batch wrong.
        """
        ...

    def overflowed(self) -> bool:
        """Whether the step's exchange ran over, so that neither it nor any later one has changed anything."""
        ...


@dataclass(frozen=True, slots=True)
class HostOutcome:
    """A loss that is there already."""

    value: float

    def overflowed(self) -> bool:
        """Never."""
        return False

    def loss(self) -> float:
        """It."""
        return self.value


class Stages:
    """The stages over one model: dense part, embedding tables and their optimisers."""

    def __init__(
        self,
        *,
        model: DenseModel,
        embedding: HybridEmbedding,
        comm: Comm,
        device: Device,
        optimizer: DenseOptimizer | None = None,
        dense_lr: float = 0.0,
        table_lr: float = 0.0,
        rates: LearningRateConfig | None = None,
    ) -> None:
        """``optimizer`` is ``None`` and the rates are unused where only forward stages run."""
        self.model = model
        self.embedding = embedding
        self.comm = comm
        self.device = device
        self.optimizer = optimizer
        self.dense_lr = dense_lr
        self.table_lr = table_lr
        self.rates = rates or LearningRateConfig()

    def flight(self, batch_rows: int, *, training: bool) -> Flight:
        """A Flight for batches of up to so many rows over all ranks; with ``training``, for the backward pass too."""
        capacity = -(-batch_rows // self.comm.size)
        flight = Flight.allocate(
            capacity, model=self.model, embedding=self.embedding, device=self.device, training=training
        )
        flight.batch_rows = batch_rows
        return flight

    def run_exact(self, batch: Any, flight: Flight, last: S) -> None:
        """Run a batch again whose exchange ran over, up to stage ``last``; what has no fixed sizes runs over never.

        Flights that are made afterwards have more room.
        """
        raise AssertionError(f"{last} of step {batch.step}: sizes follow the batch, {flight.rows} rows")

    def overflow(self, flight: Flight) -> Any:  # noqa: ARG002
        """[1] int32 of the device: not 0 if the batch's exchange ran over; ``None``: it cannot."""
        return None

    def outcome(self, flight: Flight) -> Outcome:
        """What came of the Flight's step, for the host to look at later."""
        return HostOutcome(flight.loss)

    def counts(self) -> dict[str, int]:
        """What a progress record tells of the steps besides."""
        return {}

    def state(self) -> dict[str, list[float]]:
        """What goes from step to step besides weights and optimisers' state."""
        return {}

    def restore(self, state: dict[str, list[float]]) -> None:
        """Take over what ``state`` gave."""

    def rate(self, step: int, base: float) -> float:
        """Learning rate of a step under the config's warm-up and decay."""
        return learning_rate(self.rates, base, step)

    def run(self, stage: S, flight: Flight) -> None:
        """Run one stage by name."""
        getattr(self, stage)(flight)

    @uses(reads="batch", writes="batch labels dense keys")
    def upload(self, flight: Flight) -> None:
        """Copy the loader's batch to the device, in the model's precision."""
        assert isinstance(flight.batch, LoadedBatch)
        host, rows = flight.batch.host, flight.rows
        self.device.upload(host.labels, flight.labels[:rows])
        self.device.upload(host.dense, flight.dense[:rows])
        flight.keys = host.keys
        flight.batch = None

    @uses(reads="keys", writes="embedding.keys exchange.pool")
    def input_dist(self, flight: Flight) -> None:
        """Send every table's keys to the table's owner."""
        assert flight.keys is not None
        self.embedding.input_dist(flight.keys, flight.embedding, flight.global_rows)

    @uses(reads="keys embedding.keys weights.tables", writes="embedding.rows vectors.tables")
    def lookup(self, flight: Flight) -> None:
        """Owners gather and pool their rows for the global batch."""
        self.embedding.lookup(flight.embedding)

    @uses(
        reads="keys embedding.keys embedding.rows weights.tables", writes="embedding.rows vectors.tables exchange.pool"
    )
    def output_dist(self, flight: Flight) -> None:
        """Send rows and pooled vectors to the ranks that need them; replicated rows are pooled here."""
        self.embedding.output_dist(flight.embedding)

    @uses(reads="dense weights.bottom", writes="activations.bottom vectors.bottom")
    def bottom_forward(self, flight: Flight) -> None:
        """Bottom MLP into place 0 of the vectors."""
        if self.model.first:
            self.model.bottom_forward(flight.dense[: flight.rows], flight.workspace)

    @uses(reads="keys vectors.bottom vectors.tables weights.top weights.tables", writes="activations.top logits")
    def top_forward(self, flight: Flight) -> None:
        """Interaction and top MLP."""
        self.model.top_forward(flight.workspace, flight.rows)

    @uses(reads="logits labels", writes="grad_logits loss")
    def loss(self, flight: Flight) -> None:
        """Binary cross-entropy and its gradient, divided by the global batch."""
        rows, work = flight.rows, flight.workspace
        assert work.grad_logits is not None
        flight.loss = bce_with_logits(
            work.logits[:rows], flight.labels[:rows], flight.global_rows, work.grad_logits[:rows], self.device
        )

    @uses(
        reads="keys grad_logits activations.top vectors.bottom vectors.tables weights.top weights.tables",
        writes="scratch grads.top grad_vectors.bottom grad_vectors.tables gradients.top",
    )
    def top_backward(self, flight: Flight) -> None:
        """Top MLP and interaction backward, down to the vectors."""
        self.model.top_data_backward(flight.workspace, flight.rows)

    @uses(reads="keys embedding.keys grad_vectors.tables", writes="embedding.replicated")
    def sum_replicated(self, flight: Flight) -> None:
        """Sum this rank's gradients of rows that lie on every rank; CPUs do it while those of ``grad_dist`` travel."""

    @uses(reads="keys embedding.keys grad_vectors.tables", writes="embedding.rows exchange.pool")
    def grad_dist(self, flight: Flight) -> None:
        """Send the vectors' gradients to the tables' owners."""
        self.embedding.grad_dist(flight.embedding)

    @uses(reads="embedding.replicated", writes="embedding.replicated exchange.pool")
    def reduce_replicated(self, flight: Flight) -> None:
        """Sum the gradients of rows that lie on every rank over the ranks; ``grad_dist`` has done it on CPUs."""

    @uses(reads="activations.top grads.top", writes="gradients.top")
    def top_weight_backward(self, flight: Flight) -> None:
        """Gradients of the top MLP's weights, which nobody but the dense update waits for."""
        self.model.top_weight_backward(flight.workspace, flight.rows)

    @uses(reads="gradients.top", writes="gradients.top")
    def reduce_top(self, flight: Flight) -> None:  # noqa: ARG002  every stage has the same signature
        """Sum the top layers' gradients over ranks."""
        self.comm.all_reduce(self.model.top_gradients).wait()

    @uses(
        reads="dense grad_vectors.bottom activations.bottom vectors.bottom weights.bottom",
        writes="grad_vectors.bottom scratch grads.bottom gradients.bottom",
    )
    def bottom_backward(self, flight: Flight) -> None:
        """Bottom MLP backward."""
        if self.model.first:
            self.model.bottom_backward(flight.dense[: flight.rows], flight.workspace, flight.rows)

    @uses(reads="gradients.bottom", writes="gradients.bottom")
    def reduce_bottom(self, flight: Flight) -> None:  # noqa: ARG002
        """Sum the bottom layers' gradients over ranks."""
        if self.model.first:
            self.comm.all_reduce(self.model.bottom_gradients).wait()

    @uses(
        reads="keys embedding.keys embedding.rows embedding.replicated grad_vectors.tables weights.tables",
        writes="weights.tables",
    )
    def sparse_update(self, flight: Flight) -> None:
        """Owners update the rows that the global batch touched."""
        self.embedding.sparse_update(flight.embedding, self.rate(flight.step, self.table_lr), flight.step)

    @uses(reads="gradients.top gradients.bottom weights.bottom weights.top", writes="weights.bottom weights.top")
    def dense_update(self, flight: Flight) -> None:
        """Every rank makes the same step with the dense weights."""
        assert self.optimizer is not None
        rate = self.rate(flight.step, self.dense_lr)
        self.optimizer.step(self.model.flat_parameters, self.model.flat_gradients, rate, flight.step)
