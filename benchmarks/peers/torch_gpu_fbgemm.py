"""FBGEMM's table-batched embeddings (TorchRec's kernels) as the tables of ``torch_gpu_dlrm.Peer``.

Fused exact SGD in backward, float32 rows, output in the activations' precision, no bounds check.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)


class FbgemmTables:
    """Keys of a batch [T * B] are table-major, each counts through its own table."""

    def __init__(self, shape: Any, *, half: bool, lr: float, device: torch.device) -> None:
        """Allocate the tables."""
        self.num_tables, self.dim = len(shape.rows), shape.dim
        on_gpu = device.type == "cuda"
        place = (
            (EmbeddingLocation.DEVICE, ComputeDevice.CUDA) if on_gpu else (EmbeddingLocation.HOST, ComputeDevice.CPU)
        )
        self.tables = SplitTableBatchedEmbeddingBagsCodegen(
            [(rows, shape.dim, *place) for rows in shape.rows],
            optimizer=EmbOptimType.EXACT_SGD,
            learning_rate=lr,
            weights_precision=SparseType.FP32,
            output_dtype=SparseType.FP16 if half else SparseType.FP32,
            pooling_mode=PoolingMode.SUM,
            bounds_check_mode=BoundsCheckMode.NONE,
            device=device,
        )
        self._offsets: dict[int, torch.Tensor] = {}

    def views(self, rows: Sequence[int]) -> Sequence[torch.Tensor]:  # noqa: ARG002  the tables know
        """The weights of each table."""
        return self.tables.split_embedding_weights()

    def arrange(self, keys: torch.Tensor) -> torch.Tensor:
        """Keys [B, T] of each table as this class wants them."""
        return keys.t().contiguous().flatten()

    def lookup(self, keys: torch.Tensor) -> torch.Tensor:
        """Pooled vectors [B, T, D] of a batch, whose backward updates the tables."""
        size = len(keys)
        if size not in self._offsets:
            self._offsets[size] = torch.arange(size + 1, device=keys.device)
        return self.tables(keys, self._offsets[size]).view(-1, self.num_tables, self.dim)

    def update(self, keys: torch.Tensor, grad: torch.Tensor, lr: float) -> None:
        """Nothing: backward did it."""
