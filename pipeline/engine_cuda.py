"""The parts of a run on GPUs, joined; ``pipeline.engine`` takes them where the device is one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dlrm.config import RunConfig
from dlrm.device import Device
from dlrm.errors import DeviceError
from dlrm.interaction_cuda import MOST_VECTORS
from dlrm.model import DenseModel
from dlrm.optim import DenseOptimizer
from embedding.captured import CapturedEmbedding
from embedding.comm import Comm
from embedding.placement import Plan
from pipeline.devices import DTYPES
from pipeline.overlap import Schedule
from pipeline.schedule import EVAL_SEQUENTIAL
from pipeline.stages import S
from pipeline.stages_cuda import CudaStages

WEIGHTS_BESIDE = True
"""See ``spread``."""


def build_captured(config: RunConfig, plan: Plan, comm: Comm, device: Device, first: int) -> CapturedEmbedding:
    """The tables of this rank.

    Raises:
        DeviceError: they do not fit.
    """
    if comm.size > 1:
        raise DeviceError(f"device: cuda runs on one rank so far, not on {comm.size}; set device: cpu")
    return CapturedEmbedding(
        specs=plan.specs,
        device=device,
        optimizer=config.table_optimizer,
        table_dtype=DTYPES[config.table_precision],
        seed=config.seed,
        first=first,
        # Sorting needs the keys alone and runs beside the dense lane; the update of sorted rows is then faster than
        # adding gradients to the rows as they come. In sequence both take as long (benchmarks/RESULTS.md).
        deterministic=config.deterministic or (config.overlap.train is not False and config.overlap.depth > 1),
    )


def build_stages(
    config: RunConfig,
    *,
    model: DenseModel,
    embedding: Any,
    comm: Comm,
    device: Device,
    layout: Any,
    optimizer: DenseOptimizer,
) -> CudaStages:
    """The stages over them."""
    dynamic = config.precision == "fp16" and config.loss_scale == "dynamic"
    scale = 1.0
    if config.precision == "fp16":
        scale = 65536.0 if config.loss_scale == "dynamic" else float(config.loss_scale)
    return CudaStages(
        model=model,
        embedding=embedding,
        comm=comm,
        device=device,
        layout=layout,
        optimizer=optimizer,
        dense=config.optimizer,
        tables=config.table_optimizer,
        rates=config.learning_rate,
        seed=config.seed,
        loss_scale=scale,
        dynamic=dynamic,
        growth_interval=config.loss_scale_growth,
        fused_eval=layout is not None and fuses("fused_eval", config.cuda.fused_eval, config, model, comm),
        fused_train=layout is not None and fuses("fused_train", config.cuda.fused_train, config, model, comm),
    )


def fuses(field: str, wish: bool | str, config: RunConfig, model: DenseModel, comm: Comm) -> bool:
    """Whether look-up and interaction run as one kernel, as ``field`` of the config's section ``cuda`` wishes.

    Raises:
        DeviceError: the config insists, and the shapes do not allow it.
    """
    fits = comm.size == 1 and model.dtype.itemsize == 2 and model.num_vectors <= MOST_VECTORS
    fits = fits and config.model.embedding_dim % 8 == 0
    if wish is True and not fits:
        raise DeviceError(
            f"cuda.{field}: {comm.size} ranks, {config.precision}, {model.num_vectors} vectors of "
            f"{config.model.embedding_dim} columns, but it takes one rank, fp16 or bf16, at most {MOST_VECTORS} "
            "vectors and a multiple of 8 columns; set it to auto"
        )
    return bool(wish) and fits


def guarded(schedule: Schedule, stages: CudaStages) -> Schedule:
    """With dynamic loss scaling, tables too are updated only once all gradients are known to be finite."""
    if not stages.dynamic:
        return schedule
    rows = list(schedule.rows)
    update = next(row for row in rows if row.stage == S.sparse_update)
    if update.stream != "main":
        update_after = replace(update, after=(*update.after, S.reduce_dense))
        rows = [update_after if row is update else row for row in rows]
    return Schedule(tuple(rows), schedule.reason)


def spread(schedule: Schedule) -> Schedule:
    """Gradients of the top MLP's weights on a stream of their own, beside the bottom MLP's backward pass.

    Products of small batches leave multiprocessors idle at their ends.
    """
    if not WEIGHTS_BESIDE or not schedule.overlapped:
        return schedule
    rows = []
    for row in schedule.rows:
        if row.stage == S.top_weight_backward:
            rows.append(replace(row, stream="weights", after=(*row.after, S.top_backward)))
        elif row.stage == S.reduce_dense:
            rows.append(replace(row, after=(*row.after, S.bottom_backward)))
        else:
            rows.append(row)
    return Schedule(tuple(rows), schedule.reason)


def fused_schedule(schedule: Schedule) -> Schedule:
    """One stream for an evaluation that has one lane."""
    uploads = [row for row in schedule.rows if row.stage == S.upload]
    rows = [replace(row, ahead=0) for row in EVAL_SEQUENTIAL if row.stage != S.upload]
    return Schedule((*uploads, *rows), "one GPU runs look-up and interaction as one kernel")
