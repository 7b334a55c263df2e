"""Everything that belongs to one batch in flight; stages keep only weights.

Shapes: B rows of this rank's share (at most the capacity), N dense columns, T tables, D embedding dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dlrm.device import Device, Recording
from dlrm.model import DenseModel, DenseWorkspace
from embedding.jagged import Jagged
from pipeline.device_feed import DeviceBatch
from pipeline.loader import LoadedBatch


@dataclass(slots=True, kw_only=True)
class Flight:
    """Typed fields of one batch, their buffers allocated once for ``capacity`` rows.

    Attributes:
        batch: what the loader read, until ``upload`` has taken it.
        step: number of the step, from 1.
        epoch: number of the pass over the data, from 0.
        rows: B, this rank's valid rows; may be 0.
        global_rows: rows of the whole batch over all ranks, which the loss divides by.
        labels: [capacity] 0 or 1, in the parameters' dtype.
        dense: [capacity, model.dense_columns] in the model's dtype.
        keys: this rank's keys of all tables.
        workspace: activations of the dense part; ``workspace.vectors`` [capacity, 1 + T, D] is where the lanes meet.
        embedding: keys, vectors and gradients on their way between ranks.
        loss: this rank's part of the mean loss over the global batch.
        staging: what the stages of a GPU keep of the batch besides.
        batch_rows: rows of a whole batch over all ranks.
        capturable: whether a graph may be made of its work.
        form: which arrays the batch lies in: ``upload`` counts on where it had to make others.
        recording: of the work that is issued for every whole batch of this place of the ring.
    """

    batch: LoadedBatch | DeviceBatch | None = None
    step: int = 0
    epoch: int = 0
    rows: int = 0
    global_rows: int = 0
    labels: Any
    dense: Any
    keys: Jagged | None = None
    workspace: DenseWorkspace
    embedding: Any
    loss: float = 0.0
    staging: Any = None
    batch_rows: int = 0
    capturable: bool = True
    form: int = 0
    recording: Recording = field(default_factory=Recording)

    @property
    def whole(self) -> bool:
        """Whether the batch is a whole one, on every rank alike, and like any other that is."""
        return self.capturable and self.global_rows == self.batch_rows

    @classmethod
    def allocate(
        cls,
        capacity: int,
        *,
        model: DenseModel,
        embedding: Any,
        device: Device,
        training: bool,
    ) -> Flight:
        """A Flight for batches of up to ``capacity`` rows on this rank."""
        workspace = model.workspace(capacity, training=training)
        return cls(
            labels=device.empty((capacity,), model.flat_parameters.dtype),
            dense=device.zeros((capacity, model.dense_columns), model.dtype),
            workspace=workspace,
            embedding=embedding.buffers(capacity, workspace.vectors, workspace.grad_vectors),
        )

    def accept(self, batch: LoadedBatch | DeviceBatch) -> None:
        """Take the next batch; whatever the last one left is overwritten stage by stage."""
        self.batch = batch
        self.step = batch.step
        self.epoch = batch.epoch
        self.rows = batch.host.num_rows
        self.global_rows = batch.global_rows
