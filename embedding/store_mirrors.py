"""Shards of a device as arrays of the host, for checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from dlrm.device import Array, Device
from embedding.table import Shard


@dataclass(slots=True)
class StoreMirrors:
    """Copies on the host; bfloat16, which NumPy lacks, becomes float32.

    Attributes:
        device: holds the shards.
        held: the shards there.
        shards: those of the host, made at the first use.
    """

    device: Device
    held: Sequence[Shard]
    shards: list[Shard] = field(default_factory=list)

    def all(self, touched: Sequence[Array | None]) -> list[Shard]:
        """The host's shards, with the rows that were touched of each."""
        if not self.shards:
            for shard in self.held:
                dtype = np.float32 if shard.weight.dtype == np.uint16 else shard.weight.dtype
                state = {name: np.empty(array.shape, array.dtype) for name, array in shard.state.items()}
                self.shards.append(replace(shard, weight=np.empty(shard.weight.shape, dtype), state=state))
        return [replace(shard, touched=rows) for shard, rows in zip(self.shards, touched, strict=True)]

    def settle(self) -> None:
        """Bring the host's arrays up to date."""
        self.all([None] * len(self.held))
        for source, target in self._pairs():
            if source.dtype == target.dtype:
                self.device.download(source, target)
            else:
                wide = self.device.empty(source.shape, target.dtype)
                self.device.convert(source, wide)
                self.device.download(wide, target)

    def spread(self) -> None:
        """Take over what was written into the host's arrays."""
        if self.shards:
            for target, source in self._pairs():
                self.device.assign(source, target)

    def _pairs(self) -> list[tuple[Array, Array]]:
        """Arrays of the device and of the host."""
        pairs = []
        for held, own in zip(self.held, self.shards, strict=True):
            pairs.append((held.weight, own.weight))
            pairs += [(held.state[name], own.state[name]) for name in held.state]
        return pairs
