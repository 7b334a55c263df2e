"""The stages of a step on a GPU: the order and the names of ``pipeline.stages``, over kernels that a graph can replay.

What changes from step to step lies in the Flight's block of scalars; ``guard`` goes from step to step on the device.
Shapes: B rows of this rank, G rows of the batch, C dense columns with their padding, V words of a record.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dlrm.config import LearningRateConfig, OptimizerConfig
from dlrm.device import Array, Device, Reading
from dlrm.interaction import (
    gather_interaction,
    gather_interaction_backward,
    listed_interaction,
    listed_interaction_backward,
)
from dlrm.loss_cuda import partials_of
from dlrm.model import DenseModel
from dlrm.optim import DenseOptimizer
from dlrm.optim import constants as dense_constants
from dlrm.scalars import NOT_FINITE, SIZE, SKIPPED_STEPS, write_guard, write_scalars
from embedding.batch import check_bag_keys
from embedding.captured_bags import ExchangedBags
from embedding.captured_exchange import ExchangedEmbedding
from embedding.comm import Comm
from embedding.jagged import Jagged
from embedding.sparse_optim import constants as sparse_constants
from pipeline.flight import Flight
from pipeline.formats.record_files import RecordLayout
from pipeline.intake_cuda import Decoded, Intake, Records
from pipeline.record_loader import BagCheck, RecordBatch
from pipeline.stages import S, Stages


@dataclass(frozen=True, slots=True)
class Fused:
    """Where look-up and interaction run as one kernel."""

    train: bool = False
    eval: bool = False


@dataclass(slots=True, kw_only=True)
class Staging:
    """What a Flight has on a GPU besides.

    Attributes:
        scalars: see ``dlrm.scalars``.
        outcome: [2] float64: the loss, and as integers 1 + the place of a faulty record and whether the exchange ran
            over.
        partials: room for the sum of the loss.
        brought: how batches come.
        fused: look-up and interaction run as one kernel: in training that of ``top_forward``; in a forward pass that of
            ``lookup``, behind the bottom MLP, or on several GPUs of ``top_forward`` too, behind ``output_dist``.
        beside: rows that lie here are looked up beside the exchange of the others.
    """

    scalars: Array
    outcome: Array
    partials: Array
    brought: Records | Decoded
    fused: bool = False
    beside: bool = False


@dataclass(frozen=True, slots=True)
class CudaOutcome:
    """A step's loss on its way to the host."""

    reading: Reading
    host: RecordBatch | None
    check: BagCheck

    def loss(self) -> float:
        """This rank's part of the mean loss; waits for it.

        Raises:
            DataError: a record of the batch is wrong.
        """
        values = self.reading.values()
        if (fault := int(values[1:].view(np.int32)[0])) and self.host is not None:
            raise self.host.fault(fault - 1, self.check)
        return float(values[0])

    def overflowed(self) -> bool:
        """See ``Outcome``; waits for it."""
        return bool(self.reading.values()[1:].view(np.int32)[1])


class CudaStages(Stages):
    """The stages over one model on this rank's GPU.

    Args:
        model: dense part.
        embedding: tables (``CapturedEmbedding``, or the one of several ranks).
        comm: of the dense lane, for buffers of the device.
        device: the GPU.
        layout: of the records; ``None``: decoded batches come.
        optimizer: of the dense part; ``None``: forward only.
        dense: its config.
        tables: config of the tables' optimiser.
        rates: schedule of the learning rate.
        seed: of the run.
        loss_scale: factor of all gradients at the start.
        dynamic: whether it changes, and steps with gradients that are not finite are skipped.
        growth_interval: good steps after which it is doubled.
        fused: where look-up and interaction run as one kernel.
        captures: whether steps may be captured into graphs.
    """

    def __init__(
        self,
        *,
        model: DenseModel,
        embedding: Any,
        comm: Comm,
        device: Device,
        layout: RecordLayout | None,
        optimizer: DenseOptimizer | None,
        dense: OptimizerConfig,
        tables: OptimizerConfig,
        rates: LearningRateConfig,
        seed: int,
        loss_scale: float,
        dynamic: bool,
        growth_interval: int,
        fused: Fused,
        captures: bool = True,
    ) -> None:
        super().__init__(
            model=model, embedding=embedding, comm=comm, device=device, optimizer=optimizer, dense_lr=dense.lr,
            table_lr=tables.lr, rates=rates,
        )  # fmt: skip
        self._tables_of_rank, self._captures = embedding, captures
        self._exchanged = embedding if isinstance(embedding, ExchangedEmbedding | ExchangedBags) else None
        self._of_keys = embedding if isinstance(embedding, ExchangedEmbedding) else None  # not of bags
        self._overflows = 0
        self._dense, self._tables, self._seed = dense, tables, seed
        self.fused = fused
        self.dynamic, self._growth = dynamic, growth_interval
        xp = device.xp
        self.guard = xp.asarray(write_guard(np.empty(SIZE, np.float32), loss_scale))
        self._intake = Intake(layout, embedding, device, comm.size)

    def flight(self, batch_rows: int, *, training: bool) -> Flight:
        """See ``Stages.flight``."""
        flight = super().flight(batch_rows, training=training)
        flight.capturable = self._captures
        device, capacity = self.device, len(flight.labels)
        staging = Staging(
            scalars=device.zeros(SIZE, np.float32),
            outcome=device.zeros(2, np.float64),
            partials=device.empty(partials_of(capacity), np.float64),
            brought=self._intake.room(flight, batch_rows),
            fused=self.fused.train if training else self.fused.eval,
            beside=training and self._of_keys is not None and not self.fused.train,
        )
        flight.staging = staging
        return flight

    def counts(self) -> dict[str, int]:
        """Steps whose gradients were not finite, with dynamic loss scaling, and batches whose exchange ran over."""
        counts = {} if self._exchanged is None else {"overflows": self._overflows}
        if self.dynamic:
            counts["skipped_steps"] = int(self.device.to_host(self.guard).view(np.int32)[SKIPPED_STEPS])
        return counts

    def overflow(self, flight: Flight) -> Any:
        """See ``Stages.overflow``."""
        return None if self._exchanged is None else flight.embedding.lists.flag

    def run_exact(self, batch: Any, flight: Flight, last: S) -> None:
        """See ``Stages.run_exact``: with lists of the length that this batch needs; the host waits."""
        exchanged = self._exchanged
        assert exchanged is not None
        self._overflows += 1
        exchanged.clear_overflow(self.guard)
        flight.accept(batch)
        self.upload(flight)
        self.input_dist(flight)
        usual = flight.embedding
        exchanged.make_room(usual)
        flight.embedding = exchanged.exact(usual, flight.rows, flight.global_rows)
        stages = list(S)
        for stage in stages[stages.index(S.lookup) : stages.index(last) + 1]:
            self.run(stage, flight)
        # What the step had is given back to be used again, on whatever stream.
        self.device.record().synchronize()
        flight.embedding = usual

    def state(self) -> dict[str, list[float]]:
        """The guard, its floats as bits of integers, and how often an exchange ran over."""
        return {"guard": self.device.to_host(self.guard).view(np.int32).tolist(), "overflows": [self._overflows]}

    def restore(self, state: dict[str, list[float]]) -> None:
        """See ``Stages.restore``; of another kind of loss scaling only the counts are kept."""
        if "guard" not in state:
            return
        self._overflows = int(state.get("overflows", [0])[0])
        guard = np.array(state["guard"], np.int32).view(np.float32)
        if not self.dynamic:
            guard[:2] = self.device.to_host(self.guard)[:2]
        self.device.upload(guard, self.guard)

    def outcome(self, flight: Flight) -> CudaOutcome:
        """See ``Stages.outcome``."""
        staging = flight.staging
        return CudaOutcome(self.device.read_later(staging.outcome), staging.brought.host, self._check)

    def _check(self, keys: Jagged, row: int) -> None:
        here = f"rank {self.comm.rank}: " if self.comm.size > 1 else ""
        check_bag_keys(keys, self._tables_of_rank.specs, here, row)

    # --- the stages, in the order of ``S``

    def upload(self, flight: Flight) -> None:
        """Send this step's scalars and the batch, and take it apart."""
        batch, staging = flight.batch, flight.staging
        flight.batch = None
        lr = self.rate(flight.step, self.table_lr)
        block = write_scalars(
            np.empty(SIZE, np.float32),
            lr=self.rate(flight.step, self.dense_lr),
            global_rows=flight.global_rows,
            valid_rows=flight.rows,
            step=flight.step,
            seed=self._seed,
            sparse=sparse_constants(self._tables, lr, flight.step).tolist(),
            dense=dense_constants(self._dense, flight.step),
        )
        self.device.upload(block, staging.scalars)
        assert batch is not None
        flight.embedding.begin(flight.rows, flight.global_rows)
        self._intake.take(batch, flight)

    def input_dist(self, flight: Flight) -> None:
        """Bring the batch's keys where they are needed, and into order."""
        self._tables_of_rank.input_dist(flight.embedding, flight.rows, flight.global_rows)

    def lookup(self, flight: Flight) -> None:
        """Gather and pool; nothing where the interaction does it later, on several GPUs what travels alone."""
        if self._of_keys is not None:
            self._of_keys.lookup(flight.embedding, local=not flight.staging.beside)
        elif not flight.staging.fused:
            self.embedding.lookup(flight.embedding)
        elif flight.workspace.grad_vectors is None:
            self._cross(flight)

    def bottom_forward(self, flight: Flight) -> None:
        """Bottom MLP; on several GPUs also the rows that lie here, where nobody else looks them up in training."""
        super().bottom_forward(flight)
        if flight.staging.beside and self._of_keys is not None:
            self._of_keys.lookup_local(flight.embedding)

    def top_forward(self, flight: Flight) -> None:
        """Interaction and top MLP."""
        if not flight.staging.fused:
            self.model.top_forward(flight.workspace, flight.rows)
            return
        if self._of_keys is not None or flight.workspace.grad_vectors is not None:
            self._cross(flight)
        self.model.top_mlp_forward(flight.workspace, flight.rows)

    def _cross(self, flight: Flight) -> None:
        """Look-up and interaction as one kernel."""
        crossed, first, device = flight.workspace.interaction[: flight.rows], self.model.first, self.device
        if self._of_keys is None:
            gather_interaction(*self._rows_of(flight), crossed, first=first, device=device)
        else:
            listed_interaction(*self._listed_rows_of(flight), crossed, first=first, device=device)

    def top_backward(self, flight: Flight) -> None:
        """Gradients of all vectors; the rows are read from the tables again where the interaction looked them up."""
        if not flight.staging.fused:
            self.model.top_data_backward(flight.workspace, flight.rows)
            return
        work, rows = flight.workspace, flight.rows
        grad_crossed = self.model.top_mlp_data_backward(work, rows)
        assert work.grad_vectors is not None
        gradients, first, device = (grad_crossed, work.grad_vectors[:rows]), self.model.first, self.device
        if self._of_keys is None:
            gather_interaction_backward(*self._rows_of(flight), *gradients, first=first, device=device)
        else:
            own = flight.embedding.route.own_gradients
            slots = self._of_keys.slots(flight.embedding)
            listed_interaction_backward(
                *self._listed_rows_of(flight), *gradients, slots, own, first=first, device=device
            )

    def _listed_rows_of(self, flight: Flight) -> tuple[Array, Array, Array, Array, int]:
        """Bottom output, rows here, rows that have come, and where each is, as the kernels take them."""
        exchanged = self._of_keys
        assert exchanged is not None
        sources = flight.embedding.lists.sources[: len(exchanged.specs) * flight.rows]
        return flight.workspace.vectors[:, 0], exchanged.weight, flight.embedding.route.come, sources, flight.rows

    def _rows_of(self, flight: Flight) -> tuple[Array, Array, Array, Array, int]:
        """Bottom output, tables and keys, as the kernels take them that look rows up themselves."""
        store = self._tables_of_rank.store
        keys = flight.embedding.keys[: len(store.row_start) * flight.rows]
        return flight.workspace.vectors[:, 0], store.weight, store.row_start, keys, flight.rows

    def loss(self, flight: Flight) -> None:
        """Binary cross-entropy and its gradient, times the loss scale."""
        rows, work, staging = flight.rows, flight.workspace, flight.staging
        assert work.grad_logits is not None
        self._kernel("dlrm.optim", "begin_step")(self.guard)
        self._kernel("dlrm.loss", "loss_and_gradient")(
            work.logits[:rows], flight.labels[:rows], work.grad_logits[:rows], staging.outcome[:1], staging.scalars,
            self.guard, staging.partials,
        )  # fmt: skip
        if self._exchanged is not None:
            self._exchanged.raise_overflow(flight.embedding, self.guard)
            staging.outcome[1:].view(np.int32)[1:] = flight.embedding.lists.flag

    def sum_replicated(self, flight: Flight) -> None:
        """Sum this rank's gradients of rows that lie on every GPU."""
        if self._exchanged is not None:
            self._exchanged.sum_replicated(flight.embedding)

    def reduce_replicated(self, flight: Flight) -> None:
        """Sum them over the GPUs."""
        if self._exchanged is not None:
            self._exchanged.reduce_replicated(flight.embedding)

    def reduce_bottom(self, flight: Flight) -> None:
        """Sum the bottom layers' gradients; with dynamic loss scaling, see whether all gradients are finite."""
        super().reduce_bottom(flight)
        if not self.dynamic:
            return
        check = self._kernel("dlrm.optim", "check_finite")
        check(self.model.flat_gradients, self.guard)
        assert flight.workspace.grad_vectors is not None
        check(flight.workspace.grad_vectors[: flight.rows].reshape(-1), self.guard)
        self.comm.all_reduce(self.guard[NOT_FINITE : NOT_FINITE + 1].view(np.int32), "max").wait()

    def sparse_update(self, flight: Flight) -> None:
        """Update the rows that the batch touched."""
        self._tables_of_rank.sparse_update(flight.embedding, flight.staging.scalars, self.guard)

    def dense_update(self, flight: Flight) -> None:
        """Update the dense parameters and their narrow copy, and end the step."""
        model, optimizer = self.model, self.optimizer
        assert optimizer is not None
        weights = None if model.flat_weights is model.flat_parameters else model.flat_weights
        self._kernel("dlrm.optim", self._dense.kind)(
            model.flat_parameters, model.flat_gradients, *optimizer.state.values(), weights, flight.staging.scalars,
            self.guard,
        )  # fmt: skip
        self._kernel("dlrm.optim", "end_step")(self.guard, self._growth, self.dynamic)

    def _kernel(self, module: str, name: str) -> Any:
        kernel = self.device.kernel(module, name)
        assert kernel is not None, f"{module}.{name} has no CUDA form"
        return kernel
