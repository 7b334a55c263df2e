"""The manifest of a checkpoint: JSON with a checksum of its own."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlrm.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = "crosslane-checkpoint"
# The newest that is read. Written is the oldest that has what is needed: 2 for tensors in pieces and increments.
VERSION = 2


def write_manifest(folder: Path, values: Mapping[str, Any]) -> None:
    """Write ``manifest.json`` and flush it to disk; format, version and checksum are added.

    Raises:
        CheckpointError: ``values`` are not JSON.
    """
    version = 2 if "base" in values or any("pieces" in tensor for tensor in values["tensors"].values()) else 1
    manifest = {"format": FORMAT, "version": version, **values}
    try:
        plain = json.loads(json.dumps(manifest, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"meta: not JSON ({error}); note plain values only") from None
    text = json.dumps({**plain, "checksum": checksum_of(plain)}, indent=1)
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The values of a checkpoint's manifest.

    Raises:
        CheckpointError: it is missing, damaged or of another format.
    """
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"checkpoint {folder}: has no {MANIFEST}; name the folder of a checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"checkpoint {folder}: {MANIFEST} cannot be read ({error.strerror})") from None
    except ValueError:
        raise CheckpointError(f"checkpoint {folder}: {MANIFEST} is damaged; use another checkpoint") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint {folder}: {MANIFEST} is not of a Crosslane checkpoint; name another folder")
    version = manifest.get("version")
    if version not in range(1, VERSION + 1):
        raise CheckpointError(
            f"checkpoint {folder}: is of format version {version}, but this Crosslane reads 1 to {VERSION}; "
            "use the Crosslane that wrote it"
        )
    if manifest.pop("checksum", None) != checksum_of(manifest):
        raise CheckpointError(f"checkpoint {folder}: {MANIFEST} is damaged (wrong checksum); use another checkpoint")
    return manifest


def checksum_of(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's values without the checksum itself."""
    plain = json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(plain.encode()).hexdigest()
