"""How a GPU is used: a section of a run's config."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from dlrm.config_embedding import STRICT


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class CudaConfig:
    """How a GPU is used."""

    graphs: bool = True
    """Capture a step into a CUDA graph and replay it."""
    carrier: Literal["auto", "nccl", "staged"] = "auto"
    """What brings arrays from GPU to GPU: NCCL, or ``staged``, which goes through the memory of the hosts and MPI and
    lets several ranks share a GPU, slowly and without graphs. ``auto``: NCCL where every rank has a GPU of its own."""
    fused_eval: bool | Literal["auto"] = "auto"
    """Evaluate with look-up and interaction as one kernel; ``auto``: where shapes and exchange allow it."""
    fused_train: bool | Literal["auto"] = "auto"
    """Train with look-up and interaction as one kernel, which reads the rows once more for the gradients instead of
    keeping them; ``auto``: where shapes and exchange allow it."""
