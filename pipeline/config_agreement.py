"""All ranks of a run must have one config: found out at the start, before anything is read by it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from dlrm.config import RunConfig, to_values
from dlrm.errors import ConfigError
from embedding.comm import Comm, all_gather_bytes


def agree_config(config: RunConfig, comm: Comm) -> None:
    """Refuse ranks with different configs (collective); equal ones exchange a hash only.

    Raises:
        ConfigError: on every rank; names every rank and the first field in which they differ.
    """
    if comm.size == 1:
        return
    text = json.dumps(to_values(config), sort_keys=True).encode()
    if len(set(all_gather_bytes(comm, hashlib.sha256(text).digest()))) == 1:
        return
    everyone = [json.loads(part) for part in all_gather_bytes(comm, text)]
    flat = [dict(_fields(values)) for values in everyone]
    # Fields of optional sections may be there on some ranks only.
    names = dict.fromkeys(name for fields in flat for name in fields)
    name = next(name for name in names if len({json.dumps(fields.get(name)) for fields in flat}) > 1)
    ranks: dict[str, list[int]] = {}
    for rank, fields in enumerate(flat):
        ranks.setdefault(json.dumps(fields.get(name)), []).append(rank)
    parts = [f"{value} on rank {', '.join(map(str, members))}" for value, members in ranks.items()]
    raise ConfigError(f"{name}: the ranks disagree: {'; '.join(parts)}; start every rank with the same config")


def _fields(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _fields(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value
