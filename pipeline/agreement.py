"""File work of several ranks that succeeds on all of them or raises on all of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dlrm.errors import CheckpointError
from embedding.comm import Comm, all_gather_bytes, broadcast_bytes


def everywhere(comm: Comm, path: Path, work: Callable[[], Any]) -> list[Any]:
    """Do ``work`` on every rank and gather its JSON values; if any rank fails, all raise (collective)."""
    return _results(all_gather_bytes(comm, _attempt(path, work)))


def on_rank_0(comm: Comm, path: Path, work: Callable[[], str]) -> str:
    """Do ``work`` on rank 0 and hand its value to all; if it fails, all raise (collective)."""
    value: str = _results([broadcast_bytes(comm, _attempt(path, work) if comm.rank == 0 else b"")])[0]
    return value


def _attempt(path: Path, work: Callable[[], Any]) -> bytes:
    try:
        return json.dumps({"value": work()}).encode()
    except CheckpointError as error:
        return json.dumps({"error": str(error)}).encode()
    except OSError as error:
        where = error.filename or path
        return json.dumps({"error": f"checkpoint {path}: {where}: {error.strerror or error}"}).encode()


def _results(parts: Sequence[bytes]) -> list[Any]:
    results = [json.loads(part) for part in parts]
    for rank, result in enumerate(results):
        if "error" in result:
            raise CheckpointError(result["error"] + (f" (rank {rank})" if rank else ""))
    return [result["value"] for result in results]
