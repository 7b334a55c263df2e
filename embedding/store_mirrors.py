"""Shards of a device, as they are and as arrays of the host, for checkpoints."""

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

    def all(self, touched: Array | None) -> list[Shard]:
        """The host's shards, with their parts of ``touched``: see ``resident``."""
        self._make()
        marks = self._parts(None if touched is None else self.device.to_host(touched))
        return [replace(shard, touched=part) for shard, part in zip(self.shards, marks, strict=True)]

    def resident(self, touched: Array | None) -> list[Shard]:
        """The device's shards, with their parts of ``touched``, [R] or longer, bool of the device, as views."""
        return [replace(shard, touched=part) for shard, part in zip(self.held, self._parts(touched), strict=True)]

    def _parts(self, touched: Array | None) -> list[Array | None]:
        if touched is None:
            return [None] * len(self.held)
        sizes = [len(shard.rows) for shard in self.held]
        return [touched[end - size : end] for end, size in zip(np.cumsum(sizes).tolist(), sizes, strict=True)]

    def _make(self) -> None:
        if not self.shards:
            for shard in self.held:
                dtype = np.float32 if shard.weight.dtype == np.uint16 else shard.weight.dtype
                state = {name: np.empty(array.shape, array.dtype) for name, array in shard.state.items()}
                self.shards.append(replace(shard, weight=np.empty(shard.weight.shape, dtype), state=state))

    def settle(self) -> None:
        """Bring the host's arrays up to date."""
        self._make()
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
