"""FBGEMM's table-batched embeddings (TorchRec's kernels) on given keys: forward, and forward + backward + update."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)

OPTIMIZERS = {"sgd": EmbOptimType.EXACT_SGD, "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD}


def measure(
    rows: Sequence[int], dim: int, keys: Any, offsets: Any, batch: int, kind: str, repetitions: int
) -> Iterator[tuple[str, float]]:
    """Median microseconds of each form, on the GPU.

    Args:
        rows: of each table.
        dim: columns.
        keys: [K] table-major.
        offsets: [T * B + 1].
        batch: B.
        kind: a key of ``OPTIMIZERS``.
        repetitions: of which the median is taken.

    Yields:
        A name and its time.
    """
    indices = torch.from_numpy(keys).long().cuda()
    bags = torch.from_numpy(offsets).long().cuda()
    gradient = torch.full((batch, len(rows) * dim), 1e-3, dtype=torch.half, device="cuda")
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    for experimental in (False, True):
        tables = SplitTableBatchedEmbeddingBagsCodegen(
            [(size, dim, EmbeddingLocation.DEVICE, ComputeDevice.CUDA) for size in rows],
            optimizer=OPTIMIZERS[kind],
            learning_rate=1e-3,
            weights_precision=SparseType.FP32,
            output_dtype=SparseType.FP16,
            pooling_mode=PoolingMode.SUM,
            bounds_check_mode=BoundsCheckMode.NONE,
            use_experimental_tbe=experimental,
            device=torch.device("cuda"),
        )
        form = "experimental TBE" if experimental else "default TBE"

        def forward(tables: Any = tables) -> Any:
            return tables(indices, bags)

        def step(tables: Any = tables) -> None:
            tables(indices, bags).backward(gradient)

        yield f"{form}, {kind}: forward", _median_us(forward, flush, repetitions)
        yield f"{form}, {kind}: forward + update", _median_us(step, flush, repetitions)
        del tables, forward, step
        torch.cuda.empty_cache()


def _median_us(run: Callable[[], Any], flush: Any, repetitions: int) -> float:
    for _ in range(5):
        run()
    torch.cuda.synchronize()
    times = []
    for _ in range(repetitions):
        # The GPU is kept busy while Python issues the step, so that its launches queue up and no gap is timed.
        for _ in range(4):
            flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(1000 * begin.elapsed_time(end))
    return statistics.median(times)
